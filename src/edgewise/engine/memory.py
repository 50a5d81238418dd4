"""What a session will need, before it is made: the KV cache and the scratch buffers, in bytes.

These mirror the allocations of native/engine/session.cc; a test holds them against the session's own count.
"""

from __future__ import annotations

from dataclasses import replace

from edgewise.engine.build import linears_of
from edgewise.engine.plan import Attention, CrossAttention, Experts, Plan

__all__ = ["kv_bytes", "scratch_bytes"]

_CHUNK = 256  # positions of one softmax partial
_MAX_QUERIES, _MAX_HEAD_DIM = 12, 512
_LOGITS_BYTES = 8 << 20


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _key_tile_bytes(kv: str, head_dim: int) -> int:
    """Sixteen positions of one head."""
    if kv == "fp32":
        return 16 * head_dim * 4
    if kv == "fp16":
        return 16 * head_dim * 2
    if kv == "bf16":
        return 16 * _up(head_dim, 2) * 2
    codes = 512 if kv == "int8" else 256
    return _up(head_dim, 32) // 32 * (64 + codes)


def _value_bytes(kv: str, head_dim: int) -> int:
    """One position of one head."""
    padded = _up(head_dim, 32)
    if kv == "fp32":
        return padded * 4
    if kv in ("fp16", "bf16"):
        return padded * 2
    return (padded if kv == "int8" else padded // 2) + padded // 32 * 4


def kv_bytes(plan: Plan, kv: str, context: int, slots: int = 1) -> int:
    """Keys and values of every layer for `context` positions in each of `slots` sequences.

    Of an encoder-decoder, those of as many states of the encoder too, and the encoder's own, one text in float32.
    """
    total = 0 if plan.encoder is None else kv_bytes(plan.encoder, "fp32", context)
    context = _up(context, 16)
    for attention in _attentions(plan):
        keys = _up(context // 16 * _key_tile_bytes(kv, attention.head_dim), 64)
        values = _up(context * _value_bytes(kv, attention.head_dim), 64)
        total += slots * attention.kv_heads * (keys + values)
    return total


def _attentions(plan: Plan) -> list[Attention | CrossAttention]:
    """Of every layer, those across included."""
    found: list[Attention | CrossAttention] = [layer.attention for layer in plan.layers]
    return found + [layer.cross for layer in plan.layers if layer.cross is not None]


def _inputs_bytes(tokens: int, cols: int, slots: int, bfloats: bool) -> int:
    """Activations of a pass as int8 with their scales and sums, as floats, and as bfloat16 where a linear wants it."""
    blocks = _up(cols, 32) // 32
    cells = _up(tokens, slots) * blocks
    return _up(cells * 32, 64) + 6 * _up(cells * 4, 64) + _up(cells * 32 * 4, 64) + bfloats * _up(cells * 32 * 2, 64)


def scratch_bytes(plan: Plan, context: int, batch: int, threads: int) -> int:
    """Buffers of a pass of `batch` tokens, of attention, logits and rotary tables; an encoder's own are added."""
    attentions = _attentions(plan)
    bfloats = any(linear.activation == "bfloat16" for linear in linears_of(replace(plan, encoder=None)))
    q_width = max(attention.heads * attention.head_dim for attention in attentions)
    kv_width = max(attention.kv_heads * attention.head_dim for attention in attentions)
    ffn_width = max(part.up.weight.shape[0] for layer in plan.layers for part in layer.feed_forwards)
    cols = max(plan.hidden, q_width, ffn_width, 0 if plan.encoder is None else plan.encoder.hidden)
    routed = [layer.feed_forward for layer in plan.layers if isinstance(layer.feed_forward, Experts)]
    per_token = max((part.top_k + (part.shared is not None) for part in routed), default=0)
    rows = sum(_up(width, 16) for width in (plan.hidden, q_width, kv_width, kv_width, q_width))
    if routed or any(layer.after_attention or layer.after_feed_forward for layer in plan.layers):
        rows += _up(plan.hidden, 16)
    chunks = -(-context // _CHUNK)
    partial = max(layer.attention.heads * chunks * (_up(layer.attention.head_dim, 32) + 2) for layer in plan.layers)
    shared = _inputs_bytes(max(batch, 16), cols, 16, bfloats)
    own = _inputs_bytes(1, cols, 1, bfloats) + _up(cols, 16) * 4
    attention = (_MAX_QUERIES * _CHUNK + 16 * _MAX_HEAD_DIM + 3 * _MAX_QUERIES * _MAX_HEAD_DIM) * 4
    wide = _up(batch, 16) * max(per_token, 1) * _up(ffn_width, 32)
    total = (batch * rows + wide) * 4 + partial * 4 + shared + threads * (own + attention)
    if plan.encoder is not None:
        total += scratch_bytes(plan.encoder, context, context, threads)
    if routed:
        scores = max(_up(len(part.experts), 16) + (16 if part.shared_gate is not None else 0) for part in routed)
        experts = max(len(part.experts) + (part.shared is not None) for part in routed)
        entries = batch * per_token
        tiles = (entries + 15 * min(entries, experts)) // 16  # each expert's tokens fill tiles of 16
        total += batch * scores * 4 + tiles * _inputs_bytes(16, cols, 16, bfloats)
        total += threads * per_token * _inputs_bytes(1, cols, 1, bfloats)
    if plan.head is not None:
        stride = _up(plan.vocab, 16) * 4
        total += min(max(_LOGITS_BYTES // stride, 1), 16) * stride
    ropes = {id(layer.attention.rope): layer.attention.rope for layer in plan.layers if layer.attention.rope}
    return total + sum(2 * len(rope.inverse_frequency) * context * 4 for rope in ropes.values())
