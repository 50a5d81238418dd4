"""Learned equivalent transformations and clipping of a Llama block: the same function in other weights.

Shao et al., "OmniQuant", arXiv:2308.13137, section 3.3, and Tan et al., "MobileQuant", arXiv:2408.13933, section 3.
With a positive vector s for each pair, what comes first is divided by it and what comes next multiplied:

    qkv    g1 / s;  W_q, W_k, W_v columns * s          fc1    g2 / s;  W_gate, W_up columns * s
    out    W_v rows / s;  W_o columns * s              fc2    W_up rows / s;  W_down columns * s
    qk     W_q rows / s;  W_k rows * s

out and qk need as many key heads as query heads, and are skipped otherwise; with `grouped` they take one factor for the
heads of a group. fc2 passes the linear branch of the gate alone. Rotary embeddings turn dimensions i and i + d/2 of a
head together, so qk has one factor for both.

A block is described by names without its prefix, as transformers and our tensors have them ("self_attn.q_proj.weight").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgewise.core.errors import UnsupportedError

__all__ = ["LINEARS", "NORMS", "BlockShape", "Factors", "factors_of", "transformed", "without_weights"]

LINEARS = tuple(f"self_attn.{part}_proj" for part in "qkvo") + tuple(f"mlp.{part}_proj" for part in (
    "gate", "up", "down"))
NORMS = ("input_layernorm", "post_attention_layernorm")


class BlockShape:
    """Sizes of a block and the pairs that it has, each with the length of its vector."""

    def __init__(self, layer: nn.Module, heads: int, kv_heads: int, *, up_down: bool = True, grouped: bool = False,
                 query_key: bool = True) -> None:
        """layer: of transformers. up_down: the pair fc2, which the original OmniQuant does not have."""
        state = dict(layer.named_parameters())
        known = {f"{name}.{leaf}" for name in (*LINEARS, *NORMS) for leaf in ("weight", "bias")}
        missing = [name for name in (*LINEARS, *NORMS) if f"{name}.weight" not in state]
        if missing or (unknown := set(state) - known):
            what = f"lacks {missing[0]}" if missing else f"has {min(unknown)}"
            raise UnsupportedError(
                f"equivalent transformations are of blocks of the Llama kind (Llama, Mistral, Qwen2, SmolLM2); "
                f"{type(layer).__name__} {what}; take another method, such as gptq")
        self.heads, self.kv_heads = heads, kv_heads
        self.size = state["self_attn.q_proj.weight"].shape[0] // heads
        width, inner = state["mlp.down_proj.weight"].shape
        self.pairs = {"qkv": width, "fc1": width}
        if heads == kv_heads or grouped:
            self.pairs["out"] = kv_heads * self.size
            if query_key:
                self.pairs["qk"] = kv_heads * self.size // 2
        if up_down:
            self.pairs["fc2"] = inner

    def per_query(self, values: Tensor) -> Tensor:
        """(kv_heads * size,) -> (heads * size,): what a group's heads share."""
        by_head = values.reshape(self.kv_heads, self.size)
        return by_head.repeat_interleave(self.heads // self.kv_heads, dim=0).reshape(-1)

    def turned(self, values: Tensor) -> Tensor:
        """(kv_heads * size / 2,) -> (kv_heads * size,): what dimensions that are turned together share."""
        by_head = values.reshape(self.kv_heads, self.size // 2)
        return torch.cat([by_head, by_head], dim=1).reshape(-1)


@dataclass(frozen=True)
class Factors:
    """What becomes of a linear's weight: times `columns` (in,), then divided by `rows` (out,), where there are any."""

    columns: Tensor | None = None
    rows: Tensor | None = None

    def weight(self, weight: Tensor) -> Tensor:
        """(out, in) -> (out, in)."""
        made = weight if self.columns is None else weight * self.columns
        return made if self.rows is None else made / self.rows[:, None]

    def bias(self, bias: Tensor) -> Tensor:
        """(out,) -> (out,)."""
        return bias if self.rows is None else bias / self.rows


def factors_of(scales: Mapping[str, Tensor], shape: BlockShape) -> dict[str, Factors]:
    """Of every linear, under the scales of its block's pairs; pairs that are not named change nothing."""
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for pair, readers in (("qkv", LINEARS[:3]), ("fc1", LINEARS[4:6])):
        if pair in scales:
            columns |= dict.fromkeys(readers, scales[pair])
    if "out" in scales:
        rows["self_attn.v_proj"] = scales["out"]
        columns["self_attn.o_proj"] = shape.per_query(scales["out"])
    if "qk" in scales:
        both = shape.turned(scales["qk"])
        rows |= {"self_attn.q_proj": shape.per_query(both), "self_attn.k_proj": 1 / both}
    if "fc2" in scales:
        rows["mlp.up_proj"] = columns["mlp.down_proj"] = scales["fc2"]
    return {name: Factors(columns.get(name), rows.get(name)) for name in LINEARS}


def without_weights(state: Mapping[str, Tensor], scales: Mapping[str, Tensor], shape: BlockShape,
                    factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Norms and biases under the scales of the pairs; weights of linears are left out."""
    made = {name: tensor for name, tensor in state.items() if name.removesuffix(".weight") not in LINEARS}
    for name, change in factors.items():
        if f"{name}.bias" in made:
            made[f"{name}.bias"] = change.bias(made[f"{name}.bias"])
    for pair, norm in (("qkv", NORMS[0]), ("fc1", NORMS[1])):
        if pair in scales:
            made[f"{norm}.weight"] = made[f"{norm}.weight"] / scales[pair]
    return made


def transformed(state: Mapping[str, Tensor], scales: Mapping[str, Tensor], shape: BlockShape) -> dict[str, Tensor]:
    """The block's parameters under the scales of its pairs; pairs that are not named stay as they are."""
    factors = factors_of(scales, shape)
    made = without_weights(state, scales, shape, factors)
    return made | {f"{name}.weight": change.weight(state[f"{name}.weight"]) for name, change in factors.items()}
