"""ZeroQAT: quantisation-aware training by forward passes alone.

"End-to-End On-Device Quantization-Aware Training for LLMs at Inference Cost", arXiv:2509.00031, and the repository
Skilteee/ZeroQAT for what it leaves open.

    W^ = quantise(clip(s W)),  x^ = per-token quantise(x / s),  probabilities 16 bits:   L = loss of the model of W^, x^
    W <- W - lr g u,  g the slope of L along noise u on the float W (train/zeroth_order.py)

Smoothing (equation 4): Y = X W + b = [(X - d) / s] [s W] + [b + d W]; for norm -> q, k, v, norm -> gate, up and v -> o,
folded at use. Llama has d = 0 (`shifted` is the transformation with both). s starts at act^a / wmax^(1 - a), a rising
with act / wmax over `qkv_alpha` and `up_alpha`; v -> o starts at 1. Clipping (equation 5): sigmoid(u) max, sigmoid(l)
min of each channel or group, u = l = `clip`.

`start` "search" chooses a and the clip on a small grid by each linear's own output error, forward only; "reconstruct"
lets AdamW fit s and the clip to each block's float output, the authors' way, which needs gradients in one block;
"as defined" leaves both. `trained`: "all" linears; "q v", the light variant, with everything else packed in its bits;
"q". `train_quantisers` perturbs log s and the clips as well, by factors of their own.

Differs from the paper: q and k have no scale of their own between them, and v -> o has one only where there are as
many value heads as query heads (grouped queries otherwise).
`as_if` "after" perturbs the quantised weights instead (an ablation): the quantiser is then not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from edgewise import __version__
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import InvalidValueError, UnsupportedError, notice
from edgewise.core.numbers import QuantFormat
from edgewise.core.numbers import quantize as to_codes
from edgewise.core.storage import Dense, QuantizedTensor, Stored
from edgewise.formats.quantized_folder import pack_bits, unpack_bits
from edgewise.models.loader import load
from edgewise.models.static import install, layers_of
from edgewise.train.fake_quant import LearnedClip, fake_quantize, per_token
from edgewise.train.kept import Kept
from edgewise.train.small_llama import batches
from edgewise.train.zeroth_order import Moved, ZerothOrder, step

__all__ = ["Prepared", "ZeroQat", "language_loss", "prepare", "quantize", "shifted", "train"]

Progress = Callable[[str, int, int], None]
Loss = Callable[[nn.Module], float]
_LINEARS = tuple(f"self_attn.{part}_proj" for part in "qkvo") + tuple(f"mlp.{part}_proj" for part in ("gate", "up",
                                                                                                     "down"))
_PAIRS = {"qkv": ("input_layernorm", _LINEARS[:3]), "up": ("post_attention_layernorm", _LINEARS[4:6])}
_TRAINED = {"all": _LINEARS, "q v": ("self_attn.q_proj", "self_attn.v_proj"), "q": ("self_attn.q_proj",)}
_STATISTICS_TOKENS = 512


@dataclass(frozen=True)
class ZeroQat:
    """Defaults of the authors' fine-tuning, but for steps, batch and length, which are for a small machine."""

    activation_bits: int = 8
    trained: Literal["all", "q v", "q"] = "all"
    smooth: bool = True
    qkv_alpha: tuple[float, float] = (0.5, 0.7)
    up_alpha: tuple[float, float] = (0.65, 0.8)
    clip: float = 3.0
    start: Literal["search", "reconstruct", "as defined"] = "search"
    train_quantisers: bool = False
    quantiser_epsilon: float = 10.0   # times epsilon: the authors perturb the exponent by 0.01
    quantiser_rate: float = 1000.0    # times the rate: theirs is 1e-3
    as_if: Literal["before", "after"] = "before"
    update: ZerothOrder = field(default_factory=ZerothOrder)
    steps: int = 300
    batch: int = 4
    length: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trained not in _TRAINED or not 2 <= self.activation_bits <= 16 or self.steps < 0:
            raise InvalidValueError(f"trained is one of {', '.join(_TRAINED)}, activations have 2 to 16 bits, steps "
                                    f"are not negative; given {self}")


def shifted(gain: Tensor, bias: Tensor, weight: Tensor, out_bias: Tensor, s: Tensor,
            d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equation 4 on a norm with bias and one of its readers: gain / s, (bias - d) / s, weight * s, out_bias + W d.

    gain, bias, s, d: (in,); weight: (out, in); out_bias: (out,).
    """
    return gain / s, (bias - d) / s, weight * s, out_bias + weight @ d


# ---- the model ----------------------------------------------------------------------------------------------------

class _Linear(nn.Module):
    """A linear that is quantised when it is used: only one quantised weight is there at a time.

    weight: the float master, or None once it is packed. columns, rows: log scales that multiply and divide it.
    """

    def __init__(self, linear: nn.Linear, fmt: QuantFormat, clip: float) -> None:
        super().__init__()
        self.shape = (linear.out_features, linear.in_features)
        self.weight: Tensor | None = linear.weight.detach().clone()
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.fmt = fmt
        self.noise: Tensor | None = None
        self.clip = LearnedClip(self.shape, fmt, clip).requires_grad_(False)
        self.columns: Tensor | None = None
        self.rows: Tensor | None = None
        self._packed: tuple[Any, ...] = ()

    def master(self) -> Tensor:
        """The float weight under its scales, (out, in)."""
        assert self.weight is not None
        made = self.weight
        if self.columns is not None:
            made = made * self.columns.exp()
        if self.rows is not None:
            made = made / self.rows.exp()[:, None]
        return made

    def stored(self) -> QuantizedTensor:
        """As a folder keeps it: the clipped weight in its format."""
        if self.weight is None:
            codes, scales, zeros, minima, signed = self._packed
            unpacked = unpack_bits(codes, self.shape[1], self.fmt.element.bits, signed=signed)
            return QuantizedTensor(unpacked, scales, self.fmt, zeros=zeros, minima=minima)
        clipped = self.clip.clip(self.master()).detach().numpy()
        codes, scales, zero = to_codes(np.ascontiguousarray(clipped), self.fmt)
        return QuantizedTensor(codes, scales, self.fmt, zeros=zero if self.fmt.zero == "int" else None,
                               minima=zero if self.fmt.zero == "min" else None)

    def pack(self) -> None:
        """Give up the float weight for packed codes."""
        tensor = self.stored()
        bits, signed = self.fmt.element.bits, self.fmt.element.signed
        self._packed = (pack_bits(tensor.codes, bits), tensor.scales, tensor.zeros, tensor.minima, signed)
        self.weight = None

    @property
    def packed_nbytes(self) -> int:
        return sum(part.nbytes for part in self._packed if isinstance(part, np.ndarray))

    def quantised(self) -> Tensor:
        """(out, in), made anew."""
        if self.weight is None:
            return torch.from_numpy(self.stored().dense())
        made = fake_quantize(self.clip.clip(self.master()), self.fmt)
        return made if self.noise is None else made + self.noise

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantised(), self.bias)


class Prepared:
    """A model under its quantisers. net: the transformers module, which runs quantised."""

    def __init__(self, net: nn.Module, config: ZeroQat, fmt: QuantFormat) -> None:
        self.net, self.config, self.fmt = net, config, fmt
        path, layers = layers_of(net)
        self.layers: list[dict[str, _Linear]] = []
        self.scales: list[dict[str, Tensor]] = []
        sites: dict[str, Callable[[Tensor], Tensor]] = {}
        for index, layer in enumerate(layers):
            linears: dict[str, _Linear] = {}
            for name in _LINEARS:
                owner, _, leaf = name.rpartition(".")
                linear = layer.get_submodule(name)
                made = _Linear(linear, fmt, config.clip)  # type: ignore[arg-type]
                setattr(layer.get_submodule(owner), leaf, made)
                linears[name] = made
                sites[f"{path}.{index}.{name}.input"] = lambda x: per_token(x, config.activation_bits)
            sites[f"{path}.{index}.self_attn.softmax_out"] = lambda p: per_token(p, 16)
            self.layers.append(linears)
            self.scales.append({})
        self._install(net, path, sites)

    def _install(self, net: nn.Module, path: str, sites: dict[str, Callable[[Tensor], Tensor]]) -> None:
        # A norm is divided before its readers round what it gives.
        for index, scales in enumerate(self.scales):
            for pair, (norm, _) in _PAIRS.items():
                sites[f"{path}.{index}.{norm}.output"] = lambda x, scales=scales, pair=pair: (  # type: ignore[misc]
                    x / scales[pair].exp() if pair in scales else x)
        install(net, sites)

    def set_scale(self, index: int, pair: str, log_scale: Tensor) -> None:
        """The pair's factor, log s; its linears multiply and divide by it from now on."""
        linears = self.layers[index]
        self.scales[index][pair] = log_scale
        if pair == "out":
            linears["self_attn.v_proj"].rows = log_scale
            linears["self_attn.o_proj"].columns = log_scale
        else:
            for name in _PAIRS[pair][1]:
                linears[name].columns = log_scale

    def moved(self) -> list[Moved]:
        """What a step perturbs."""
        config = self.config
        names = _TRAINED[config.trained]
        weights = {f"{index:04}.{name}": linear.weight for index, linears in enumerate(self.layers)
                   for name, linear in linears.items() if name in names and linear.weight is not None}
        groups = [Moved(weights)]
        if config.train_quantisers:
            free = {id(linear): linear for linears in self.layers for linear in linears.values()
                    if linear.weight is not None}
            own: dict[str, Tensor] = {}
            for index, linears in enumerate(self.layers):
                for name, linear in linears.items():
                    if id(linear) in free:
                        own[f"{index:04}.{name}.upper"] = linear.clip.upper.data
                        own[f"{index:04}.{name}.lower"] = linear.clip.lower.data
                if config.trained == "all":  # the readers of a packed pair cannot follow its scale
                    own |= {f"{index:04}.{pair}": scale for pair, scale in self.scales[index].items()}
            groups.append(Moved(own, config.quantiser_epsilon, config.quantiser_rate))
        return groups

    def pack(self) -> None:
        """Everything that is not trained, in its bits."""
        for linears in self.layers:
            for name, linear in linears.items():
                if name not in _TRAINED[self.config.trained]:
                    linear.pack()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value for group in self.moved() for name, value in group.parameters.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.state_dict().items():
                value.copy_(state[name])

    def checkpoint(self, source: Checkpoint) -> Checkpoint:
        """The result: linears in their format, scales folded into norms."""
        tensors: dict[str, Stored] = dict(source.tensors.items())
        for index, linears in enumerate(self.layers):
            prefix = f"model.layers.{index}"
            for name, linear in linears.items():
                tensors[f"{prefix}.{name}.weight"] = linear.stored()
            for pair, (norm, _) in _PAIRS.items():
                if pair in self.scales[index]:
                    gain = source.tensors[f"{prefix}.{norm}.weight"].dense()
                    folded = gain / self.scales[index][pair].exp().numpy()
                    tensors[f"{prefix}.{norm}.weight"] = Dense(folded.astype(np.float32))
        plain = {key: value for key, value in asdict(self.config).items() if key != "update"}
        return source.with_tensors(tensors, Step("zeroqat", {**plain, **asdict(self.config.update)}, __version__,
                                                 self.config.seed))


# ---- the start ----------------------------------------------------------------------------------------------------

def prepare(checkpoint: Checkpoint, token_ids: NDArray[np.int64], fmt: QuantFormat, config: ZeroQat) -> Prepared:
    """A checkpoint under its quantisers, as training begins. token_ids: (n,), to calibrate on."""
    if checkpoint.arch != "llama" or checkpoint.config.get("attention_bias"):
        raise UnsupportedError(f"{checkpoint.source}: ZeroQAT here trains models of the Llama family without biases; "
                               f"given {checkpoint.arch}; take --method gptq")
    if fmt.element.kind != "int" or not isinstance(fmt.scale, type(fmt.element)):
        raise InvalidValueError(f"ZeroQAT quantises weights to integers; given {fmt}")
    net = load(checkpoint).requires_grad_(False)
    made = Prepared(net, config, fmt)
    ids = torch.from_numpy(np.asarray(token_ids, np.int64).reshape(-1)[:_STATISTICS_TOKENS])
    with torch.no_grad():
        inputs = _inputs(made, ids[None])
        for index, linears in enumerate(made.layers):
            if config.smooth:
                for pair, (_, names) in _PAIRS.items():
                    alphas = config.qkv_alpha if pair == "qkv" else config.up_alpha
                    weights = [linears[name].master() for name in names]
                    x = inputs[index][names[0]]
                    made.set_scale(index, pair, _started(x, weights, alphas, fmt, config))
                values = linears["self_attn.v_proj"].shape[0]
                if values == linears["self_attn.o_proj"].shape[1]:  # as many value heads as query heads
                    made.set_scale(index, "out", torch.zeros(values))
            if config.start == "search":
                for name, linear in linears.items():
                    _search_clip(linear, inputs[index][name], config)
    if config.start == "reconstruct":
        _reconstruct(made, checkpoint, ids[None])
    if config.trained != "all":
        made.pack()
    return made


def _inputs(made: Prepared, ids: Tensor) -> list[dict[str, Tensor]]:
    """What each linear reads, (tokens, in), in the quantised model as it starts; before its scale is applied."""
    found: list[dict[str, Tensor]] = [{} for _ in made.layers]
    hooks = [linear.register_forward_pre_hook(
        lambda module, args, index=index, name=name: found[index].__setitem__(  # type: ignore[misc]
            name, args[0].reshape(-1, args[0].shape[-1]).clone()), prepend=True)
        for index, linears in enumerate(made.layers) for name, linear in linears.items()]
    made.net(ids)
    for hook in hooks:
        hook.remove()
    return found


def _started(x: Tensor, weights: list[Tensor], alphas: tuple[float, float], fmt: QuantFormat,
             config: ZeroQat) -> Tensor:
    """log s of a pair: act^a / wmax^(1 - a) with a by channel; "search" takes the alphas, or one of a grid."""
    act = x.abs().amax(dim=0).clamp(min=1e-5)
    wmax = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0).clamp(min=1e-5)
    ratio = act / wmax
    place = ((ratio - ratio.min()) / (ratio.max() - ratio.min()).clamp(min=1e-12))
    rising = alphas[0] + (alphas[1] - alphas[0]) * place
    candidates = [rising]
    if config.start == "search":
        candidates += [torch.full_like(act, alpha) for alpha in (0.0, 0.25, 0.5, 0.75)]
    best, least = rising, math.inf
    for alpha in candidates:
        s = _normed(act**alpha / wmax**(1 - alpha)) if float(alpha.max()) > 0 else torch.ones_like(act)
        error = sum(float((F.linear(per_token(x / s, config.activation_bits), fake_quantize(weight * s, fmt))
                           - F.linear(x, weight)).square().mean()) for weight in weights)
        if error < least or len(candidates) == 1:
            best, least = s, error
    return best.log()


def _normed(s: Tensor) -> Tensor:
    """Of geometric mean 1: what all channels share changes nothing."""
    return (s.log() - s.log().mean()).exp().clamp(1e-4, 1e4)


def _search_clip(linear: _Linear, x: Tensor, config: ZeroQat) -> None:
    """The clip, one for all groups, with the least error of the output; forward only."""
    exact_weight = linear.master()
    scaled = x if linear.columns is None else x / linear.columns.exp()
    exact = F.linear(scaled, exact_weight)
    seen = per_token(scaled, config.activation_bits)
    best, least = config.clip, math.inf
    for share in (1.0, 0.95, 0.9, 0.8, 0.7, 0.6):
        value = config.clip if share == 0.95 else math.log(share / (1 - share)) if share < 1 else 20.0
        linear.clip.upper.data.fill_(value)
        linear.clip.lower.data.fill_(value)
        error = float((F.linear(seen, linear.quantised()) - exact).square().mean())
        if error < least:
            best, least = value, error
    linear.clip.upper.data.fill_(best)
    linear.clip.lower.data.fill_(best)


def _reconstruct(made: Prepared, checkpoint: Checkpoint, ids: Tensor, steps: int = 30, scale_rate: float = 1e-2,
                 clip_rate: float = 5e-3) -> None:
    """Each block's scales and clips by AdamW to its float output on the quantised prefix (OmniQuant's stage)."""
    exact_net = load(checkpoint).requires_grad_(False)
    _, exact_layers = layers_of(exact_net)
    _, layers = layers_of(made.net)
    for index, linears in enumerate(made.layers):
        inputs = _block_inputs(made.net, layers[index], ids)
        with torch.no_grad():
            exact = _block(exact_layers[index], inputs)
        scales = [scale.requires_grad_() for scale in made.scales[index].values()]
        clips = [part.requires_grad_() for linear in linears.values() for part in (linear.clip.upper,
                                                                                  linear.clip.lower)]
        optimiser = torch.optim.AdamW([{"params": scales, "lr": scale_rate}, {"params": clips, "lr": clip_rate}],
                                      weight_decay=0.0) if scales else torch.optim.AdamW(clips, lr=clip_rate,
                                                                                        weight_decay=0.0)
        for _ in range(steps):
            with torch.enable_grad():
                error = (_block(layers[index], inputs) - exact).square().mean()
                optimiser.zero_grad()
                error.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        for parameter in (*scales, *clips):
            parameter.requires_grad_(False)


def _block_inputs(net: nn.Module, layer: nn.Module, ids: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(module: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> None:
        seen.append((args, words))

    hook = layer.register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        net(ids, use_cache=False)
    hook.remove()
    return seen[0]


def _block(layer: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    result = layer(*inputs[0], **inputs[1])
    made: Tensor = result[0] if isinstance(result, tuple) else result
    return made


# ---- training -----------------------------------------------------------------------------------------------------

def language_loss(ids: Tensor) -> Loss:
    """Mean cross entropy of the next token on a batch, (batch, tokens)."""
    def loss(net: nn.Module) -> float:
        logits = net(ids, use_cache=False).logits
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    return loss


def train(made: Prepared, losses: Iterator[Loss], *, progress: Progress | None = None,
          state: Path | None = None) -> Prepared:
    """config.steps of zeroth order, in place. losses: one for each step, of its batch."""
    config = made.config
    settings = {"method": "zeroqat", "format": str(made.fmt), **asdict(config)}
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    kept = Kept(state, settings, [made])
    begun = kept.load()
    groups = made.moved()
    for index in range(config.steps):
        loss = next(losses)
        if index < begun:
            continue
        seed = (config.seed * 1_000_003 + index) * config.update.directions
        with torch.no_grad():
            if config.as_if == "before":
                seen = step(groups, lambda loss=loss: loss(made.net), config.update, seed)  # type: ignore[misc]
            else:
                seen = _step_after(made, loss, seed)
        kept.save(index + 1, last=index + 1 == config.steps)
        if progress is not None:
            progress(f"ZeroQAT, loss {seen:.3f}", index + 1, config.steps)
    return made


def _step_after(made: Prepared, loss: Loss, seed: int) -> float:
    """As step, with the noise on the quantised weights: what the quantiser does to a perturbation is not seen."""
    update = made.config.update
    linears = {f"{index:04}.{name}": linear for index, group in enumerate(made.layers)
               for name, linear in group.items() if name in _TRAINED[made.config.trained]}
    found = []
    for sign in (1.0, -1.0):
        generator = torch.Generator().manual_seed(seed)
        for name in sorted(linears):
            linears[name].noise = sign * update.epsilon * torch.randn(linears[name].shape, generator=generator)
        found.append(loss(made.net))
    for linear in linears.values():
        linear.noise = None
    half = (found[0] - found[1]) / 2
    limit = update.clip or math.inf
    slope = min(max(half, -limit), limit) / update.epsilon
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(linears):
        weight = linears[name].weight
        assert weight is not None
        weight.add_(torch.randn(weight.shape, generator=generator), alpha=-update.learning_rate * slope)
    return sum(found) / 2


def quantize(checkpoint: Checkpoint, token_ids: NDArray[np.int64], fmt: QuantFormat, config: ZeroQat = ZeroQat(), *,
             progress: Progress | None = None, state: Path | None = None) -> Checkpoint:
    """Recovery as a language model: train on random excerpts of the ids, and give the quantised checkpoint."""
    ids = np.asarray(token_ids, np.int64).reshape(-1)
    if config.activation_bits != 8:
        notice("info", f"trained for inputs of {config.activation_bits} bits; the engine rounds them to 8",
               where="zeroqat")
    made = prepare(checkpoint, ids, fmt, config)
    parts = batches(ids, config.batch, config.length, config.seed)
    train(made, (language_loss(part) for part in parts), progress=progress, state=state)
    return made.checkpoint(checkpoint)
