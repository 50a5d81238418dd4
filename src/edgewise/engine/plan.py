"""A Plan: what the native Session executes, layer by layer, with nothing left to guess.

`engine/archs/<arch>.py` turns a Checkpoint into a Plan; `engine/load.py` hands a Plan to the native core.
Every layer carries its own shapes; every linear its own storage and activation format.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgewise.core.activation import StaticActivation
from edgewise.core.errors import InvalidValueError
from edgewise.core.storage import Stored
from edgewise.core.values import dataclass

__all__ = ["Activation", "Attention", "AttentionPolicy", "CrossAttention", "Experts", "FeedForward", "Layer", "Linear",
           "Norm", "Plan", "RelativeBias", "Rope", "Rounding", "endless", "for_context", "layer_with", "plan_with",
           "with_attention"]

Float32 = NDArray[np.float32]
Activation = Literal["int8", "float32", "bfloat16", "static"]
"""Inputs of a linear: int8 with one float32 scale per 32 inputs, float32, bfloat16 where the weight is bfloat16 too, or
static: codes on the linear's own grid `input`, see engine/static.py.

In products of bfloat16, values below 2^-56 count as zero; sums are float32."""


@dataclass(frozen=True, eq=False)
class Linear:
    """y = x W^T + b. weight: (out, in) Stored under the checkpoint's name `name`; bias: (out,) float32.

    rows: first and last + 1 of the checkpoint's tensor, where several linears lie in one (Phi-3's qkv_proj).
    input, output: grids of what it reads and gives, where these are fixed; an output without one stays in floats.
    """

    name: str
    weight: Stored
    bias: Float32 | None = None
    activation: Activation = "int8"
    rows: tuple[int, int] | None = None
    input: StaticActivation | None = None
    output: StaticActivation | None = None

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
    """Which positions a token sees: causal (all before it), sliding (the last `window`, itself included), full, sinks.

    sinks: the first `sinks` positions and the last `window`, at the distances they have in a cache that holds nothing
    else, so that a text may go on without end (Xiao et al., arXiv:2309.17453, section 3.2; AccLLM, arXiv:2505.03745).
    """

    kind: Literal["causal", "sliding", "full", "sinks"] = "causal"
    window: int = 0
    sinks: int = 0

    @classmethod
    def parse(cls, text: str) -> AttentionPolicy:
        """"full": as the model was made. "sink=4,window=512": the first four positions and the last 512."""
        if text.strip() == "full":
            return cls()
        found = dict(part.split("=", 1) for part in text.replace(" ", "").split(",") if "=" in part)
        if set(found) <= {"sink", "window"} and "window" in found and text.count("=") == text.count(",") + 1:
            numbers = [found.get("sink", "4"), found["window"]]
            if all(number.isascii() and number.isdigit() and len(number) < 10 for number in numbers):
                sinks, window = map(int, numbers)
                if window > 0:
                    return cls("sinks", window, sinks)
        raise InvalidValueError(f"attention is full, or sink=S,window=W with W at least 1, such as sink=4,window=512; "
                                f"given {text!r}")

    def __str__(self) -> str:
        return f"sink={self.sinks},window={self.window}" if self.kind == "sinks" else self.kind


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """Added to the score of a key by its distance from the query: one value per head and bucket of distances (T5).

    table: (buckets, heads) float32. bidirectional: half of the buckets are for keys after the query; else these are as
    near as the query itself. Of a direction's buckets the first half holds one distance each, the rest wider and wider
    ranges up to `most`, from which on all distances are one.
    Raffel et al., "Exploring the Limits of Transfer Learning ...", arXiv:1910.10683, section 2.1.
    """

    table: Float32
    most: int
    bidirectional: bool

    def buckets(self, distances: NDArray[np.int64]) -> NDArray[np.int64]:
        """The bucket of each distance, key minus query; any shape. In float32, as transformers does."""
        count, first = len(self.table), np.zeros_like(distances)
        if self.bidirectional:
            count //= 2
            first = np.where(distances > 0, count, 0)
            size = np.abs(distances)
        else:
            size = -np.minimum(distances, 0)
        exact = count // 2
        wide = np.log(np.maximum(size, exact).astype(np.float32) / np.float32(exact))
        wide = wide / np.float32(math.log(self.most / exact)) * np.float32(count - exact)
        wider = np.minimum(exact + wide.astype(np.int64), count - 1)
        return np.asarray(first + np.where(size < exact, size, wider), np.int64)

    def by_distance(self, reach: int) -> Float32:
        """(heads, 2 reach + 1): the bias of distances -reach .. reach."""
        return np.ascontiguousarray(self.table[self.buckets(np.arange(-reach, reach + 1))].T, np.float32)


@dataclass(frozen=True, eq=False)
class Attention:
    """Grouped-query attention.

    q: (heads * head_dim, hidden); k: (kv_heads * head_dim, hidden); v: (kv_heads * value_dim, hidden); o: (hidden,
    heads * value_dim). value_dim 0: as head_dim.
    q_norm, k_norm: (head_dim,), of each head by itself, before the rotary embedding.
    bias: added to the scaled scores; layers that share one have the same object.
    turns: (kv_heads, head_dim / 2), which of the rotary frequencies turns each pair of a key head and of its query
    heads; None: the frequencies in their order.
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
    bias: RelativeBias | None = None
    value_dim: int = 0
    turns: NDArray[np.uint16] | None = None

    @property
    def value_width(self) -> int:
        """Dimensions of a value."""
        return self.value_dim or self.head_dim


@dataclass(frozen=True, eq=False)
class CrossAttention:
    """h += o attend(q norm(h), k states, v states): every token sees all states of the encoder, wherever they stand.

    q: (heads * head_dim, hidden); k, v: (kv_heads * head_dim, hidden of the encoder); o: (hidden, heads * head_dim).
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    norm: Norm
    heads: int
    kv_heads: int
    head_dim: int
    scale: float


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


@dataclass(frozen=True)
class Rounding:
    """Grids of a layer beside those of its linears: of the stream as each norm reads it; of sigmoid and function of the
    gate; and of attention, whose six are all there or none: query, key and value, scores, probabilities, what it gives.
    """

    query: StaticActivation | None = None
    key: StaticActivation | None = None
    value: StaticActivation | None = None
    score: StaticActivation | None = None
    probability: StaticActivation | None = None
    attended: StaticActivation | None = None
    attention_in: StaticActivation | None = None
    feed_forward_in: StaticActivation | None = None
    sigmoid: StaticActivation | None = None
    act: StaticActivation | None = None

    @property
    def attends(self) -> bool:
        """Attention is made of integers."""
        return self.query is not None


@dataclass(frozen=True, eq=False)
class Layer:
    """pre: h += attn(norm(h)); h += ffn(norm(h)).  post: h = norm(h + attn(h)); h = norm(h + ffn(h)).

    after_attention, after_feed_forward: norms of what a part gives, before it is added (Gemma): h += norm(attn(...)).
    cross: between the two parts, in the decoder of an encoder-decoder.
    A decoder's layer may lack one of its parts, with the norm before it.
    """

    attention: Attention | None
    feed_forward: FeedForward | Experts | None
    attention_norm: Norm | None
    feed_forward_norm: Norm | None
    order: Literal["pre", "post"] = "pre"
    after_attention: Norm | None = None
    after_feed_forward: Norm | None = None
    cross: CrossAttention | None = None
    rounding: Rounding | None = None

    @property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        """The feed-forward, or every expert by index, the shared one last."""
        if self.feed_forward is None:
            return ()
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
    An encoder-decoder is the plan of its decoder, with the encoder in it, which reads the text; `start` is the token
    that the decoder begins with. `context` counts for each of the two by itself.
    """

    arch: str
    kind: Literal["decoder", "encoder", "encoder-decoder"]
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
    encoder: Plan | None = None
    start: int | None = None

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Of the layers that have one."""
        return tuple(layer.attention for layer in self.layers if layer.attention is not None)


def layer_with(layer: Layer, change: Callable[[Linear], Linear]) -> Layer:
    """The layer with every linear changed."""
    def gated(ffn: FeedForward) -> FeedForward:
        return replace(ffn, gate=None if ffn.gate is None else change(ffn.gate), up=change(ffn.up),
                       down=change(ffn.down))

    attention, ffn = layer.attention, layer.feed_forward
    if isinstance(ffn, Experts):
        changed: FeedForward | Experts | None = replace(
            ffn, router=change(ffn.router), experts=tuple(gated(expert) for expert in ffn.experts),
            shared=None if ffn.shared is None else gated(ffn.shared),
            shared_gate=None if ffn.shared_gate is None else change(ffn.shared_gate))
    else:
        changed = None if ffn is None else gated(ffn)
    cross = layer.cross
    if cross is not None:
        cross = replace(cross, q=change(cross.q), k=change(cross.k), v=change(cross.v), o=change(cross.o))
    return replace(
        layer, cross=cross,
        attention=None if attention is None else replace(
            attention, q=change(attention.q), k=change(attention.k), v=change(attention.v), o=change(attention.o)),
        feed_forward=changed)


def plan_with(plan: Plan, change: Callable[[Linear], Linear]) -> Plan:
    """The plan with every linear of its layers changed, those of an encoder inside included."""
    return replace(plan, layers=tuple(layer_with(layer, change) for layer in plan.layers),
                   encoder=None if plan.encoder is None else plan_with(plan.encoder, change))


def with_attention(plan: Plan, policy: AttentionPolicy) -> Plan:
    """The plan with another policy where a token sees all before it; layers with a window of their own keep it."""
    def changed(layer: Layer) -> Layer:
        if layer.attention is None or layer.attention.policy.kind != "causal":
            return layer
        return replace(layer, attention=replace(layer.attention, policy=policy))

    if policy.kind != "causal" and plan.kind == "encoder":
        raise InvalidValueError(f"an encoder ({plan.arch}) sees its whole text; attention {policy} is for decoders")
    return replace(plan, layers=tuple(changed(layer) for layer in plan.layers))


def endless(plan: Plan) -> bool:
    """Whether a sequence may go on for ever in constant memory: every layer has a window, some of them with sinks."""
    kinds = {attention.policy.kind for attention in plan.attentions}
    return "sinks" in kinds and kinds <= {"sinks", "sliding"} and plan.position_embedding is None


def for_context(plan: Plan, context: int) -> Plan:
    """The plan for sequences of up to `context` positions: rotary embeddings that depend on it are chosen.

    transformers chooses by the length of the text at hand. Keys in a cache are rotated once, so here the context that
    the model is loaded with decides, for every text.
    """
    if endless(plan):  # distances are those in a cache
        policies = [attention.policy for attention in plan.attentions]
        context = min(context, max(policy.sinks + policy.window for policy in policies))
    chosen: dict[int, Rope] = {}

    def rope_of(rope: Rope | None) -> Rope | None:
        if rope is None or rope.longer is None:
            return rope
        own = rope.longer if context > rope.reach else replace(rope, longer=None)
        return chosen.setdefault(id(rope), own)  # layers that shared one still do

    layers = tuple(layer if layer.attention is None else replace(
        layer, attention=replace(layer.attention, rope=rope_of(layer.attention.rope))) for layer in plan.layers)
    return replace(plan, layers=layers, encoder=None if plan.encoder is None else for_context(plan.encoder, context))
