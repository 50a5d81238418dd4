"""A slow executor of a Plan in NumPy, in the words of the papers. It is the judge of the native engine.

`forward` computes in float64 unless asked otherwise. `MUTATIONS` are wrong models, each wrong in one way that is easy
to get wrong; a check against another implementation is worth something when it rejects all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edgewise.core.numbers import bf16_to_float32, float32_to_bf16
from edgewise.core.storage import Dense, InputSparse
from edgewise.engine.plan import (
    Attention,
    AttentionPolicy,
    CrossAttention,
    Experts,
    FeedForward,
    Layer,
    Linear,
    Norm,
    Plan,
    RelativeBias,
    Rope,
    for_context,
)

__all__ = ["MUTATIONS", "forward", "mutations_of", "round_activations", "round_kv"]


def forward(plan: Plan, ids, *, decoder_ids=None, token_types=None, dtype=np.float64, activations: str = "exact",
            kv: str = "fp32", context: int | None = None) -> np.ndarray:
    """Logits (n, vocab) of a decoder, hidden states (n, hidden) of an encoder, for ids (n,).

    activations: "exact" leaves the inputs of linears alone; "plan" rounds them as each linear's activation says.
    kv: keys and values are kept in this format; quantised keys meet queries in int8.
    context: what the model is loaded with; None: the length of the text.
    decoder_ids: of an encoder-decoder, what its logits (len(decoder_ids), vocab) are of; the encoder reads ids.
    """
    states = None
    if plan.encoder is not None:
        states = forward(plan.encoder, ids, dtype=dtype, activations=activations)
        ids = decoder_ids
    ids = np.asarray(ids, np.int64)
    plan = for_context(plan, len(ids) if context is None else context)
    run = _Run(dtype, activations == "plan", kv)
    h = plan.embedding.weight.dense()[ids].astype(dtype) * dtype(plan.embedding_scale)
    if plan.token_type_embedding is not None:
        types = np.zeros(len(ids), np.int64) if token_types is None else np.asarray(token_types)
        h = h + plan.token_type_embedding[types]
    if plan.position_embedding is not None:
        h = h + plan.position_embedding[np.arange(len(ids)) + plan.position_offset]
    if plan.embedding_norm is not None:
        h = norm(plan.embedding_norm, h)
    for layer in plan.layers:
        if layer.order == "pre":
            h = h + after(layer.after_attention, run.attention(layer.attention, norm(layer.attention_norm, h)))
            if layer.cross is not None:
                h = h + run.attention(_across(layer.cross), norm(layer.cross.norm, h), states)
            h = h + after(layer.after_feed_forward, run.feed_forward(layer, norm(layer.feed_forward_norm, h)))
        else:
            h = norm(layer.attention_norm, h + run.attention(layer.attention, h))
            h = norm(layer.feed_forward_norm, h + run.feed_forward(layer, h))
    if plan.final_norm is not None:
        h = norm(plan.final_norm, h)
    if plan.head is None:
        return h
    return run.linear(plan.head, h) * dtype(plan.logit_scale)


def norm(parameters: Norm, x: np.ndarray) -> np.ndarray:
    """x: (n, hidden). RMSNorm (arXiv:1910.07467, equation 4) or LayerNorm (arXiv:1607.06450)."""
    rows = []
    for row in x:
        if parameters.kind == "rms":
            row = row / np.sqrt(np.mean(row**2) + parameters.eps)
        else:
            row = (row - np.mean(row)) / np.sqrt(np.var(row) + parameters.eps)
        rows.append(row * parameters.weight.astype(x.dtype))
    y = np.stack(rows)
    return y if parameters.bias is None else y + parameters.bias


def after(parameters: Norm | None, x: np.ndarray) -> np.ndarray:
    return x if parameters is None else norm(parameters, x)


def rotate(rope: Rope, x: np.ndarray, positions=None) -> np.ndarray:
    """x: (n, head_dim). Dimension i and i + d/2 turn together by position * theta_i (rotate-half layout)."""
    half = len(rope.inverse_frequency)
    y = x.copy()
    for position in range(len(x)):
        angle = (position if positions is None else positions[position]) * rope.inverse_frequency.astype(np.float64)
        cosine = (np.cos(angle) * rope.attention_factor).astype(x.dtype)
        sine = (np.sin(angle) * rope.attention_factor).astype(x.dtype)
        first, second = x[position, :half], x[position, half:2 * half]
        y[position, :half] = first * cosine - second * sine
        y[position, half:2 * half] = second * cosine + first * sine
    return y


def sees(policy: AttentionPolicy, n: int) -> np.ndarray:
    """(n, n) bool: may the query of that row see the key of that column?"""
    mask = np.zeros((n, n), bool)
    for query in range(n):
        for key in range(n):
            if policy.kind == "full":
                mask[query, key] = True
            elif policy.kind == "causal":
                mask[query, key] = key <= query
            elif policy.kind == "sinks":
                mask[query, key] = key <= query and (key < policy.sinks or key > query - policy.window)
            else:
                mask[query, key] = query - policy.window < key <= query
    return mask


def bucket(bias: RelativeBias, distance: int) -> int:
    """arXiv:1910.10683, section 2.1: small distances by themselves, larger ones by their logarithm."""
    count, first = len(bias.table), 0
    if bias.bidirectional:
        count //= 2
        first = count if distance > 0 else 0
        size = abs(distance)
    else:
        size = max(-distance, 0)
    exact = count // 2
    if size < exact:
        return first + size
    wide = math.log(size / exact) / math.log(bias.most / exact) * (count - exact)
    return first + min(exact + int(wide), count - 1)


def activate(function: str, x: np.ndarray) -> np.ndarray:
    """silu: x sigmoid(x). gelu: x Phi(x), exactly or by its tanh formula (arXiv:1606.08415). relu."""
    if function == "silu":
        return x / (1 + np.exp(-x))
    if function == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf, otypes=[x.dtype])(x / math.sqrt(2)))
    if function == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert function == "relu"
    return np.maximum(x, 0)


def round_activations(x: np.ndarray, block: int = 32, levels: int = 127) -> np.ndarray:
    """x: (n, inputs) with each run of 32 inputs on the grid of its float32 scale max|x| / levels, ties to even."""
    y = np.asarray(x, np.float32).copy()
    for start in range(0, y.shape[1], block):
        part = y[:, start:start + block]
        scale = np.abs(part).max(axis=1, keepdims=True) / np.float32(levels)
        scale = np.where(scale > 0, scale, np.float32(1))
        y[:, start:start + block] = np.rint(part / scale) * scale
    return y.astype(x.dtype)


def round_bfloat(x: np.ndarray) -> np.ndarray:
    """x: (n, inputs) to the nearest bfloat16, ties to even; below 2^-56 to zero."""
    near = bf16_to_float32(float32_to_bf16(x)).astype(x.dtype)
    return np.where(np.abs(x) < 2.0**-56, 0, near)


def round_kv(x: np.ndarray, kv: str) -> np.ndarray:
    """x: (n, head_dim) as the cache holds it at once: fp16, bf16, or codes of -127..127 per 32 dimensions."""
    if kv == "fp32":
        return x
    if kv == "fp16":
        return x.astype(np.float16).astype(x.dtype)
    if kv == "bf16":
        return round_bfloat(x)
    return round_activations(x)


GROUP, FIRST = 64, 16
"""Positions that are packed together in four bits, and those at the start that stay in eight."""


def on_grid(x: np.ndarray, axis: int) -> np.ndarray:
    """x with 16 steps between the lowest and the highest along an axis, scale and minimum in float16."""
    x = np.asarray(x, np.float32)
    low = x.min(axis=axis, keepdims=True)
    step = ((x.max(axis=axis, keepdims=True) - low) / np.float32(15)).astype(np.float16).astype(np.float32)
    low = low.astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint((x - low) / np.where(step > 0, step, np.float32(1))), 0, 15)
    return np.where(step > 0, codes, 0) * step + low


def in_four_bits(x: np.ndarray, axis: int) -> np.ndarray:
    """x: (n, head_dim), as whole groups of positions are packed from eight bits; what fills no group is left in eight.

    axis 0: of keys, one grid for each dimension of a group; 1: of values, one for each position.
    """
    eight = round_activations(x)
    groups = [eight[start:start + GROUP] for start in range(0, len(x), GROUP)]
    return np.concatenate([on_grid(g, axis) if len(g) == GROUP else g for g in groups]).astype(x.dtype)


def in_eight(n: int, sinks: int) -> np.ndarray:
    """(n, n) bool: does the query of that row meet the key of that column in eight bits?"""
    query, key = np.ogrid[:n, :n]
    return (key < sinks) | (key // GROUP == query // GROUP)


def round_weights(score: np.ndarray, weight: np.ndarray, sinks: int) -> np.ndarray:
    """Weights (n, positions) rounded to bf16 in chunks of 256 positions, each over its own highest score; the sinks
    are a chunk of their own."""
    out = np.zeros_like(weight)
    n = score.shape[1]
    cuts = sorted({0, min(sinks, n), *range(0, n, 256), n})
    for start, stop in itertools.pairwise(cuts):
        part = score[:, start:stop]
        peak = part.max(axis=1, keepdims=True)
        some = np.isfinite(peak[:, 0])
        rounded = round_bfloat(np.exp(part[some] - peak[some]))
        out[some, start:stop] = rounded * np.exp(peak[some] - score[some].max(axis=1, keepdims=True))
    return out


def _across(cross: CrossAttention) -> Attention:
    return Attention(cross.q, cross.k, cross.v, cross.o, cross.heads, cross.kv_heads, cross.head_dim, cross.scale,
                     policy=AttentionPolicy("full"))


class _Run:
    def __init__(self, dtype, round_inputs: bool, kv: str = "fp32") -> None:
        self.dtype = dtype
        self.kv = kv
        self.round_inputs = round_inputs

    def linear(self, linear: Linear, x: np.ndarray) -> np.ndarray:
        weight, exact = linear.weight, x
        if self.round_inputs and linear.activation != "float32":
            x = round_activations(x) if linear.activation == "int8" else round_bfloat(x)
        if isinstance(weight, InputSparse):  # every token decodes; what is read is chosen before inputs are rounded
            read = np.abs(exact) > weight.threshold
            y = (x * read) @ weight.dense().astype(self.dtype).T
            if weight.low_rank is not None:
                y = y + (exact * ~read) @ weight.low_rank.dense().astype(self.dtype).T
        else:
            y = x @ weight.dense().astype(self.dtype).T
        return y if linear.bias is None else y + linear.bias

    def attention(self, a: Attention, x: np.ndarray, states: np.ndarray | None = None) -> np.ndarray:
        """Query head j uses key and value head j // (heads / kv_heads) (arXiv:2305.13245). states: what keys are of."""
        n, d = len(x), a.head_dim
        seen = x if states is None else states
        q, k, v = self.linear(a.q, x), self.linear(a.k, seen), self.linear(a.v, seen)
        visible = sees(a.policy, n) if states is None else np.ones((n, len(states)), bool)
        out = np.zeros((n, a.heads * d), self.dtype)
        if a.bias is not None:
            near_by = {distance: bucket(a.bias, distance) for distance in range(1 - n, n)}
            of = np.array([[near_by[key - query] for key in range(n)] for query in range(n)])
        for head in range(a.heads):
            group = head // (a.heads // a.kv_heads)
            qh, kh, vh = q[:, head * d:(head + 1) * d], k[:, group * d:(group + 1) * d], v[:, group * d:(group + 1) * d]
            qh, kh = after(a.q_norm, qh), after(a.k_norm, kh)
            sinks, place = 0, n
            if a.policy.kind == "sinks":
                sinks, place = a.policy.sinks, a.policy.sinks + a.policy.window - 1
            near = qh  # as it meets the sinks: turned to its place in the cache
            if a.rope is not None:
                near = rotate(a.rope, qh, np.minimum(np.arange(n), place))
                qh, kh = rotate(a.rope, qh), rotate(a.rope, kh)
            grouped = self.kv == "int4" and a.policy.kind != "full"
            exact, rounded_k, rounded_v = qh, round_kv(kh, self.kv), round_kv(vh, self.kv)
            if self.kv in ("int8", "int4"):
                qh, near = round_activations(qh), round_activations(near)
            if self.kv == "bf16":
                qh, near = round_bfloat(qh), round_bfloat(near)
            score = qh @ rounded_k.T
            if grouped:
                eight = in_eight(n, sinks if a.policy.kind == "sinks" else FIRST)
                score = np.where(eight, score, exact @ in_four_bits(kh, 0).T)
            if sinks:
                score[:, :sinks] = near @ rounded_k[:sinks].T
            score = score * a.scale
            if a.bias is not None:
                shifted = of
                if sinks:
                    shifted = of.copy()
                    for query, key in np.ndindex(n, min(sinks, n)):
                        shifted[query, key] = near_by[key - min(query, place)]
                score = score + a.bias.table[shifted, head]
            score = np.where(visible, score, -np.inf)
            weight = np.exp(score - score.max(axis=1, keepdims=True))
            if self.kv == "bf16":
                weight = round_weights(score, weight, sinks)
            weight = weight / weight.sum(axis=1, keepdims=True)
            mixed = weight @ rounded_v
            if grouped:
                mixed = np.where(eight, weight, 0) @ rounded_v + np.where(eight, 0, weight) @ in_four_bits(vh, 1)
            out[:, head * d:(head + 1) * d] = mixed
        return self.linear(a.o, out)

    def feed_forward(self, layer: Layer, x: np.ndarray) -> np.ndarray:
        f = layer.feed_forward
        return self.gated(f, x) if isinstance(f, FeedForward) else self.experts(f, x)

    def gated(self, f: FeedForward, x: np.ndarray) -> np.ndarray:
        up = self.linear(f.up, x)
        if f.gate is None:
            return self.linear(f.down, activate(f.function, up))
        return self.linear(f.down, activate(f.function, self.linear(f.gate, x)) * up)

    def experts(self, f: Experts, x: np.ndarray) -> np.ndarray:
        """Token by token: the top_k experts of softmax(router x), each times its probability (arXiv:1701.06538)."""
        scores = self.linear(f.router, x)
        rows = []
        for row, score in zip(x, scores, strict=True):
            probability = np.exp(score - score.max())
            probability /= probability.sum()
            chosen = sorted(range(len(score)), key=lambda e: (-probability[e], e))[:f.top_k]
            total = sum(probability[e] for e in chosen) if f.normalise else 1.0
            y = np.zeros_like(row)
            for e in sorted(chosen):
                y = y + probability[e] / total * self.gated(f.experts[e], row[None])[0]
            if f.shared is not None:
                weight = 1.0 if f.shared_gate is None else 1 / (1 + np.exp(-self.linear(f.shared_gate, row[None])[0]))
                y = y + weight * self.gated(f.shared, row[None])[0]
            rows.append(y)
        return np.stack(rows)


def _each_layer(change: Callable[[Layer], Layer]) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, layers=tuple(change(layer) for layer in plan.layers))


def _each_attention(change: Callable[[Attention], Attention]) -> Callable[[Plan], Plan]:
    return _each_layer(lambda layer: replace(layer, attention=change(layer.attention)))


def _rows(linear: Linear, order: np.ndarray) -> Linear:
    bias = None if linear.bias is None else linear.bias[order]
    return replace(linear, weight=Dense(np.ascontiguousarray(linear.weight.dense()[order])), bias=bias)


def _rope_base(a: Attention) -> Attention:
    """Another base: theta_i = base^(-2i/d) becomes theta_i^1.1, so that base becomes base^1.1."""
    return _rope_with(a, lambda rope: replace(rope, inverse_frequency=rope.inverse_frequency ** np.float32(1.1)))


def _rope_with(a: Attention, change: Callable[[Rope], Rope]) -> Attention:
    rope = change(a.rope)
    return replace(a, rope=rope if rope.longer is None else replace(rope, longer=change(rope.longer)))


def _rope_layout(a: Attention) -> Attention:
    """Neighbouring dimensions turn together, as in the original RoFormer and in GGUF's Llama files."""
    turning = 2 * len(a.rope.inverse_frequency)
    order = np.concatenate([np.arange(turning).reshape(-1, 2).T.reshape(-1), np.arange(turning, a.head_dim)])
    return replace(a, q=_rows(a.q, np.concatenate([h * a.head_dim + order for h in range(a.heads)])),
                   k=_rows(a.k, np.concatenate([h * a.head_dim + order for h in range(a.kv_heads)])))


def _head_order(a: Attention) -> Attention:
    """Query head j on key head j mod kv_heads; where every query head has its own, on the next one."""
    heads = np.arange(a.heads)
    heads = np.roll(heads, 1) if a.heads == a.kv_heads else heads.reshape(a.kv_heads, -1).T.reshape(-1)
    order = (heads[:, None] * a.head_dim + np.arange(a.head_dim)).reshape(-1)
    o = replace(a.o, weight=Dense(np.ascontiguousarray(a.o.weight.dense()[:, order])))
    return replace(a, q=_rows(a.q, order), o=o)


def _mask(a: Attention) -> Attention:
    """Causal: the future too. Sliding: one position too many. Full: no future."""
    other = {"causal": AttentionPolicy("full"), "full": AttentionPolicy("causal"),
             "sliding": AttentionPolicy("sliding", a.policy.window + 1)}
    return replace(a, policy=other[a.policy.kind])


def _eps(parameters: Norm) -> Norm:
    return replace(parameters, eps=parameters.eps * 10)


def _each_feed_forward(change: Callable[[FeedForward], FeedForward]) -> Callable[[Plan], Plan]:
    def of_layer(layer: Layer) -> Layer:
        f = layer.feed_forward
        if isinstance(f, FeedForward):
            return replace(layer, feed_forward=change(f))
        return replace(layer, feed_forward=replace(f, experts=tuple(map(change, f.experts)),
                                                   shared=None if f.shared is None else change(f.shared)))
    return _each_layer(of_layer)


def _each_experts(change: Callable[[Experts], Experts]) -> Callable[[Plan], Plan]:
    return _each_layer(lambda layer: layer if isinstance(layer.feed_forward, FeedForward)
                       else replace(layer, feed_forward=change(layer.feed_forward)))


def _turned(f: Experts) -> Experts:
    return replace(f, experts=f.experts[1:] + f.experts[:1])


def _one_less(f: Experts) -> Experts:
    """The most probable experts but the last; where there is one, the next one."""
    return replace(f, top_k=f.top_k - 1) if f.top_k > 1 else _turned(f)


def _function(f: FeedForward) -> FeedForward:
    return replace(f, function="gelu_tanh" if f.function != "gelu_tanh" else "gelu")


def _rotary_part(a: Attention) -> Attention:
    """Two dimensions less turn."""
    return _rope_with(a, lambda rope: replace(rope, inverse_frequency=rope.inverse_frequency[:-1]))


def _query_norm_order(a: Attention) -> Attention:
    """The two halves of the norm's weight exchanged."""
    half = len(a.q_norm.weight) // 2
    return replace(a, q_norm=replace(a.q_norm, weight=np.roll(a.q_norm.weight, half)))


def _less_one(parameters: Norm) -> Norm:
    return replace(parameters, weight=parameters.weight - np.float32(1))


def _each_bias(change: Callable[[RelativeBias], RelativeBias]) -> Callable[[Plan], Plan]:
    def of(plan: Plan) -> Plan:
        encoder = None if plan.encoder is None else of(plan.encoder)
        return replace(_each_attention(lambda a: a if a.bias is None else replace(a, bias=change(a.bias)))(plan),
                       encoder=encoder)
    return of


def _each_cross(change: Callable[[CrossAttention], CrossAttention]) -> Callable[[Plan], Plan]:
    return _each_layer(lambda layer: layer if layer.cross is None else replace(layer, cross=change(layer.cross)))


def _exchange_kinds(plan: Plan) -> Plan:
    """The layers' policies and rotary embeddings in the opposite order."""
    kinds = [(layer.attention.policy, layer.attention.rope) for layer in plan.layers][::-1]
    return replace(plan, layers=tuple(
        replace(layer, attention=replace(layer.attention, policy=policy, rope=rope))
        for layer, (policy, rope) in zip(plan.layers, kinds, strict=True)))


def _one_rope(plan: Plan) -> Plan:
    rope = plan.layers[-1].attention.rope
    return _each_attention(lambda a: replace(a, rope=rope))(plan)


def _exchange_reach(a: Attention) -> Attention:
    longer = a.rope.longer
    return replace(a, rope=replace(longer, longer=replace(a.rope, longer=None), reach=a.rope.reach))


MUTATIONS: dict[str, Callable[[Plan], Plan]] = {
    "rope base": _each_attention(_rope_base),
    "rope layout": _each_attention(_rope_layout),
    "rope attention factor": _each_attention(
        lambda a: _rope_with(a, lambda rope: replace(rope, attention_factor=rope.attention_factor * 1.05))),
    "head order": _each_attention(_head_order),
    "mask": _each_attention(_mask),
    "scale": _each_attention(lambda a: replace(a, scale=a.scale * 1.05)),
    "attention norm epsilon": _each_layer(lambda layer: replace(layer, attention_norm=_eps(layer.attention_norm))),
    "feed-forward norm epsilon": _each_layer(
        lambda layer: replace(layer, feed_forward_norm=_eps(layer.feed_forward_norm))),
    "final norm epsilon": lambda plan: replace(plan, final_norm=_eps(plan.final_norm)),
    "embedding norm epsilon": lambda plan: replace(plan, embedding_norm=_eps(plan.embedding_norm)),
    "position offset": lambda plan: replace(plan, position_offset=plan.position_offset + 1),
    "norm order": _each_layer(lambda layer: replace(layer, order="post" if layer.order == "pre" else "pre")),
    "function": _each_feed_forward(_function),
    "rotary part": _each_attention(_rotary_part),
    "head norms left out": _each_attention(lambda a: replace(a, q_norm=None, k_norm=None)),
    "query norm order": _each_attention(_query_norm_order),
    "query norm epsilon": _each_attention(lambda a: replace(a, q_norm=_eps(a.q_norm))),
    "key norm epsilon": _each_attention(lambda a: replace(a, k_norm=_eps(a.k_norm))),
    "norm after attention left out": _each_layer(lambda layer: replace(layer, after_attention=None)),
    "norm after feed-forward left out": _each_layer(lambda layer: replace(layer, after_feed_forward=None)),
    "norms before and after exchanged": _each_layer(lambda layer: replace(
        layer, feed_forward_norm=layer.after_attention, after_attention=layer.feed_forward_norm)),
    "norm without one": _each_layer(lambda layer: replace(layer, attention_norm=_less_one(layer.attention_norm))),
    "embedding scale": lambda plan: replace(plan, embedding_scale=1.0),
    "kinds of layers exchanged": _exchange_kinds,
    "one rotary embedding": _one_rope,
    "long and short exchanged": _each_attention(_exchange_reach),
    "gate and up exchanged": _each_feed_forward(lambda f: replace(f, gate=f.up, up=f.gate)),
    "one expert less": _each_experts(_one_less),
    "experts in another order": _each_experts(_turned),
    "probabilities normalised or not": _each_experts(lambda f: replace(f, normalise=not f.normalise)),
    "shared expert left out": _each_experts(lambda f: replace(f, shared=None)),
    "shared expert not gated": _each_experts(lambda f: replace(f, shared_gate=None)),
    "distances the other way": _each_bias(lambda b: replace(b, table=np.roll(b.table, len(b.table) // 2, axis=0))),
    "biases of other heads": _each_bias(lambda b: replace(b, table=np.roll(b.table, 1, axis=1))),
    "nearer distances are one": _each_bias(lambda b: replace(b, most=max(b.most * 2 // 3, len(b.table) // 2 + 1))),
    "distances of one direction": _each_bias(lambda b: replace(b, bidirectional=not b.bidirectional)),
    "cross-attention left out": _each_layer(lambda layer: replace(layer, cross=None)),
    "cross-attention scaled": _each_cross(lambda c: replace(c, scale=c.head_dim**-0.5)),
    "cross norm epsilon": _each_cross(lambda c: replace(c, norm=_eps(c.norm))),
    "logit scale": lambda plan: replace(plan, logit_scale=1.0),
    "query bias left out": _each_attention(lambda a: replace(a, q=replace(a.q, bias=None))),
}
"""Name -> a function that returns the plan with one mistake in it. The plan given is not modified."""


def mutations_of(plan: Plan) -> list[str]:
    """The names of MUTATIONS that change this plan: a BERT has no rotary embedding, a Llama no position table."""
    absent: set[str] = set()
    if plan.layers[0].attention.rope is None:
        absent |= {"rope base", "rope layout", "rope attention factor"}
    if all(layer.attention.kv_heads == 1 and layer.attention.heads > 1 for layer in plan.layers):
        absent.add("head order")  # every query head has the one key head
    if plan.final_norm is None:
        absent.add("final norm epsilon")
    if plan.embedding_norm is None:
        absent.add("embedding norm epsilon")
    if plan.position_embedding is None:
        absent.add("position offset")
    first = plan.layers[0]
    if first.attention.q_norm is None:
        absent |= {"head norms left out", "query norm order", "query norm epsilon", "key norm epsilon"}
    if first.after_attention is None:
        absent |= {"norm after attention left out", "norm after feed-forward left out",
                   "norms before and after exchanged"}
    if first.attention.rope is None or first.attention.rope.longer is None:
        absent.add("long and short exchanged")
    if first.attention.rope is None:
        absent.add("rotary part")
    ropes = {id(layer.attention.rope) for layer in plan.layers}
    policies = [layer.attention.policy for layer in plan.layers]
    if len(ropes) == 1:
        absent.add("one rotary embedding")
    if policies == policies[::-1] and len(ropes) == 1:
        absent.add("kinds of layers exchanged")
    if plan.embedding_scale == 1.0:
        absent.add("embedding scale")
    if any(f.gate is None for layer in plan.layers for f in layer.feed_forwards):
        absent.add("gate and up exchanged")
    routed = [layer.feed_forward for layer in plan.layers if isinstance(layer.feed_forward, Experts)]
    if not routed:
        absent |= {"one expert less", "experts in another order", "probabilities normalised or not"}
    if not routed or routed[0].shared is None:
        absent |= {"shared expert left out", "shared expert not gated"}
    if first.attention.bias is None:
        absent |= {"distances the other way", "biases of other heads", "nearer distances are one",
                   "distances of one direction"}
    if first.cross is None:
        absent |= {"cross-attention left out", "cross-attention scaled", "cross norm epsilon"}
    if plan.logit_scale == 1.0:
        absent.add("logit scale")
    if first.attention.q.bias is None:
        absent.add("query bias left out")
    if first.attention_norm.kind == "layer":
        absent.add("norm without one")
    return [name for name in MUTATIONS if name not in absent]
