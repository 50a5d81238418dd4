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

__all__ = ["Activation", "Attention", "AttentionPolicy", "Experts", "FeedForward", "Layer", "Linear", "Norm", "Plan",
           "Rope", "for_context", "layer_with"]

Float32 = NDArray[np.float32]
Activation = Literal["int8", "float32"]
"""Inputs of a linear: int8 with one float32 scale per 32 inputs, or float32."""


@dataclass(frozen=True, eq=False)
class Linear:
    """y = x W^T + b. weight: (out, in) Stored under the checkpoint's name `name`; bias: (out,) float32.

    rows: first and last + 1 of the checkpoint's tensor, where several linears lie in one (Phi-3's qkv_proj).
    """

    name: str
    weight: Stored
    bias: Float32 | None = None
    activation: Activation = "int8"
    rows: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """A name that no other weight of the plan has."""
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"


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
    longer: what a context of more than `reach` positions takes instead (LongRoPE); see `for_context`.
    """

    inverse_frequency: Float32
    attention_factor: float = 1.0
    longer: Rope | None = None
    reach: int = 0


@dataclass(frozen=True)
class AttentionPolicy:
    """Which positions a token sees: causal (all before it), sliding (the last `window`, itself included), full."""

    kind: Literal["causal", "sliding", "full"] = "causal"
    window: int = 0


@dataclass(frozen=True, eq=False)
class Attention:
    """Grouped-query attention.

    q: (heads * head_dim, hidden); k, v: (kv_heads * head_dim, hidden); o: (hidden, heads * head_dim).
    q_norm, k_norm: (head_dim,), of each head by itself, before the rotary embedding.
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
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True, eq=False)
class FeedForward:
    """down(act(gate x) * up x), or down(act(up x)) when there is no gate."""

    up: Linear
    down: Linear
    gate: Linear | None = None
    function: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"


@dataclass(frozen=True, eq=False)
class Experts:
    """sum of p_e expert_e(x) over the top_k experts e, p = softmax(router x), plus sigmoid(shared_gate x) shared(x).

    router: (experts, hidden); shared_gate: (1, hidden). Of equal probabilities the lower index wins.
    normalise: the probabilities of the chosen are divided by their sum.
    The terms are added in ascending order of e, the shared expert last, so that a token's sum is its own.
    """

    router: Linear
    experts: tuple[FeedForward, ...]
    top_k: int
    normalise: bool
    shared: FeedForward | None = None
    shared_gate: Linear | None = None


@dataclass(frozen=True, eq=False)
class Layer:
    """pre: h += attn(norm(h)); h += ffn(norm(h)).  post: h = norm(h + attn(h)); h = norm(h + ffn(h)).

    after_attention, after_feed_forward: norms of what a part gives, before it is added (Gemma): h += norm(attn(...)).
    """

    attention: Attention
    feed_forward: FeedForward | Experts
    attention_norm: Norm
    feed_forward_norm: Norm
    order: Literal["pre", "post"] = "pre"
    after_attention: Norm | None = None
    after_feed_forward: Norm | None = None

    @property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        """The feed-forward, or every expert by index, the shared one last."""
        if isinstance(self.feed_forward, FeedForward):
            return (self.feed_forward,)
        shared = self.feed_forward.shared
        return self.feed_forward.experts if shared is None else (*self.feed_forward.experts, shared)


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
    def gated(ffn: FeedForward) -> FeedForward:
        return replace(ffn, gate=None if ffn.gate is None else change(ffn.gate), up=change(ffn.up),
                       down=change(ffn.down))

    attention, ffn = layer.attention, layer.feed_forward
    if isinstance(ffn, Experts):
        changed: FeedForward | Experts = replace(
            ffn, router=change(ffn.router), experts=tuple(gated(expert) for expert in ffn.experts),
            shared=None if ffn.shared is None else gated(ffn.shared),
            shared_gate=None if ffn.shared_gate is None else change(ffn.shared_gate))
    else:
        changed = gated(ffn)
    return replace(
        layer,
        attention=replace(attention, q=change(attention.q), k=change(attention.k), v=change(attention.v),
                          o=change(attention.o)),
        feed_forward=changed)


def for_context(plan: Plan, context: int) -> Plan:
    """The plan for sequences of up to `context` positions: rotary embeddings that depend on it are chosen.

    transformers chooses by the length of the text at hand. Keys in a cache are rotated once, so here the context that
    the model is loaded with decides, for every text.
    """
    chosen: dict[int, Rope] = {}

    def rope_of(rope: Rope | None) -> Rope | None:
        if rope is None or rope.longer is None:
            return rope
        own = rope.longer if context > rope.reach else replace(rope, longer=None)
        return chosen.setdefault(id(rope), own)  # layers that shared one still do

    layers = tuple(replace(layer, attention=replace(layer.attention, rope=rope_of(layer.attention.rope)))
                   for layer in plan.layers)
    return replace(plan, layers=layers)
