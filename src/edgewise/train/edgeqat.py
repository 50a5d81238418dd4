"""EdgeQAT: training with one scale per tensor, guided by the entropy of queries and keys and by the attention map.

Shen et al., "EdgeQAT: Entropy and Distribution Guided Quantization-Aware Training for the Acceleration of Lightweight
LLMs on the Edge", arXiv:2402.10787 (later "Squat"), and the repository shawnricecake/EdgeQAT.

    weights      LSQ, activations LSQ+, one step per tensor; softmax probabilities 8 bits, unsigned
    S, T         scores q k^T / sqrt(d) of the student and of its float copy, before the mask, (heads, tokens, tokens)
    L_D          -log C,  C = sum over batch, layers and heads of cos(S, T)
    L_E          -log V,  V = sum over layers of sum log(1 + var q) + sum log(1 + var k), var over a head's dimensions
                 (form "paper": V = sum over layers and heads of log(1 + var(q) var(k)), var over all of a head)
    loss         alpha CE + (1 - alpha) tau^2 KL(softmax(z_t / tau) || softmax(z_s / tau)) + r_D L_D + r_E L_E
    bits         score_t = sum over heads of the mean over the batch of S[t, 0]: how much token t looks at the first.
                 The lowest share of the tokens gets `low_bits`, the others `high_bits`: for the value, the input and
                 the hidden state of the feed-forward of this layer, and the next layer's input, query and key

Differs from the paper: L_D has a minus sign, which is what aligns the two (paper and code print +log C, which a
minimiser drives apart). The teacher of the distillation is the float student alone, not two larger models beside it.
Distillation is averaged over positions. The sums over batch and tokens stay inside the logarithms, as in the code.
The routed set is that of the batch, as in the code. In a folder all tokens take `high_bits` and attention runs in
floats, which is said: its scores have no grid, without which the engine has no integer attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from edgewise import __version__
from edgewise.core.activation import StaticActivation, activations_to_config
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import InvalidValueError, UnsupportedError, notice
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import Dense, QuantizedTensor, Stored
from edgewise.train.fake_quant import Lsq, LsqPlus
from edgewise.train.kept import Kept
from edgewise.train.small_llama import batches, llama_of

__all__ = ["EdgeQat", "Guide", "QuantisedLlama", "distribution_loss", "entropy_loss", "least_important", "quantize",
           "train_edgeqat"]

Progress = Callable[[str, int, int], None]
_FLOOR = 1e-6
"""Of what a logarithm is taken."""
_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
            "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class EdgeQat:
    """Defaults of the repository's Llama-58M, but for steps, batch and length, which are for a small machine.

    distribution, entropy: r_D and r_E; 0 switches a term off. low_share: rho, 0 keeps every token at high_bits.
    selection "random" routes as many tokens by chance (the ablation).
    """

    weight_bits: int = 4
    high_bits: int = 8
    low_bits: int = 4
    low_share: float = 0.5
    selection: Literal["first token", "random"] = "first token"
    distribution: float = 1.0
    entropy: float = 0.5
    entropy_form: Literal["code", "paper"] = "code"
    temperature: float = 2.0
    alpha: float = 0.5
    learning_rate: float = 2.5e-4
    weight_decay: float = 0.1
    warmup: int = 20
    steps: int = 200
    batch: int = 8
    length: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.low_share <= 1 and 0 <= self.alpha <= 1 and self.temperature > 0 and self.steps >= 0
                and all(2 <= bits <= 8 for bits in (self.weight_bits, self.high_bits, self.low_bits))):
            raise InvalidValueError("EdgeQAT takes 2 to 8 bits, shares and alpha from 0 to 1 and a positive "
                                    f"temperature; given {self}")


# ---- losses -------------------------------------------------------------------------------------------------------

def distribution_loss(student: list[Tensor], teacher: list[Tensor]) -> tuple[Tensor, float]:
    """-log C, and the mean cosine. Scores by layer, (batch, heads, tokens, tokens)."""
    cosines = torch.stack([F.cosine_similarity(s.flatten(2), t.flatten(2), dim=-1) for s, t in
                           zip(student, teacher, strict=True)])
    return -torch.log(cosines.sum().clamp(min=_FLOOR)), float(cosines.detach().mean())


def entropy_loss(queries: list[Tensor], keys: list[Tensor], form: Literal["code", "paper"] = "code") -> Tensor:
    """-log V. Quantised queries and keys by layer, (batch, heads, tokens, head dimension)."""
    total = queries[0].new_zeros(())
    for q, k in zip(queries, keys, strict=True):
        if form == "code":
            total = total + torch.log1p(q.var(dim=-1)).sum() + torch.log1p(k.var(dim=-1)).sum()
        else:
            spread = [x.transpose(0, 1).flatten(1).var(dim=-1) for x in (q, k)]
            share = len(spread[0]) // len(spread[1])  # grouped queries: each key serves several heads
            total = total + torch.log1p(spread[0] * spread[1].repeat_interleave(share)).sum()
    return -torch.log(total.clamp(min=_FLOOR))


def least_important(scores: Tensor, share: float) -> Tensor:
    """scores (batch, heads, tokens, tokens) before the mask -> places of the share that looks least at token 0."""
    looks = scores.detach()[:, :, :, 0].mean(dim=0).sum(dim=0)
    return torch.topk(looks, round(share * len(looks)), largest=False).indices.sort().values


# ---- the model ----------------------------------------------------------------------------------------------------

class _TwoWidths(nn.Module):
    """One site: a quantiser for the tokens that matter and one for the others. x: (..., tokens, features)."""

    def __init__(self, config: EdgeQat) -> None:
        super().__init__()
        self.high, self.low = LsqPlus(config.high_bits), LsqPlus(config.low_bits)

    def forward(self, x: Tensor, low: Tensor | None) -> Tensor:
        if low is None or len(low) == 0:
            return self.high(x)  # type: ignore[no-any-return]
        if len(low) == x.shape[-2]:
            return self.low(x)  # type: ignore[no-any-return]
        keep = torch.ones(x.shape[-2], dtype=torch.bool)
        keep[low] = False
        high = torch.nonzero(keep)[:, 0]
        parts = torch.cat([self.high(x.index_select(-2, high)), self.low(x.index_select(-2, low))], dim=-2)
        return parts.index_select(-2, torch.argsort(torch.cat([high, low])))


class _Layer(nn.Module):
    """The quantisers of one decoder layer."""

    def __init__(self, config: EdgeQat) -> None:
        super().__init__()
        self.weights = nn.ModuleDict({name.replace(".", "_"): Lsq(config.weight_bits) for name in _LINEARS})
        self.sites = nn.ModuleDict({name: _TwoWidths(config) for name in ("input", "query", "key", "value", "mlp_input",
                                                                         "hidden")})
        self.probabilities = LsqPlus(8)


@dataclass(eq=False)
class Guide:
    """What the losses look at: by layer, scores before the mask, queries and keys, and attention on token 0."""

    scores: list[Tensor]
    queries: list[Tensor]
    keys: list[Tensor]
    first: list[Tensor]


class QuantisedLlama(nn.Module):
    """A Llama whose linears, attention and feed-forward pass the quantisers; with config None, the float model.

    The transformers model given is used in place: its parameters are those that are trained.
    """

    def __init__(self, model: Any, config: EdgeQat | None) -> None:
        super().__init__()
        self.float_model, self.config = model, config
        self.layers = nn.ModuleList(_Layer(config) for _ in model.model.layers) if config else None
        self.chance = torch.Generator().manual_seed(config.seed if config else 0)

    def forward(self, ids: Tensor) -> tuple[Tensor, Guide]:
        """ids: (batch, tokens) -> logits (batch, tokens, vocab), and the guide."""
        body, guide = self.float_model.model, Guide([], [], [], [])
        x = body.embed_tokens(ids)
        turn = body.rotary_emb(x, torch.arange(ids.shape[1])[None])
        low: Tensor | None = None
        for index, block in enumerate(body.layers):
            x, low = self._block(block, self.layers[index] if self.layers is not None else None, x, turn, low, guide)
        return self.float_model.lm_head(body.norm(x)), guide

    def _block(self, block: Any, quantisers: Any, x: Tensor, turn: tuple[Tensor, Tensor], before: Tensor | None,
               guide: Guide) -> tuple[Tensor, Tensor | None]:
        """before: the tokens that the layer below found unimportant."""
        def linear(name: str, inputs: Tensor) -> Tensor:
            module = block.get_submodule(name)
            weight = module.weight if quantisers is None else quantisers.weights[name.replace(".", "_")](module.weight)
            return F.linear(inputs, weight, module.bias)

        def site(name: str, inputs: Tensor, low: Tensor | None) -> Tensor:
            return inputs if quantisers is None else quantisers.sites[name](inputs, low)

        def heads(inputs: Tensor) -> Tensor:
            return inputs.unflatten(-1, (-1, block.self_attn.head_dim)).transpose(1, 2)

        h = site("input", block.input_layernorm(x), before)
        q = site("query", _rotated(heads(linear("self_attn.q_proj", h)), turn), before)
        k = site("key", _rotated(heads(linear("self_attn.k_proj", h)), turn), before)
        share = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(share, dim=1).transpose(-1, -2) / math.sqrt(q.shape[-1])
        low = self._low(scores)
        v = site("value", heads(linear("self_attn.v_proj", h)), low)
        hidden_from = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        p = torch.softmax(scores.masked_fill(hidden_from, -math.inf), dim=-1)
        if quantisers is not None:
            p = quantisers.probabilities(p)
        x = x + linear("self_attn.o_proj", (p @ v.repeat_interleave(share, dim=1)).transpose(1, 2).flatten(2))
        h = site("mlp_input", block.post_attention_layernorm(x), low)
        h = block.mlp.act_fn(linear("mlp.gate_proj", h)) * linear("mlp.up_proj", h)
        x = x + linear("mlp.down_proj", site("hidden", h, low))
        guide.scores.append(scores)
        guide.queries.append(q)
        guide.keys.append(k)
        guide.first.append(p.detach()[..., 0].mean())
        return x, low

    def _low(self, scores: Tensor) -> Tensor | None:
        if self.config is None or self.config.low_share == 0:
            return None
        if self.config.selection == "first token":
            return least_important(scores, self.config.low_share)
        tokens = scores.shape[-1]
        return torch.randperm(tokens, generator=self.chance)[:round(self.config.low_share * tokens)].sort().values


def _rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding, halves of a head turned against each other. x: (batch, heads, tokens, head dimension)."""
    cos, sin = (part[:, None] for part in turn)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# ---- training -----------------------------------------------------------------------------------------------------

def train_edgeqat(checkpoint: Checkpoint, token_ids: NDArray[np.int64], config: EdgeQat = EdgeQat(), *,
                  progress: Progress | None = None, state: Path | None = None) -> QuantisedLlama:
    """Train a dense Llama checkpoint under its quantisers. token_ids: (n,). state: where to go on after a kill."""
    if checkpoint.arch != "llama" or checkpoint.config.get("attention_bias"):
        raise UnsupportedError(f"{checkpoint.source}: EdgeQAT trains models of the Llama family without biases; given "
                               f"{checkpoint.arch}; choose --method gptq for others")
    teacher = QuantisedLlama(llama_of(checkpoint).requires_grad_(False), None)
    student = QuantisedLlama(llama_of(checkpoint), config)
    source = batches(token_ids, config.batch, config.length, config.seed)
    optimiser = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(
        (step + 1) / max(config.warmup, 1), 0.5 + 0.5 * math.cos(math.pi * step / max(config.steps, 1))))
    kept = Kept(state, {"method": "edgeqat", **asdict(config)}, [student, optimiser, schedule])
    begun = kept.load()
    for step in range(config.steps):
        part = next(source)
        if step < begun:
            continue
        loss, told = edgeqat_loss(student, teacher, part, config)
        if not math.isfinite(loss.item()):
            raise InvalidValueError(f"the loss of step {step} is {loss.item()}; lower the learning rate, which is "
                                    f"{config.learning_rate:g}")
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        kept.save(step + 1, last=step + 1 == config.steps)
        if progress is not None:
            progress(f"EdgeQAT, loss {told:.3f}", step + 1, config.steps)
    return student.eval()


def edgeqat_loss(student: QuantisedLlama, teacher: QuantisedLlama, ids: Tensor,
                 config: EdgeQat) -> tuple[Tensor, float]:
    """The loss of one batch (batch, tokens), and its cross entropy, for people."""
    logits, guide = student(ids)
    with torch.no_grad():
        exact, exact_guide = teacher(ids)
    language = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    tau = config.temperature
    distilled = tau**2 * F.kl_div(F.log_softmax(logits.flatten(0, 1) / tau, dim=-1),
                                  F.softmax(exact.flatten(0, 1) / tau, dim=-1), reduction="batchmean")
    loss = config.alpha * language + (1 - config.alpha) * distilled
    if config.distribution:
        loss = loss + config.distribution * distribution_loss(guide.scores, exact_guide.scores)[0]
    if config.entropy:
        loss = loss + config.entropy * entropy_loss(guide.queries, guide.keys, config.entropy_form)
    return loss, language.item()


# ---- the result ---------------------------------------------------------------------------------------------------

def quantize(checkpoint: Checkpoint, token_ids: NDArray[np.int64], fmt: QuantFormat | None = None,
             config: EdgeQat = EdgeQat(), *, progress: Progress | None = None, state: Path | None = None) -> Checkpoint:
    """Train, and give the checkpoint whose linears are integers with one scale each and whose inputs are static.

    fmt: None, or the format that the method makes: config.weight_bits with one fp32 scale per tensor.
    """
    made = f"int{config.weight_bits}/tensor/fp32"
    if fmt is not None and str(fmt) != made:
        raise InvalidValueError(f"EdgeQAT makes {made}, one learned scale for a tensor; given {fmt}")
    student = train_edgeqat(checkpoint, token_ids, config, progress=progress, state=state)
    notice("info", "in the folder attention runs in floats; linears run on integers", where="edgeqat")
    if config.low_share:
        notice("info", f"in the folder every token has {config.high_bits} bits; the {config.low_bits}-bit tokens are "
               "chosen while attention runs, and no kernel does that yet", where="edgeqat")
    return exported(student, checkpoint, config)


def exported(student: QuantisedLlama, checkpoint: Checkpoint, config: EdgeQat) -> Checkpoint:
    """The trained student as a checkpoint."""
    fmt = QuantFormat.parse(f"int{config.weight_bits}/tensor/fp32")
    tensors: dict[str, Stored] = {}
    state = student.float_model.state_dict()
    sites: dict[str, StaticActivation] = {}
    assert student.layers is not None
    for name, stored in checkpoint.tensors.items():
        value = state[name].detach()
        tensors[name] = stored if np.array_equal(value.numpy(), stored.dense()) else _dense(value)
    for index, layer in enumerate(student.layers):
        prefix = f"model.layers.{index}"
        for name in _LINEARS:
            quantiser = layer.weights[name.replace(".", "_")]
            low, high = quantiser.element.code_range
            step = quantiser.step.detach().clamp(min=1e-8)
            codes = (state[f"{prefix}.{name}.weight"].detach() / step).clamp(low, high).round().to(torch.int8).numpy()
            tensors[f"{prefix}.{name}.weight"] = QuantizedTensor(
                codes, np.full((1, 1), step.item(), np.float32), fmt)
        sites |= _sites(layer, prefix)
    step_record = Step("edgeqat", asdict(config), __version__, config.seed)
    return checkpoint.with_tensors(tensors, step_record,
                                   quantization_config=activations_to_config(checkpoint.config, sites))


def _sites(layer: Any, prefix: str) -> dict[str, StaticActivation]:
    """The learned ranges of linears' inputs by site, as the engine runs them; see core.activation.

    Those inside attention are left out: the engine makes attention of integers where scores have a grid too, and
    EdgeQAT leaves scores as they are.
    """
    places = {"input": [f"self_attn.{part}_proj.input" for part in "qkv"],
              "mlp_input": ["mlp.gate_proj.input", "mlp.up_proj.input"], "hidden": ["mlp.down_proj.input"]}
    return {f"{prefix}.{place}": _static(layer.sites[name].high) for name, names in places.items() for place in names
            if layer.sites[name].high.initialised}


def _static(quantiser: LsqPlus) -> StaticActivation:
    """(round(clamp(x / a + z, Qn, Qp)) - z) a  as codes from 0: the zero point is z - Qn."""
    low, high = quantiser.element.code_range
    zero = round(quantiser.zero.item()) - low
    inside = min(max(zero, 0), high - low)
    if inside != zero:
        notice("clamp", f"a learned zero point of {zero} is outside the codes and becomes {inside}", where="edgeqat")
    return StaticActivation(quantiser.bits, float(np.float32(max(quantiser.step.item(), 1e-8))), inside)


def _dense(value: Tensor) -> Stored:

    return Dense(value.float().numpy().copy())
