"""From a source to a model that answers: read, plan, pack, and divide the memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from edgewise.core.activation import activations_of
from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import BudgetError, InvalidValueError, notice
from edgewise.core.numbers import BF16, FP16, FP32, NumberFormat, QuantFormat, float32_to_bf16, quantize
from edgewise.core.storage import Dense, QuantizedTensor, Stored
from edgewise.core.values import dataclass
from edgewise.data.chat import chat_template_of
from edgewise.data.tokenizer import Tokenizer, tokenizer_of
from edgewise.engine.archs import plan_of
from edgewise.engine.build import build_model, linears_of, low_rank_of, packed_parts
from edgewise.engine.memory import kv_bytes, scratch_bytes
from edgewise.engine.model import KV_FORMATS, LanguageModel, native_errors
from edgewise.engine.packing import Recipe, layout_of, pack_all, packing, recipe_of, unique
from edgewise.engine.plan import (
    Activation,
    AttentionPolicy,
    Experts,
    Layer,
    Linear,
    Plan,
    endless,
    for_context,
    plan_with,
    with_attention,
)
from edgewise.engine.sparse import dense_plan, shapes_in, with_input_sparsity
from edgewise.engine.static import with_static
from edgewise.engine.tuning import Tuning, stored_tuning
from edgewise.formats.cache import files_key
from edgewise.formats.sources import open_checkpoint
from edgewise.measure.cores import usable_cores
from edgewise.native import _core  # type: ignore[attr-defined]

__all__ = ["load", "model_of", "session_of"]

Progress = Callable[[str, int, int], None]
_ACTIVATIONS: tuple[Activation, ...] = ("int8", "float32")
"""What a quantised weight may run on."""
PLAIN = {"fp32": FP32, "fp16": FP16, "bf16": BF16}
"""Formats without a scale, by the names that `format` takes."""
ENDLESS = 1 << 30
"""Positions of a sequence whose memory does not depend on them."""
SMALLEST_CONTEXT = 256
"""What --memory may shrink the context to before it is an error."""


def load(source: str | os.PathLike[str], format: str | QuantFormat | None = None, memory_bytes: int | None = None,
         threads: int | None = None, context: int | None = None, kv: str | None = None, *,
         activations: Activation | None = None, attention: str | AttentionPolicy | None = None,
         input_sparsity: bool = True, batch: int | None = None, slots: int = 1, cache: bool = True,
         offline: bool | None = None, tuning: Tuning | None = None, progress: Progress | None = None) -> LanguageModel:
    """Open a model by path, short name, hub repository or wheel, ready to run.

    format: round every linear of the layers to this format: "int4/g32/fp16/min", or without a scale "fp32", "fp16" or
    "bf16"; with "bf16" the linears' inputs are bfloat16 too.
    memory_bytes: cap on weights + KV cache + scratch; the context shrinks to fit when it is not given.
    A model that `edgewise fit` wrote brings its own kv, and its context and memory where neither is given.
    threads: physical cores that this process may use, by default. context: positions, at most the model's own.
    kv: "bf16", "fp16", "fp32", "int8" or "int4", by default as `default_kv` says; in "bf16" queries and the weights of
    positions are rounded too. An encoder-decoder has `context` positions for the text and as many for the answer.
    slots: sequences held at a time, and by an encoder read at a time.
    attention: "sink=4,window=512" keeps the first four positions and the last 512, where a text goes on without end in
    constant memory; "full", all. By default as the model's files say.
    activations: "float32" runs quantised weights on float inputs, slower and without the rounding of "int8".
    input_sparsity: decode with the thresholds of a model that has them; without, every input is read.
    cache: map weights packed by an earlier start. tuning: by default what this machine was tuned to.
    Raises SourceError, FormatError, UnsupportedError, BudgetError.
    """
    def opened() -> Checkpoint:
        return open_checkpoint(os.fspath(source), offline=offline, progress=progress)

    with _uncollected():
        model = model_of(source if isinstance(source, Checkpoint) else opened(), format=format,
                         memory_bytes=memory_bytes, threads=threads, context=context, kv=kv, activations=activations,
                         attention=attention, input_sparsity=input_sparsity, batch=batch, slots=slots, cache=cache,
                         tuning=tuning, progress=progress)
    model.packed.map_now()
    return model


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: a vocabulary is a hundred thousand objects without a cycle among them, and
    looking for one again and again takes as long as making them."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def model_of(checkpoint: Checkpoint, *, format: str | QuantFormat | None = None, memory_bytes: int | None = None,
             threads: int | None = None, context: int | None = None, kv: str | None = None,
             activations: Activation | None = None, attention: str | AttentionPolicy | None = None,
             input_sparsity: bool = True, batch: int | None = None, slots: int = 1, cache: bool = True,
             tuning: Tuning | None = None,
             progress: Progress | None = None) -> LanguageModel:
    """As `load`, from a Checkpoint at hand."""
    if threads is not None and not 1 <= threads <= 256:
        raise InvalidValueError(f"threads is 1 to 256; given {threads}")
    if slots < 1:
        raise InvalidValueError(f"a model holds at least one sequence; given slots={slots}")
    if context is not None and context < 1:
        raise InvalidValueError(f"a context has at least one position; given {context}")
    tuning = stored_tuning() if tuning is None else tuning
    threads = threads or tuning.threads or usable_cores().usable
    plan = with_static_of(checkpoint, plan_of(checkpoint), wanted=format is None and activations is None)
    if format is not None:
        plan = formatted(plan, format)
    if activations is not None:
        if activations not in _ACTIVATIONS:
            hint = "; bfloat16 inputs come with format='bf16'" if activations == "bfloat16" else ""
            raise InvalidValueError(f"activations are {' or '.join(_ACTIVATIONS)}; given {activations!r}{hint}")
        chosen = activations

        def running(source: Linear) -> Linear:
            return replace(source, activation=chosen)

        plan = replace(plan_with(plan, running), head=None if plan.head is None else running(plan.head))
    if not input_sparsity:
        plan = dense_plan(plan)
    plan = with_input_sparsity(plan, checkpoint.source)
    encoder = plan.kind == "encoder"
    fitted = fitted_run(checkpoint)
    policy = attention if attention is not None else fitted.attention
    if policy is not None:
        policy = AttentionPolicy.parse(policy) if isinstance(policy, str) else policy
        plan = with_attention(plan, policy)
    if any(layer.rounding is not None and layer.rounding.attends for layer in plan.layers):
        if kv is not None:
            notice("ignored", f"KV format {kv!r}: attention in integers keeps the codes of eight bits it is made of",
                   where="kv")
        kv = "int8"
    kv = kv or fitted.kv or default_kv(plan)
    if kv not in KV_FORMATS:
        raise InvalidValueError(f"KV format {kv!r}: expected {', '.join(KV_FORMATS)}")
    most: int | None = None
    if context is None and memory_bytes is None:
        most, memory_bytes = fitted.context, fitted.memory_bytes

    recipes, names = recipes_of(plan)
    weight_bytes = layout_of(recipes)[1]
    if memory_bytes is None and not encoder:
        batch = batch or tuning.batch
    context, batch = divide_memory(plan, weight_bytes, kv, memory_bytes, context, batch, slots, threads, most=most)

    files = checkpoint.files if cache and format is None else ()
    with packing(recipes, key=(lambda: files_key(files)) if files else None,
                 huge_pages=tuning.huge_pages is not False, progress=progress) as packing_done:
        # Before the weights are mapped: building a tokenizer takes several times what it keeps.
        tokenizer: Tokenizer | None = tokenizer_of(checkpoint) if "tokenizer" in checkpoint.metadata else None
        template = None if tokenizer is None or plan.kind != "decoder" else chat_template_of(checkpoint, tokenizer)
        plan = for_context(plan, context)
        packed = packing_done()
    model = build_model(plan, packed, names)
    with native_errors():
        reader, source = None, 0
        if plan.encoder is not None:  # a text is read whole; the two take turns, with the same threads
            reader = _core.Session(build_model(plan.encoder, packed, names), "fp32", context, 1, threads, context,
                                   tuning=tuning.native)
            source = context
        session = _core.Session(model, kv, context, slots, threads, batch, source, reader, tuning.native)
    return LanguageModel(checkpoint=without_tensors(checkpoint), session=session, native=model, packed=packed,
                         tokenizer=tokenizer, template=template, kind=plan.kind, kv=kv, hidden=plan.hidden,
                         vocab=plan.vocab, sites=tuple(sites_of(layer) for layer in plan.layers), encoder=reader,
                         start=plan.start, tuning=tuning, shapes=tuple(shapes_in(layer) for layer in plan.layers),
                         attention="full" if policy is None or policy.kind != "sinks" else str(policy),
                         endless=endless(plan))


def default_kv(plan: Plan) -> str:
    """A decoder's cache in bf16; in fp16 where all linears take float32 inputs: attention rounds nothing else then.

    An encoder's keys and values in fp32, and in bf16 where its linears take bfloat16: int8 inputs leave no room below
    a cosine of 0.999. An encoder-decoder's scores are not divided by the root of the head size: they keep their bits.
    """
    inputs = {linear.activation for linear in linears_of(plan)}
    if plan.kind == "encoder":
        return "bf16" if "bfloat16" in inputs else "fp32"
    return "bf16" if plan.kind == "decoder" and inputs != {"float32"} else "fp16"


def with_static_of(checkpoint: Checkpoint, plan: Plan, *, wanted: bool) -> Plan:
    """The plan with the static activations that the checkpoint names; not wanted: without, and a notice."""
    sites = activations_of(checkpoint.config)
    if sites and not wanted:
        notice("ignored", f"{len(sites)} static activations of the model: weights or inputs were asked for in another "
               "form", where=checkpoint.source)
        return plan
    return with_static(plan, sites)


def recipes_of(plan: Plan) -> tuple[dict[str, Recipe], dict[int, str]]:
    """How each weight of a plan is packed, by name; and the name of each stored object, by id()."""
    apart = packed_parts(plan)

    def parts(linear: Linear) -> list[tuple[str, Stored]]:
        """By name: the weight, or what it is made of."""
        own = apart.get(id(linear.weight), (("", linear.weight),))
        return [*((f"{linear.key}{part}", stored) for part, stored in own), *low_rank_of(linear)]

    weights = unique(part for linear in linears_of(plan) for part in parts(linear))
    pairs = {id(stored) for linear in linears_of(plan) if linear.activation == "bfloat16"
             for _, stored in parts(linear)}
    tables = [table for table in (plan, plan.encoder) if table is not None]
    multiplied = {id(stored) for linear in linears_of(plan) if all(linear is not t.embedding for t in tables)
                  for _, stored in parts(linear)}
    return ({name: recipe_of(name, stored, pairs=id(stored) in pairs, table=id(stored) not in multiplied)
             for name, stored in weights.items()},
            {id(stored): name for name, stored in weights.items()})


def session_of(plan: Plan, *, kv: str = "fp32", context: int | None = None, batch: int = 256, slots: int = 1,
               threads: int = 1, tuning: Tuning | None = None) -> Any:
    """A native Session over a Plan, packed in memory: for plans that come from elsewhere than a checkpoint.

    tuning: by default none, whatever is stored.
    """
    tuning = tuning or Tuning()
    recipes, names = recipes_of(plan)
    context = context or plan.context
    with native_errors():
        packed = pack_all(recipes, key=None, huge_pages=tuning.huge_pages is not False)
        model = build_model(for_context(plan, context), packed, names)
        return _core.Session(model, kv, context, slots, threads, batch, tuning=tuning.native)


def sites_of(layer: Layer) -> dict[str, tuple[str, ...]]:
    """The linears of a layer by what they read, under the names of the session's capture."""
    attention, ffn = layer.attention, layer.feed_forward
    sites: dict[str, tuple[Linear, ...]] = {}
    if attention is not None:
        sites = {"attention": (attention.q, attention.k, attention.v), "output": (attention.o,)}
    if isinstance(ffn, Experts):  # an expert sees some of the tokens only: what it sees is not captured
        sites["feed_forward"] = (ffn.router,) if ffn.shared_gate is None else (ffn.router, ffn.shared_gate)
    elif ffn is not None:
        sites["feed_forward"] = (ffn.up,) if ffn.gate is None else (ffn.gate, ffn.up)
        sites["down"] = (ffn.down,)
    # Linears that lie in one weight share its name.
    return {site: tuple(dict.fromkeys(linear.name for linear in linears)) for site, linears in sites.items()}


def without_tensors(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint's description alone: the packed weights replace its tensors."""
    return replace(checkpoint, tensors={})


def formatted(plan: Plan, format: str | QuantFormat) -> Plan:
    """Every linear of the layers in a format, as `load` takes it; embedding, head and routers stay as stored."""
    number = PLAIN.get(format.strip().lower()) if isinstance(format, str) else None
    if number is not None:
        return in_floats(plan, number)
    return requantised(plan, QuantFormat.parse(format) if isinstance(format, str) else format)


def in_floats(plan: Plan, number: NumberFormat) -> Plan:
    """Every linear of the layers as plain FP32, FP16 or BF16, rounded to nearest; in BF16 on inputs in BF16."""
    notice("info", f"weights in {number}" + (", and the inputs they are multiplied with" if number == BF16 else ""),
           where="load")

    def plain(source: Linear) -> Linear:
        values = np.asarray(source.weight.dense(), np.float32)
        if number == BF16:
            return replace(source, weight=Dense(float32_to_bf16(values), BF16), activation="bfloat16")
        if number == FP16 and (peak := float(np.abs(values).max(initial=0.0))) > FP16.max_value:
            raise InvalidValueError(f"{source.name} holds {peak:.4g}, which fp16 ends before ({FP16.max_value:.0f}); "
                                    "take bf16 or fp32")
        return replace(source, weight=Dense(values.astype(np.float16) if number == FP16 else values, number),
                       activation="float32")

    return _with_linears(plan, plain)


def _with_linears(plan: Plan, change: Callable[[Linear], Linear]) -> Plan:
    """The plan with every linear of its layers changed but the routers of experts."""
    kept = {id(router) for layer in plan.layers if isinstance(layer.feed_forward, Experts)
            for router in (layer.feed_forward.router, layer.feed_forward.shared_gate)}
    return plan_with(plan, lambda source: source if id(source) in kept else change(source))


def requantised(plan: Plan, fmt: QuantFormat) -> Plan:
    """Every linear of the layers rounded to nearest under `fmt`; embedding, head and routers stay as stored."""
    notice("info", f"weights requantised to {fmt} by rounding to nearest", where="load")

    def rounded(source: Linear) -> Linear:
        codes, scales, zero = quantize(np.asarray(source.weight.dense()), fmt)
        weight = QuantizedTensor(codes, scales, fmt, zeros=zero if fmt.zero == "int" else None,
                                 minima=zero if fmt.zero == "min" else None)
        return replace(source, weight=weight, activation="int8")

    return _with_linears(plan, rounded)


@dataclass(frozen=True)
class FittedRun:
    """How a model that `edgewise fit` wrote is meant to run: config.json's "edgewise_run". None: not said."""

    kv: str | None = None
    context: int | None = None
    memory_bytes: int | None = None
    attention: str | None = None


def fitted_run(checkpoint: Checkpoint) -> FittedRun:
    """What the checkpoint says of itself; values of other kinds than expected are ignored with a notice."""
    said = checkpoint.config.get("edgewise_run")
    if said is None:
        return FittedRun()
    kinds = {"kv": str, "context": int, "memory_bytes": int, "attention": str}
    known = {key: said[key] for key, kind in kinds.items() if type(said.get(key)) is kind and said[key] not in ("", 0)
             } if isinstance(said, dict) else {}
    if not isinstance(said, dict) or known.keys() != said.keys():
        notice("ignored", f"of edgewise_run {str(said)[:120]} only {', '.join(known) or 'nothing'} is understood",
               where=checkpoint.source)
    return FittedRun(**known)


def divide_memory(plan: Plan, weight_bytes: int, kv: str, memory_bytes: int | None, context: int | None,
                  batch: int | None, slots: int, threads: int, *, most: int | None = None) -> tuple[int, int]:
    """(context, batch) that fit: weights + KV + scratch <= memory_bytes.

    An encoder sees whole sequences in one pass, as many as it has slots, so its batch is its context times these.
    most: the context of a fitted model, which gives way where more threads leave less memory.
    """
    own = ENDLESS if endless(plan) else plan.context
    limit = own if most is None else min(max(most, 1), own)
    if plan.position_embedding is not None:
        limit = min(limit, len(plan.position_embedding) - plan.position_offset)
    wanted = min(context or limit, limit)
    if plan.kind == "encoder-decoder" and context is not None and context > limit:
        notice("info", f"the model was made for texts of {limit} tokens; distances beyond are as the furthest it knows",
               where="context")
        limit = wanted = context
    if context is not None and context > limit:
        notice("clamp", f"the model has {limit} positions; the context is {limit}, not {context}", where="context")

    def needed(positions: int, tokens: int) -> int:
        return (weight_bytes + kv_bytes(plan, kv, positions, slots, tokens)
                + scratch_bytes(plan, positions, tokens, threads, kv=kv, slots=slots))

    if plan.kind == "encoder":
        if batch not in (None, wanted):
            notice("ignored", f"an encoder reads its whole context of {wanted} in one pass, not {batch} tokens",
                   where="batch")
        batch = wanted * slots
        if memory_bytes is not None and needed(wanted, batch) > memory_bytes:
            raise _too_little(memory_bytes, needed(wanted, batch), weight_bytes, wanted)
        return wanted, batch
    if memory_bytes is None:
        return wanted, batch or 256
    # Prefill is faster in long passes, but a token of context is worth more than a token of batch.
    batches = [batch] if batch else [256, 128, 64, 32, 16]
    floor = wanted if context is not None else min(SMALLEST_CONTEXT, wanted)
    if most is not None:
        fitting = [tokens for tokens in batches if needed(wanted, tokens) <= memory_bytes]
        if fitting:
            return wanted, fitting[0]
    for tokens in batches:
        if needed(floor, tokens) > memory_bytes:
            continue
        low, high = floor, wanted
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if needed(middle, tokens) <= memory_bytes else (low, middle - 1)
        if low < wanted:
            notice("clamp", f"the context is {low} of the model's {wanted} positions, to stay within "
                   f"{memory_bytes / 1e6:.1f} MB", where="memory")
        return low, tokens
    raise _too_little(memory_bytes, needed(floor, batches[-1]), weight_bytes, floor)


def _too_little(memory_bytes: int, needed_bytes: int, weight_bytes: int, context: int) -> BudgetError:
    return BudgetError(
        f"{memory_bytes / 1e6:.1f} MB of memory are too little: weights {weight_bytes / 1e6:.1f} MB and a context of "
        f"{context} positions need {needed_bytes / 1e6:.1f} MB; give more, take a smaller context or KV format "
        "(--context, --kv int8), or shrink the model with: edgewise fit")

