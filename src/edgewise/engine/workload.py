"""The Workload of a Plan: what one decode step or one prefill reads and computes, linear by linear.

A pass reads each weight once, and the keys and values that its tokens see. An embedding table gives one row per token,
unless it is the head as well. Of routed experts the chosen ones are read in decode, all of them in a long prefill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgewise.core.errors import InvalidValueError
from edgewise.core.workload import Op, Workload
from edgewise.engine.memory import kv_bytes
from edgewise.engine.plan import Attention, AttentionPolicy, CrossAttention, Experts, FeedForward, Layer, Linear, Plan

__all__ = ["arithmetic", "workload_of", "workload_of_text"]


def workload_of(plan: Plan, matrices: Mapping[str, Any], *, tokens: int = 1, depth: int = 0, batch: int = 256,
                kv: str = "fp16", int8: bool | None = None, source: int | None = None) -> Workload:
    """tokens: read after `depth` others, `batch` in a pass; one token is a decode step, with logits.

    source: of an encoder-decoder, tokens of the text that the answer is to; the work is then that of the answer alone,
    and `workload_of_text` gives that of the text.

    matrices: packed weights by name, each with rows, cols, nbytes. A weight that lies in another's place (a tied head)
    is not among them. int8: whether the linears of the layers multiply integers; by default as the plan says.
    Ops are named after the tensors; "attention" ops carry the bytes of keys and values that are read.
    """
    if tokens < 1 or depth < 0 or batch < 1:
        raise InvalidValueError(f"a workload has at least one token, no negative depth, and a batch; given {tokens}, "
                                f"{depth}, {batch}")
    if (plan.encoder is None) != (source is None) or (source is not None and source < 1):
        raise InvalidValueError("the work of an encoder-decoder depends on two lengths: give the tokens of its text as "
                                f"source, at least 1, and of no other kind; given {source} for a {plan.kind}")
    passes = -(-tokens // batch)

    def linear(source: Linear, rows_in: float, *, name: str = "", reads: float = 1, kind: bool | None = int8) -> Op:
        return _linear(matrices, source, rows_in, name=name, reads=reads, tokens=tokens, int8=kind)

    def gated(ffn: FeedForward, share: float = 1.0) -> list[Op]:
        parts = [ffn.up, ffn.down] if ffn.gate is None else [ffn.gate, ffn.up, ffn.down]
        # An expert that any token of a pass chooses is read whole.
        reads = passes * (1 - (1 - share) ** min(tokens, batch))
        return [linear(part, tokens * share, reads=reads) for part in parts]

    ops = [Op(plan.embedding.name, "embedding", weight_bytes=round(
        matrices[plan.embedding.key].nbytes / plan.vocab * tokens))]
    for layer in plan.layers:
        attention = layer.attention
        if attention is not None:
            ops += [linear(part, tokens, reads=passes) for part in (attention.q, attention.k, attention.v)]
            ops.append(_attention(plan, layer, attention, tokens, depth, batch, kv))
            ops.append(linear(attention.o, tokens, reads=passes))
        if layer.cross is not None and source is not None:
            ops.append(linear(layer.cross.q, tokens, reads=passes))
            ops.append(_across(plan, layer, layer.cross, tokens, source, kv, passes))
            ops.append(linear(layer.cross.o, tokens, reads=passes))
        ffn = layer.feed_forward
        if isinstance(ffn, Experts):
            ops.append(linear(ffn.router, tokens, reads=passes, kind=False))
            for expert in ffn.experts:
                ops += gated(expert, ffn.top_k / len(ffn.experts))
            if ffn.shared is not None:
                ops += gated(ffn.shared)
        elif ffn is not None:
            ops += gated(ffn)
    if plan.head is not None:
        tied = plan.head.weight is plan.embedding.weight
        ops.append(linear(plan.head, 1, name=plan.embedding.key if tied else plan.head.key, kind=None))
    return Workload(plan.arch, "prefill" if tokens > 1 else "decode", tuple(ops))


def workload_of_text(plan: Plan, matrices: Mapping[str, Any], *, tokens: int, kv: str = "fp16",
                     int8: bool | None = None) -> Workload:
    """What an encoder-decoder does with a text of so many tokens: the encoder's work, and each layer's keys and values
    of its states, which are written for the answer."""
    if plan.encoder is None:
        raise InvalidValueError(f"a {plan.kind} has no text beside its answer; workload_of gives its work")
    read = workload_of(plan.encoder, matrices, tokens=tokens, batch=tokens, kv="fp32", int8=int8)
    across = [_linear(matrices, part, tokens, tokens=tokens, int8=int8)
              for layer in plan.layers if layer.cross is not None for part in (layer.cross.k, layer.cross.v)]
    return replace(read, ops=(*read.ops, *across))


def _linear(matrices: Mapping[str, Any], source: Linear, rows_in: float, *, tokens: int, int8: bool | None,
            name: str = "", reads: float = 1) -> Op:
    own = [matrices[key] for key in ([name or source.key] if (name or source.key) in matrices else [])]
    # A product of two matrices, alone or beside a weight, is under their names.
    own += [matrices[f"{source.key}{part}"] for part in (".left", ".right") if f"{source.key}{part}" in matrices]
    out, inputs = source.weight.shape
    whole = source.activation in ("int8", "static") if int8 is None else int8
    macs = round(sum(matrix.rows * matrix.cols for matrix in own) * rows_in)
    return Op(source.name, "linear", ((tokens, inputs), (tokens, out)), macs,
              round(sum(matrix.nbytes for matrix in own) * reads), 0, 0, "int8" if whole else "fp32")


def _across(plan: Plan, layer: Layer, cross: CrossAttention, tokens: int, source: int, kv: str, passes: int) -> Op:
    """Every token sees the whole text, whose keys and values each pass reads."""
    both = replace(plan, layers=(layer,), encoder=None)
    read = kv_bytes(both, kv, source) - kv_bytes(replace(both, layers=(replace(layer, cross=None),)), kv, source)
    return Op("cross", "attention", ((tokens, cross.heads, cross.head_dim),),
              2 * cross.heads * cross.head_dim * source * tokens, 0, read * passes, 0, "fp32")


def _attention(plan: Plan, layer: Layer, attention: Attention, tokens: int, depth: int, batch: int, kv: str) -> Op:
    seen = sum(_visible(attention, depth + i, depth + tokens) for i in range(tokens))
    seeing = replace(layer, cross=None, attention=replace(attention, policy=AttentionPolicy(
        "full" if attention.policy.kind == "full" else "causal")))
    alone = replace(plan, layers=(seeing,), encoder=None)
    # The tokens of a pass share what they read: the pass reads what its last token sees, and its own.
    ends = range(min(batch, tokens), tokens + 1, batch) if tokens > batch else (tokens,)
    read = sum(kv_bytes(alone, kv, _visible(attention, depth + end - 1, depth + tokens)) for end in ends)
    macs = attention.heads * (attention.head_dim + attention.value_width) * seen
    return Op("attention", "attention", ((tokens, attention.heads, attention.head_dim),), macs, 0, read, 0, "fp32")


def _visible(attention: Attention, position: int, length: int) -> int:
    """Positions that the token at `position` sees, itself included."""
    if attention.policy.kind == "full":
        return length
    if attention.policy.kind == "causal":
        return position + 1
    return min(position + 1, attention.policy.sinks + attention.policy.window)


def arithmetic(workload: Workload) -> dict[str, int]:
    """Operations by number format, two per multiply-add."""
    found: dict[str, int] = {}
    for op in workload.ops:
        if op.macs:
            found[op.number_format] = found.get(op.number_format, 0) + 2 * op.macs
    return found
