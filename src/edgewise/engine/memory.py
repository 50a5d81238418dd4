"""What a session will need, before it is made: the KV cache and the scratch buffers, in bytes.

These mirror the allocations of native/engine/session.cc; a test holds them against the session's own count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgewise.core.errors import collect_notices
from edgewise.core.numbers import BF16
from edgewise.core.storage import Dense, InputSparse, Stored
from edgewise.engine.build import linears_of, packed_parts, phases_of
from edgewise.engine.packing import recipe_of
from edgewise.engine.plan import Attention, AttentionPolicy, CrossAttention, Experts, Linear, Plan, endless

__all__ = ["kv_bytes", "scratch_bytes"]

_CHUNK = 256  # positions of one softmax partial
_GROUP = 64  # positions that are packed together in four bits
_MAX_QUERIES, _MAX_HEAD_DIM, _GROUPS_AT_ONCE = 12, 512, 8
_LOGITS_BYTES = 8 << 20


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _key_tile_bytes(kv: str, head_dim: int) -> int:
    """Sixteen positions of one head; in four bits, their part of a group."""
    if kv == "fp32":
        return 16 * head_dim * 4
    if kv == "fp16":
        return 16 * head_dim * 2
    if kv == "bf16":
        return 16 * _up(head_dim, 2) * 2
    padded = _up(head_dim, 32)
    return padded // 32 * (64 + 512) if kv == "int8" else 8 * padded + 4 * padded // (_GROUP // 16)


def _value_bytes(kv: str, value_dim: int) -> int:
    """One position of one head."""
    padded = _up(value_dim, 32)
    if kv == "fp32":
        return padded * 4
    if kv in ("fp16", "bf16"):
        return padded * 2
    return padded + padded // 32 * 4 if kv == "int8" else padded // 2 + 4


@dataclass(frozen=True)
class _Kept:
    """How a layer keeps the positions of one head: `room` of them as `far` says, and `sinks` and a group as `near`.

    parts: what one query meets at most, each with a partial softmax of its own.
    """

    far: str
    near: str
    room: int
    sinks: int
    newest: int
    parts: int

    def bytes(self, head_dim: int, value_dim: int) -> int:
        held = [(self.near, self.sinks), (self.far, self.room), (self.near, self.newest)]
        return sum(_up(positions // 16 * _key_tile_bytes(kv, head_dim), 64)
                   + _up(positions * _value_bytes(kv, value_dim), 64) for kv, positions in held)


def _kept(attention: Attention | CrossAttention, kv: str, context: int, batch: int, endless: bool) -> _Kept:
    policy = attention.policy if isinstance(attention, Attention) else AttentionPolicy("full")
    grouped = kv == "int4" and policy.kind != "full"
    ring = policy.kind == "sinks" or (endless and policy.kind == "sliding")
    if not grouped and not ring:  # what is there at once is never packed in four bits
        return _Kept("int8" if kv == "int4" else kv, kv, _up(context, 16), 0, 0, -(-context // _CHUNK))
    room = all_room = _up(context, _GROUP if grouped else 16)
    if ring:
        room = min(_up(policy.window + batch - 1, _CHUNK), all_room)
    span = room if policy.kind == "causal" else min(policy.window, room)
    sinks = policy.sinks if policy.kind == "sinks" else 16 if grouped else 0
    return _Kept(kv, "int8" if grouped else kv, room, _up(sinks, 16), _GROUP if grouped else 0,
                 3 + (span + _CHUNK - 2) // _CHUNK)


def kv_bytes(plan: Plan, kv: str, context: int, slots: int = 1, batch: int = 256) -> int:
    """Keys and values of every layer for `context` positions in each of `slots` sequences.

    batch: tokens of a pass, which a window makes room for. Of an encoder-decoder, keys and values of as many states of
    the encoder too, and the encoder's own, one text in float32.
    """
    total = 0 if plan.encoder is None else kv_bytes(plan.encoder, "fp32", context)
    constant = endless(plan)
    whole = {id(layer.attention) for layer in plan.layers if layer.rounding is not None and layer.rounding.attends}

    def head_bytes(attention: Attention | CrossAttention) -> int:
        if id(attention) not in whole:
            return _kept(attention, kv, context, batch, constant).bytes(attention.head_dim, _value_width(attention))
        room, padded = _up(context, 16), _up(attention.head_dim, 32)  # codes, and the sum of each key's
        return _up(room // 16 * (64 + 16 * padded), 64) + _up(room * padded, 64)

    return total + sum(slots * attention.kv_heads * head_bytes(attention) for attention in _attentions(plan))


def _attentions(plan: Plan) -> list[Attention | CrossAttention]:
    """Of every layer, those across included."""
    found: list[Attention | CrossAttention] = list(plan.attentions)
    return found + [layer.cross for layer in plan.layers if layer.cross is not None]


def _value_width(attention: Attention | CrossAttention) -> int:
    return attention.value_width if isinstance(attention, Attention) else attention.head_dim


def _fresh_bytes(plan: Plan, batch: int, slots: int) -> int:
    """Groups of a pass that are packed within it, in eight bits."""
    def newest(attention: Attention) -> int:
        return attention.kv_heads * _Kept("int8", "int8", 0, 0, _GROUP, 0).bytes(
            attention.head_dim, attention.value_width)

    attentions = [attention for attention in plan.attentions if attention.policy.kind != "full"]
    return (batch // _GROUP + min(slots, max(batch // 2, 1))) * max(map(newest, attentions), default=0)


def _inputs_bytes(tokens: int, cols: int, slots: int, bfloats: bool, codes: bool = False) -> int:
    """Activations of a pass as int8 with their scales and sums, as floats, and where a linear wants it as bfloat16 and
    as codes of a fixed grid."""
    blocks = _up(cols, 32) // 32
    cells = _up(tokens, slots) * blocks
    whole = _up(cells * 32, 64) + 6 * _up(cells * 4, 64)
    return whole * (1 + codes) + _up(cells * 32 * 4, 64) + bfloats * _up(cells * 32 * 2, 64)


def _chosen_bytes(plan: Plan, cols: int) -> int:
    """Of one thread, where weights lie input by input: what a token reads, and two slabs as rows."""
    slabs = [_slab_bytes(linear.weight) for linear in linears_of(plan) if isinstance(linear.weight, InputSparse)]
    if not slabs:
        return 0
    blocks = -(-cols // 32)
    chosen = sum(_up((blocks + 1) * each, 64) for each in (4, 128, 32)) + 3 * _up(blocks * 4, 64)
    return 3 * (chosen + 2 * _up(blocks * 128, 64) + 2 * _inputs_bytes(1, cols, 1, False)) + 2 * max(slabs)


def _slab_bytes(weight: InputSparse) -> int:
    """Of the rows of a slab, as panels of sixteen."""
    with collect_notices():
        native = recipe_of("", weight.weight).format
    return _up(int(native.nbytes(512 // native.bits, weight.shape[1])), 64)


def _kind(linear: Linear, stored: Stored) -> str:
    """What a matrix wants its inputs rounded to."""
    if linear.activation == "bfloat16" and isinstance(stored, Dense) and stored.number == BF16:
        return "bfloat16"
    return "float32" if isinstance(stored, Dense) or linear.activation != "int8" else "int8"


def _two_forms(plan: Plan) -> bool:
    """Whether a feed-forward's last linear and its second term want their inputs in two forms."""
    apart = packed_parts(replace(plan, encoder=None))
    downs = [part.down for layer in plan.layers for part in layer.feed_forwards]
    return any(len({_kind(linear, stored) for name, stored in apart.get(id(linear.weight), ()) if name != ".left"}) > 1
               for linear in downs)


def _between_bytes(plan: Plan, batch: int, threads: int) -> int:
    """What lies between the two matrices of factored linears: of a pass, and of one token in each thread."""
    apart = packed_parts(replace(plan, encoder=None))

    def kind_bytes(linear: Linear, left: Stored, tokens: int, slots: int) -> int:
        rank = left.shape[1]
        cells = _up(tokens, slots) * (_up(rank, 32) // 32)
        kind = _kind(linear, left)
        if kind == "int8":
            return _up(cells * 32, 64) + 6 * _up(cells * 4, 64)
        return _up(cells * 32 * (2 if kind == "bfloat16" else 4), 64)

    tile = one = width = 0
    for layer in plan.layers:
        for linears in phases_of(layer):
            lefts = [(linear, stored) for linear in linears
                     for name, stored in apart.get(id(linear.weight), ()) if name == ".left"]
            tile = max(tile, sum(kind_bytes(linear, left, 16, 16) for linear, left in lefts))
            one = max(one, sum(kind_bytes(linear, left, 1, 1) for linear, left in lefts))
            width = max(width, sum(_up(left.shape[1], 16) for _, left in lefts))
    if not width:
        return 0
    return -(-max(batch, 16) // 16) * tile + 4 * width + threads * (one + 4 * width)


def scratch_bytes(plan: Plan, context: int, batch: int, threads: int, *, kv: str = "fp16", slots: int = 1) -> int:
    """Buffers of a pass of `batch` tokens, of attention, logits and rotary tables; an encoder's own are added."""
    attentions = _attentions(plan)
    kinds = {linear.activation for linear in linears_of(replace(plan, encoder=None))}
    bfloats, codes = "bfloat16" in kinds, "static" in kinds
    widest = {id(attention): max(attention.head_dim, _value_width(attention)) for attention in attentions}
    q_width = max((attention.heads * widest[id(attention)] for attention in attentions), default=0)
    kv_width = max((attention.kv_heads * widest[id(attention)] for attention in attentions), default=0)
    ffn_width = max((part.up.weight.shape[0] for layer in plan.layers for part in layer.feed_forwards), default=0)
    read = max((attention.heads * _value_width(attention) for attention in attentions), default=0)
    cols = max(plan.hidden, read, ffn_width, 0 if plan.encoder is None else plan.encoder.hidden)
    routed = [layer.feed_forward for layer in plan.layers if isinstance(layer.feed_forward, Experts)]
    per_token = max((part.top_k + (part.shared is not None) for part in routed), default=0)
    rows = sum(_up(width, 16) for width in (plan.hidden, q_width, kv_width, kv_width, q_width))
    if routed or any(layer.after_attention or layer.after_feed_forward for layer in plan.layers):
        rows += _up(plan.hidden, 16)
    partial = max((attention.heads * _kept(attention, kv, context, batch, endless(plan)).parts
                   * (_up(attention.value_width, 32) + 2) for attention in plan.attentions), default=0)
    shared = _inputs_bytes(max(batch, 16), cols, 16, bfloats, codes)
    own = _inputs_bytes(1, cols, 1, bfloats, codes) + _up(cols, 16) * 4
    width = max((_up(dims, 32) for dims in widest.values()), default=0)
    queries = _MAX_QUERIES * max(3 * _MAX_HEAD_DIM, (2 * _GROUPS_AT_ONCE + 1) * width)
    softmax = (_MAX_QUERIES * _CHUNK + 16 * _MAX_HEAD_DIM + queries) * 4
    wide = _up(batch, 16) * max(per_token, 1) * _up(ffn_width, 32)
    total = (batch * rows + wide * (1 + _two_forms(plan))) * 4 + partial * 4 + shared + threads * (own + softmax)
    total += _between_bytes(plan, batch, threads)
    if any(layer.rounding is not None and layer.rounding.attends for layer in plan.layers):
        total += threads * (_up(context, 16) + 16) * 7  # scores, and probabilities in three pieces
    total += threads * _chosen_bytes(plan, cols)
    if plan.encoder is not None:
        total += scratch_bytes(plan.encoder, context, context, threads)
    if routed:
        scores = max(_up(len(part.experts), 16) + (16 if part.shared_gate is not None else 0) for part in routed)
        experts = max(len(part.experts) + (part.shared is not None) for part in routed)
        entries = batch * per_token
        tiles = (entries + 15 * min(entries, experts)) // 16  # each expert's tokens fill tiles of 16
        total += batch * scores * 4 + tiles * _inputs_bytes(16, cols, 16, bfloats, codes)
        total += threads * per_token * _inputs_bytes(1, cols, 1, bfloats, codes)
    if plan.head is not None:
        stride = _up(plan.vocab, 16) * 4
        total += min(max(_LOGITS_BYTES // stride, 1), 16) * stride
    ropes = {id(attention.rope): attention.rope for attention in plan.attentions if attention.rope}
    if kv == "int4":
        total += _fresh_bytes(plan, batch, slots)
    turns = context  # positions that are turned by tables; later ones by tables of the pass
    if endless(plan):
        policies = [attention.policy for attention in plan.attentions]
        reach = max(policy.sinks + policy.window for policy in policies)
        turns = reach + batch if reach < context else context
    return total + sum(2 * len(rope.inverse_frequency) * turns * 4 for rope in ropes.values())
