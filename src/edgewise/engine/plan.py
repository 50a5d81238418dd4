"""A Plan: what the native Session executes, layer by layer, with nothing left to guess.

`engine/archs/<arch>.py` turns a Checkpoint into a Plan; `engine/load.py` hands a Plan to the native core.
Every layer carries its own shapes; every linear its own storage and activation format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgewise.core.storage import Stored

__all__ = ["Activation", "Attention", "AttentionPolicy", "FeedForward", "Layer", "Linear", "Norm", "Plan", "Rope",
           "layer_with"]

Float32 = NDArray[np.float32]
Activation = Literal["int8", "float32"]
"""Inputs of a linear: int8 with one float32 scale per 32 inputs, or float32."""


@dataclass(frozen=True, eq=False)
class Linear:
    """y = x W^T + b. weight: (out, in) Stored under the checkpoint's name `name`; bias: (out,) float32."""

    name: str
    weight: Stored
    bias: Float32 | None = None
    activation: Activation = "int8"


@dataclass(frozen=True, eq=False)
class Norm:
    """rms: x / sqrt(mean(x^2) + eps) * weight.  layer: (x - mean) / sqrt(var + eps) * weight + bias. (hidden,)."""

    kind: Literal["rms", "layer"]
    weight: Float32
    eps: float
    bias: Float32 | None = None


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotate-half rotary embedding over the first 2 * len(inverse_frequency) dimensions of a head.

    inverse_frequency: (rotary_dim / 2,) float32 in radians per position, scaling included.
    attention_factor multiplies cosine and sine (YaRN, LongRoPE).
    """

    inverse_frequency: Float32
    attention_factor: float = 1.0


@dataclass(frozen=True)
class AttentionPolicy:
    """Which positions a token sees: causal (all before it), sliding (the last `window`, itself included), full."""

    kind: Literal["causal", "sliding", "full"] = "causal"
    window: int = 0


@dataclass(frozen=True, eq=False)
class Attention:
    """Grouped-query attention.

    q: (heads * head_dim, hidden); k, v: (kv_heads * head_dim, hidden); o: (hidden, heads * head_dim).
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None = None
    policy: AttentionPolicy = AttentionPolicy()


@dataclass(frozen=True, eq=False)
class FeedForward:
    """down(act(gate x) * up x), or down(act(up x)) when there is no gate."""

    up: Linear
    down: Linear
    gate: Linear | None = None
    function: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"


@dataclass(frozen=True, eq=False)
class Layer:
    """pre: h += attn(norm(h)); h += ffn(norm(h)).  post: h = norm(h + attn(h)); h = norm(h + ffn(h))."""

    attention: Attention
    feed_forward: FeedForward
    attention_norm: Norm
    feed_forward_norm: Norm
    order: Literal["pre", "post"] = "pre"


@dataclass(frozen=True, eq=False)
class Plan:
    """A whole language model or encoder.

    embedding: (vocab, hidden). position_embedding: (positions, hidden) and token_type_embedding: (types, hidden) of
    encoders, with `position_offset` added to every position (RoBERTa: padding index + 1). embedding_norm follows.
    head is None for an encoder; a tied head holds the same Stored as `embedding`.
    """

    arch: str
    kind: Literal["decoder", "encoder"]
    hidden: int
    vocab: int
    context: int
    embedding: Linear
    layers: tuple[Layer, ...]
    final_norm: Norm | None = None
    head: Linear | None = None
    position_embedding: Float32 | None = None
    position_offset: int = 0
    token_type_embedding: Float32 | None = None
    embedding_norm: Norm | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0


def layer_with(layer: Layer, change: Callable[[Linear], Linear]) -> Layer:
    """The layer with every linear changed."""
    attention, ffn = layer.attention, layer.feed_forward
    return replace(
        layer,
        attention=replace(attention, q=change(attention.q), k=change(attention.k), v=change(attention.v),
                          o=change(attention.o)),
        feed_forward=replace(ffn, gate=None if ffn.gate is None else change(ffn.gate), up=change(ffn.up),
                             down=change(ffn.down)))
