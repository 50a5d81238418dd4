"""MobileQuant: scales between layers, clipping and static activation ranges, learned together from end to end.

Tan et al., "MobileQuant: Mobile-friendly Quantization for On-device Language Models", EMNLP Findings 2024,
arXiv:2408.13933, section 3, and the repository saic-fi/MobileQuant for what the paper leaves open.

1. SmoothQuant (alpha 1/2) moves part of the activations' range into the weights (`smooth`).
2. Minimum and maximum of every activation over the calibration text give its static range.
3. Learned, with AdamW at three rates falling by a cosine, without decay of weights:
       LET  s of each pair of layers, from 1         (train/equivalent.py)
       LWC  clipping of every weight, norms included (train/clipping.py)
       LRL  scale and offset of every activation     (fake_quant.StaticAffine)
   to the least mean((H_float - H_quantised)^2), H the states after the last quantised block, before the final norm.
   `level` "model" is MobileQuant: one loss for all blocks. "layer" is what it is compared with: block by block, each on
   the states of the quantised blocks before it: OmniQuant (LET, LWC), the original one without fc2 (`up_down` off), and
   with ranges learned as well.
4. LET is folded, weights are rounded inside their clip, ranges become the folder's static activations.

Where is rounded, and to how many bits: `ports`. A tensor is rounded once, by what makes it; what joins the residual
stream has 16 bits, and so have norms' inputs and weights, scores and probabilities. Embedding, final norm and head stay
float. The down projection's weight is always per channel.

Differs from the paper: a rate of ranges is relative to each scale and to the 255 steps of an offset (`range_rate`; the
authors' absolute 1e-6 over 61,440 steps moves a scale of 0.02 by as much as 500 relative steps of this one do), so that
few steps are enough and 16-bit scales, a hundred times smaller, do not run away. Offsets are whole numbers in training
too. The pair qk has one factor for two dimensions that the rotary embedding turns together, to keep the function.
Steps and texts are fewer (`steps`; the authors take 60 epochs of 1024 texts of 2048 tokens).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from edgewise.compress.quantize.smoothquant import SmoothQuant, scales_of
from edgewise.compress.scales import rescaled, shared
from edgewise.compress.walk import Group, blocks_of, walk
from edgewise.core.activation import StaticActivation, activations_to_config
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.elements import FP32, int_format
from edgewise.core.errors import InvalidValueError, UnsupportedError
from edgewise.core.numbers import QuantFormat
from edgewise.core.numbers import quantize as to_codes
from edgewise.core.shapes import shapes_of
from edgewise.core.stats import InputStats
from edgewise.core.storage import Dense, QuantizedTensor, Stored
from edgewise.formats.cache import write_aside
from edgewise.models.loader import load
from edgewise.models.static import install
from edgewise.train.clipping import clipped_quantize
from edgewise.train.equivalent import (
    LINEARS,
    NORMS,
    BlockShape,
    factors_of,
    transformed,
    without_weights,
)
from edgewise.train.fake_quant import StaticAffine
from edgewise.train.hooks import LayerInputs, gather, inputs_of_layers

__all__ = ["Learner", "MobileQuant", "ports", "quantize", "smoothed"]

Progress = Callable[[str, int, int], None]
_NORM = QuantFormat.parse("int8/tensor/fp32/int")
_SAVED_EVERY = 20
_SMALLEST = 1e-2
"""|s| of a pair is kept above this; the authors' code."""


@dataclass(frozen=True)
class MobileQuant:
    """Defaults are the authors' but for steps, length and range_rate, which are ours."""

    activation_bits: int = 8
    wide_bits: int = 16              # norms' inputs and weights, scores, probabilities, what joins the residual
    symmetric: bool = False          # the "-sym" W4A8 of phones: zero points in the middle
    wide_gates: bool = False         # Gemma: outputs of gate and up in wide_bits
    smooth: bool = True
    alpha: float = 0.5
    level: Literal["model", "layer"] = "model"
    learn_scales: bool = True        # LET
    learn_clips: bool = True         # LWC
    learn_ranges: bool = True        # LRL
    up_down: bool = True             # the pair fc2
    grouped: bool = False            # out and qk under grouped queries too, one factor per group
    steps: int = 120                 # of the optimiser; with level "layer", for each block
    length: int = 256                # tokens of a training sequence
    scale_rate: float = 1e-3         # falls to a tenth, like the others
    clip_rate: float = 1e-2
    range_rate: float = 5e-4         # relative; see above
    clip: float = 4.0                # both factors before the sigmoid; 0.982 after
    blocks: int | None = None        # quantise the first so many blocks only; None: all
    seed: int = 1337

    def __post_init__(self) -> None:
        if self.level not in ("model", "layer"):
            raise InvalidValueError(f"level is model or layer; given {self.level!r}")
        if self.steps < 0 or self.length < 2 or not 2 <= self.activation_bits <= self.wide_bits <= 16:
            raise InvalidValueError("steps are not negative, a sequence has at least two tokens, and activations 2 to "
                                    f"16 bits; given {self}")


def ports(config: MobileQuant) -> dict[str, int]:
    """Bits by site of a block, named from inside it. Of a norm's output: shared by the linears that read it."""
    small, wide = config.activation_bits, config.wide_bits
    gates = wide if config.wide_gates else small
    made = {f"self_attn.{part}_proj.output": small for part in "qkv"}
    for norm in NORMS:
        made |= {f"{norm}.input": wide, f"{norm}.output": small}
    made |= {"self_attn.query": small, "self_attn.key": small, "self_attn.softmax_in": wide,
             "self_attn.softmax_out": wide, "self_attn.o_proj.input": small, "self_attn.o_proj.output": wide,
             "mlp.gate_proj.output": gates, "mlp.up_proj.output": gates, "mlp.act": small,
             "mlp.sigmoid": small, "mlp.down_proj.input": small, "mlp.down_proj.output": wide}
    return made


# ---- before learning ----------------------------------------------------------------------------------------------

def smoothed(checkpoint: Checkpoint, stats: Mapping[str, InputStats], config: MobileQuant) -> Checkpoint:
    """SmoothQuant folded into the weights: norms to their readers, up to down, and v to o where heads allow it.

    stats: of the float model's linears; a scale changes no statistics but those of its own group.
    """
    heads, kv_heads = _heads(checkpoint)

    def change(group: Group, tensors: Mapping[str, Stored], _: InputStats | None) -> Mapping[str, Stored]:
        if not group.site or group.producer is None or (group.site == "down" and not config.up_down) or (
                group.site == "output" and heads != kv_heads and not config.grouped):
            return {}
        weights = [np.asarray(tensors[name].dense(), np.float32) for name in group.names]
        scale = scales_of(weights, stats[group.names[0]].absmax, SmoothQuant(alpha=config.alpha))
        return rescaled(group, tensors, shared(scale, group))

    return walk(checkpoint, change, step=Step("smooth", {"alpha": config.alpha}),
                blocks=range(_count(checkpoint, config)))


def _heads(checkpoint: Checkpoint) -> tuple[int, int]:
    if shapes_of(checkpoint.config, checkpoint.source) is not None:
        raise UnsupportedError(f"{checkpoint.source}: MobileQuant moves scales between heads that are alike in every "
                               "layer, and layer_shapes says they are not; take gptq or awq")
    heads = int(checkpoint.config["num_attention_heads"])
    return heads, int(checkpoint.config.get("num_key_value_heads") or heads)


def _count(checkpoint: Checkpoint, config: MobileQuant) -> int:
    return min(config.blocks or 1 << 30, len(blocks_of(checkpoint)))


class _Site(nn.Module):
    """One place of a block: passes on, notes the range, or rounds, as the mode says."""

    def __init__(self, name: str, bits: int, mode: list[str]) -> None:
        super().__init__()
        self.name, self.bits, self._mode = name, bits, mode
        self.low, self.high = math.inf, -math.inf
        self.rounding: StaticAffine | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._mode[0] == "float":
            return x
        if self._mode[0] == "watch":
            low, high = float(x.amin()), float(x.amax())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise InvalidValueError(f"the activations at {self.name} are not finite; take the source in another "
                                        "format, or leave that text out")
            self.low, self.high = min(self.low, low), max(self.high, high)
            return x
        assert self.rounding is not None
        rounded: Tensor = self.rounding(x)
        return rounded


# ---- learning -----------------------------------------------------------------------------------------------------

class _Block(nn.Module):
    """What is learned of a block, and the block's parameters as it makes them."""

    def __init__(self, state: Mapping[str, Tensor], shape: BlockShape, sites: Mapping[str, _Site], fmt: QuantFormat,
                 config: MobileQuant) -> None:
        super().__init__()
        self.state, self.shape, self.config = dict(state), shape, config
        self.formats = _formats(fmt, config)
        self.sites = nn.ModuleDict({name.replace(".", "/"): site for name, site in sites.items()})
        self.scales = nn.ParameterDict({pair: nn.Parameter(torch.ones(size)) for pair, size in shape.pairs.items()})
        self.upper, self.lower = (nn.ParameterDict({
            name.replace(".", "/"): nn.Parameter(torch.full((self._rows(name), 1), config.clip))
            for name in (*LINEARS, *NORMS)}) for _ in range(2))
        self.scales.requires_grad_(config.learn_scales)
        self.upper.requires_grad_(config.learn_clips)
        self.lower.requires_grad_(config.learn_clips)

    def _rows(self, name: str) -> int:
        return 1 if self.formats[name].granularity.kind == "tensor" else len(self.state[f"{name}.weight"])

    def folded(self) -> dict[str, Tensor]:
        """Float parameters under the learned scales: the same function."""
        return transformed(self.state, self.scales, self.shape)

    def quantised(self) -> dict[str, Tensor]:
        """Parameters under scales, clipping and rounding."""
        factors = factors_of(self.scales, self.shape)
        made = without_weights(self.state, self.scales, self.shape, factors)
        for name, change in factors.items():
            made[f"{name}.weight"] = self._clipped(name, self.state[f"{name}.weight"], change.columns, change.rows)
        for name in NORMS:
            made[f"{name}.weight"] = self._clipped(name, made[f"{name}.weight"][None])[0]
        return made

    def _clipped(self, name: str, weight: Tensor, columns: Tensor | None = None,
                 rows: Tensor | None = None) -> Tensor:
        key = name.replace(".", "/")
        return clipped_quantize(weight, self.upper[key], self.lower[key], self.formats[name], columns=columns,
                                rows=rows)

    @torch.no_grad()
    def bound_scales(self) -> None:
        for scale in self.scales.values():
            scale.copy_(torch.where(scale.abs() < _SMALLEST, torch.where(scale < 0, -_SMALLEST, _SMALLEST), scale))

    def groups(self) -> list[dict[str, Any]]:
        """Parameters with their rates, for AdamW."""
        config = self.config
        made: list[dict[str, Any]] = []
        if config.learn_scales:
            made.append({"params": list(self.scales.values()), "lr": config.scale_rate})
        if config.learn_clips:
            made.append({"params": [*self.upper.values(), *self.lower.values()], "lr": config.clip_rate})
        if config.learn_ranges:
            for site in self.sites.values():
                rounding = site.rounding  # type: ignore[union-attr]
                if isinstance(rounding, StaticAffine) and rounding.scale.requires_grad:
                    made.append({"params": [rounding.scale], "lr": config.range_rate * float(rounding.scale.detach())})
                    if isinstance(rounding.offset, nn.Parameter):
                        made.append({"params": [rounding.offset], "lr": config.range_rate * (2**rounding.bits - 1)})
        return made


def _formats(fmt: QuantFormat, config: MobileQuant) -> dict[str, QuantFormat]:
    """Of the linears as asked for, of down per channel, of norms in wide_bits."""
    made = dict.fromkeys(LINEARS, fmt)
    made["mlp.down_proj"] = replace(fmt, granularity=QuantFormat.parse("int8/axis").granularity)
    return made | dict.fromkeys(NORMS, replace(_NORM, element=int_format(config.wide_bits, signed=False)))


class Learner:
    """A model whose first blocks are quantised and learned; the steps of the method one by one.

    texts: (n, length) token ids. H and the loss are those after block `count - 1`.
    """

    def __init__(self, checkpoint: Checkpoint, texts: NDArray[Any], fmt: QuantFormat, config: MobileQuant, *,
                 progress: Progress | None = None) -> None:
        if fmt.element.kind != "int" or fmt.granularity.kind == "group" or fmt.zero == "min" or fmt.scale != FP32:
            raise InvalidValueError(f"MobileQuant rounds weights to integers per tensor or output channel, such as "
                                    f"int8/tensor/fp32/int or int4/axis/fp32/int, with fp32 scales; given {fmt}")
        self.config, self.fmt, self.count = config, fmt, _count(checkpoint, config)
        self.model = load(checkpoint)
        if config.smooth:
            self.checkpoint = smoothed(checkpoint, gather(self.model, texts, progress=progress), config)
            self.model = load(self.checkpoint)
        else:
            self.checkpoint = checkpoint
        self.model.requires_grad_(False)
        self._mode = ["float"]
        self.inputs: LayerInputs = inputs_of_layers(self.model, texts)
        heads, kv_heads = _heads(checkpoint)
        self.blocks: list[_Block] = []
        every: dict[str, Any] = {}
        for index in range(self.count):
            layer, name = self.inputs.layers[index], f"{self.inputs.path}.{index}"
            shape = BlockShape(layer, heads, kv_heads, up_down=config.up_down, grouped=config.grouped)
            sites = {port: _Site(f"{name}.{port}", bits, self._mode) for port, bits in ports(config).items()}
            every |= {site.name: site for site in sites.values()}
            self.blocks.append(_Block(dict(layer.named_parameters()), shape, sites, fmt, config))
        install(self.model, every)  # attention through ours from here on
        self.inputs = inputs_of_layers(self.model, texts)
        self._watch(progress)

    @contextmanager
    def mode(self, name: Literal["float", "watch", "round"]) -> Iterator[None]:
        """What the sites do meanwhile."""
        former, self._mode[0] = self._mode[0], name
        try:
            yield
        finally:
            self._mode[0] = former

    @torch.no_grad()
    def _watch(self, progress: Progress | None) -> None:
        """Ranges of every site on the float model, and with them its static rounding."""
        states = self.inputs.hidden
        with self.mode("watch"):
            for index in range(self.count):
                states = [self.inputs.run(index, hidden) for hidden in states]
                if progress is not None:
                    progress("ranges of activations", index + 1, self.count)
        self.targets = states
        for block in self.blocks:
            for key, site in block.sites.items():
                fixed = key == "mlp/sigmoid"
                site.rounding = StaticAffine(  # type: ignore[union-attr]
                    0.0 if fixed else site.low, 1.0 if fixed else site.high, site.bits,  # type: ignore
                    symmetric=self.config.symmetric and not fixed and not key.endswith("softmax_out"),
                    learn=self.config.learn_ranges and not fixed)

    def run(self, index: int, hidden: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """States after a block with these parameters."""
        result = functional_call(self.inputs.layers[index], dict(state), (hidden,),
                                 self.inputs.extra[hidden.shape[1]][index])
        made: Tensor = result[0] if isinstance(result, tuple) else result
        return made

    def states(self, hidden: Tensor) -> Tensor:
        """After the last quantised block, everything rounded as it is being learned."""
        with self.mode("round"):
            for index, block in enumerate(self.blocks):
                hidden = self.run(index, hidden, block.quantised())
        return hidden

    @torch.no_grad()
    def error(self) -> float:
        """mean((H_float - H_quantised)^2) over all texts."""
        with self.mode("round"):
            weights = [block.quantised() for block in self.blocks]
            total = 0.0
            for hidden, target in zip(self.inputs.hidden, self.targets, strict=True):
                for index, state in enumerate(weights):
                    hidden = self.run(index, hidden, state)
                total += float((hidden - target).square().mean())
        return total / len(self.targets)

    @torch.no_grad()
    def folding_error(self) -> float:
        """max|H - H_folded| / max|H| with nothing rounded: zero but for float32."""
        worst = 0.0
        for hidden, target in zip(self.inputs.hidden, self.targets, strict=True):
            for index, block in enumerate(self.blocks):
                hidden = self.run(index, hidden, block.folded())
            worst = max(worst, float((hidden - target).abs().max() / target.abs().max()))
        return worst

    def learn(self, *, progress: Progress | None = None, state: Path | None = None, key: str = "") -> list[float]:
        """Run all steps; the loss of each. state: a file to go on from after a kill."""
        kept = _Kept(state, key, self)
        if not any(block.groups() for block in self.blocks) or not self.config.steps:
            return []
        if self.config.level == "model":
            return self._learn(self.blocks, self.inputs.hidden, self.targets, 0, kept, progress)
        losses: list[float] = []
        quantised = exact = self.inputs.hidden
        for index, block in enumerate(self.blocks):
            with torch.no_grad():
                exact = [self.inputs.run(index, hidden) for hidden in exact]
            losses += self._learn([block], quantised, exact, index, kept, progress)
            with torch.no_grad(), self.mode("round"):
                weights = block.quantised()
                quantised = [self.run(index, hidden, weights) for hidden in quantised]
        return losses

    def _learn(self, blocks: Sequence[_Block], inputs: Sequence[Tensor], targets: Sequence[Tensor], first: int,
               kept: _Kept, progress: Progress | None) -> list[float]:
        """Steps on blocks first, first + 1, ... from their inputs to their targets."""
        steps = self.config.steps
        optimiser = torch.optim.AdamW([group for block in blocks for group in block.groups()], weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _cosine(step, steps))
        order = np.random.default_rng([self.config.seed, first])
        picks = np.concatenate([order.permutation(len(inputs)) for _ in range(-(-steps // len(inputs)))])[:steps]
        losses: list[float] = []
        for step in range(kept.start(first, optimiser, schedule), steps):
            hidden = inputs[picks[step]]
            with self.mode("round"):
                for offset, block in enumerate(blocks):
                    hidden = self.run(first + offset, hidden, block.quantised())
            loss = (hidden - targets[picks[step]]).square().mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if not math.isfinite(float(loss.detach())):
                raise InvalidValueError(f"the loss is {float(loss.detach())} at step {step}: lower the rates of "
                                        "MobileQuant, or take longer calibration texts")
            optimiser.step()
            schedule.step()
            for block in blocks:
                block.bound_scales()
            losses.append(float(loss.detach()))
            done, total = (step + 1, steps) if self.config.level == "model" else (
                first * steps + step + 1, self.count * steps)
            if progress is not None:
                progress("learning", done, total)
            if done % _SAVED_EVERY == 0 or step + 1 == steps:
                kept.save(first, step + 1, optimiser, schedule)
        return losses

    # ---- the result

    @torch.no_grad()
    def result(self) -> Checkpoint:
        """Folded and rounded: codes of the linears, float values of the norms, static activations."""
        tensors: dict[str, Stored] = {name: self.checkpoint.tensors[name] for name in self.checkpoint.tensors}
        sites: dict[str, StaticActivation] = {}
        for index, block in enumerate(self.blocks):
            prefix = f"{self.inputs.path}.{index}"
            folded, rounded = block.folded(), block.quantised()
            for name, value in folded.items():
                tensors[f"{prefix}.{name}"] = Dense(value.numpy().copy())
            for name in NORMS:
                tensors[f"{prefix}.{name}.weight"] = Dense(rounded[f"{name}.weight"].numpy().copy())
            for name in LINEARS:
                tensors[f"{prefix}.{name}.weight"] = self._codes(block, name, folded[f"{name}.weight"])
            for key, site in block.sites.items():
                item = site.rounding.activation()  # type: ignore[union-attr]
                port = key.replace("/", ".")
                readers = {f"{NORMS[0]}.output": LINEARS[:3], f"{NORMS[1]}.output": LINEARS[4:6]}.get(port)
                for name in [port] if readers is None else [f"{reader}.input" for reader in readers]:
                    sites[f"{prefix}.{name}"] = item
        step = Step("quantize", {"method": "mobilequant", "format": str(self.fmt), "settings": asdict(self.config),
                                 "sequences": len(self.targets)}, seed=self.config.seed)
        return self.checkpoint.with_tensors(
            tensors, step, quantization_config=activations_to_config(self.checkpoint.config, sites))

    @staticmethod
    def _codes(block: _Block, name: str, weight: Tensor) -> QuantizedTensor:
        """core.quantize of the clipped weight, which gives the codes that training saw."""
        key, fmt = name.replace(".", "/"), block.formats[name]
        flat = weight.reshape(1, -1) if fmt.granularity.kind == "tensor" else weight
        high = torch.sigmoid(block.upper[key]) * flat.amax(dim=1, keepdim=True)
        low = torch.sigmoid(block.lower[key]) * flat.amin(dim=1, keepdim=True)
        clipped = torch.minimum(torch.maximum(flat, low), high).reshape(weight.shape).numpy()
        codes, scales, zeros = to_codes(clipped, fmt)
        return QuantizedTensor(codes, scales, fmt, zeros=zeros if fmt.zero == "int" else None)


def _cosine(step: int, steps: int) -> float:
    """From one to a tenth."""
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))


class _Kept:
    """Learned parameters and the optimiser's state in a file, to go on from after a kill."""

    def __init__(self, path: Path | None, key: str, learner: Learner) -> None:
        self._path, self._modules = path, nn.ModuleList(learner.blocks)
        identity = [str(learner.config), str(learner.fmt), learner.checkpoint.source, key]
        self._key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._held: dict[str, Any] | None = None
        if path is not None and path.is_file():
            held = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
            if held["key"] != self._key:
                raise InvalidValueError(f"{path} is the state of another run; delete it, or choose another folder")
            self._modules.load_state_dict(held["blocks"])
            self._held = held

    def start(self, first: int, optimiser: Any, schedule: Any) -> int:
        """The step that comes next for the blocks from `first` on."""
        held = self._held
        if held is None or held["first"] < first:
            return 0
        if held["first"] == first:
            optimiser.load_state_dict(held["optimiser"])
            schedule.load_state_dict(held["schedule"])
            return int(held["step"])
        return 1 << 30  # done before

    def save(self, first: int, step: int, optimiser: Any, schedule: Any) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with write_aside(self._path) as file:
            torch.save({"key": self._key, "first": first, "step": step, "blocks": self._modules.state_dict(),
                        "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}, file)


def quantize(checkpoint: Checkpoint, token_ids: NDArray[Any], fmt: QuantFormat, config: MobileQuant = MobileQuant(), *,
             progress: Progress | None = None, state: Path | None = None) -> Checkpoint:
    """A checkpoint quantised by MobileQuant: integers per tensor or channel, and static activations in its
    configuration, which the engine runs as integers and torch rounds.

    token_ids: (n, tokens) or (tokens,), cut into sequences of config.length. state: a folder; a killed run goes on from
    there. Raises UnsupportedError for an architecture whose blocks are not of the Llama kind.
    """
    torch.manual_seed(config.seed)
    texts = _sequences(token_ids, config.length)
    learner = Learner(checkpoint, texts, fmt, config, progress=progress)
    if progress is not None:
        progress("learning", 0, config.steps)
    key = hashlib.sha256(np.ascontiguousarray(texts, np.int64).tobytes()).hexdigest()
    learner.learn(progress=progress, state=None if state is None else state / "mobilequant.pt", key=key)
    return learner.result()


def _sequences(ids: NDArray[Any], length: int) -> NDArray[Any]:
    """(n, length): rows cut as often as they hold a whole sequence."""
    rows = np.atleast_2d(np.asarray(ids))
    length = min(length, rows.shape[1])
    if length < 2:
        raise InvalidValueError(f"the calibration text has {rows.shape[1]} tokens; at least two are needed")
    count = rows.shape[1] // length
    return rows[:, :count * length].reshape(-1, length)
