"""Small random Plans in every storage form, without torch: what the tests of the native engine run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from edgewise.core.numbers import BF16, FP16, QuantFormat, quantize
from edgewise.core.storage import Dense, QuantizedTensor, Stored
from edgewise.engine.build import build_model
from edgewise.engine.loading import recipes_of
from edgewise.engine.packing import pack_all
from edgewise.engine.plan import (
    Attention,
    AttentionPolicy,
    CrossAttention,
    FeedForward,
    Layer,
    Linear,
    Norm,
    Plan,
    RelativeBias,
    Rope,
)
from edgewise.formats.ggml_blocks import READ, WRITTEN, codec, encode, stored_of
from edgewise.native import _core

__all__ = ["MIXED", "answer", "biased", "decoder", "encoder", "encoder_decoder", "ids_for", "logits", "read",
           "sessions", "stored", "weights"]

MIXED = {"q": "Q4_K", "k": "Q6_K", "v": "F16", "o": "Q4_1", "gate": "Q5_K", "up": "MXFP4", "down": "Q2_K",
         "embedding": "BF16", "head": "Q8_0"}
"""Another storage form for every linear. Q4_K and its kind need inputs in multiples of 256."""


def weights(rng: np.random.Generator, rows: int, cols: int, peak: float = 1.0) -> np.ndarray:
    return (peak * rng.standard_normal((rows, cols)) / cols**0.5).astype(np.float32)


def stored(values: np.ndarray, form: str) -> Stored:
    """values (rows, cols) in a form: F32, F16, BF16, a GGUF block type, or a QuantFormat as text.

    Block types that are read but not written get random codes under scales of about the same size.
    """
    if form == "F32":
        return Dense(values)
    if form == "F16":
        return Dense(values.astype(np.float16), FP16)
    if form == "BF16":
        return Dense((values.view(np.uint32) >> 16).astype(np.uint16), BF16)
    if form in WRITTEN:
        return encode(values, form)
    if form in READ:
        return stored_of(form, _random_blocks(values, form), values.shape)
    fmt = QuantFormat.parse(form)
    codes, scales, zero = quantize(values, fmt)
    return QuantizedTensor(codes, scales, fmt, zeros=zero if fmt.zero == "int" else None,
                           minima=zero if fmt.zero == "min" else None)


def _random_blocks(values: np.ndarray, form: str) -> np.ndarray:
    kind = codec(form)
    rows, cols = values.shape
    rng = np.random.default_rng(rows * cols)
    raw = rng.integers(0, 256, (rows, cols // kind.block, kind.block_nbytes), dtype=np.uint8)
    at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(form, 0)
    halves = 2 if form in ("Q2_K", "Q4_K", "Q5_K") else 1
    largest = {"Q2_K": 45, "Q3_K": 124, "Q4_K": 945, "Q5_K": 1953, "Q6_K": 4064, "IQ4_NL": 127}[form]
    size = np.abs(values).max() / largest
    scales = rng.uniform(0.2 * size, size, (*raw.shape[:2], halves)).astype(np.float16)
    raw[..., at:at + 2 * halves] = scales.view(np.uint8)
    return raw.reshape(rows, -1)


def _norm(rng: np.random.Generator, hidden: int, kind: Any = "rms") -> Norm:
    bias = None if kind == "rms" else (0.2 * rng.standard_normal(hidden)).astype(np.float32)
    return Norm(kind, (1 + 0.2 * rng.standard_normal(hidden)).astype(np.float32), 1e-3, bias)


def decoder(*, hidden: int = 48, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, layers: int = 1,
            ffn: int = 40, vocab: int = 50, context: int = 64, policy: AttentionPolicy | None = None,
            forms: dict[str, str] | None = None, function: Any = "silu", gated: bool = True,
            biases: bool = False, tied: bool = False, seed: int = 0, first: int = 0) -> Plan:
    """A Llama-like plan. forms: the storage of q, k, v, o, gate, up, down, embedding, head; "all" for the others.

    first: number of the first layer, for plans that are put together.
    """
    rng = np.random.default_rng(seed)
    forms = forms or {}

    def linear(name: str, part: str, rows: int, cols: int, peak: float = 1.0) -> Linear:
        form = forms.get(part, forms.get("all", "F32"))
        bias = (0.2 * rng.standard_normal(rows)).astype(np.float32) if biases and name != "embedding" else None
        return Linear(name, stored(weights(rng, rows, cols, peak), form), bias,
                      "float32" if form in ("F32", "F16", "BF16") else "int8")

    rope = Rope((10_000.0 ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32))
    made = []
    for i in range(first, first + layers):
        attention = Attention(
            linear(f"{i}.q", "q", heads * head_dim, hidden, 2.0),
            linear(f"{i}.k", "k", kv_heads * head_dim, hidden, 2.0),
            linear(f"{i}.v", "v", kv_heads * head_dim, hidden), linear(f"{i}.o", "o", hidden, heads * head_dim),
            heads, kv_heads, head_dim, head_dim**-0.5, rope, policy or AttentionPolicy())
        gate = linear(f"{i}.gate", "gate", ffn, hidden) if gated else None
        feed_forward = FeedForward(linear(f"{i}.up", "up", ffn, hidden), linear(f"{i}.down", "down", hidden, ffn), gate,
                                   function)
        made.append(Layer(attention, feed_forward, _norm(rng, hidden), _norm(rng, hidden)))
    embedding = linear("embedding", "embedding", vocab, hidden, hidden**0.5)
    head = replace(embedding, name="head") if tied else linear("head", "head", vocab, hidden, 2.0)
    return Plan("llama", "decoder", hidden, vocab, context, embedding, tuple(made), _norm(rng, hidden), head)


def encoder(*, positions: int = 64, seed: int = 0, **changes: Any) -> Plan:
    """A BERT-like plan: post-norm, full attention, learned positions behind an offset of two, two token types."""
    rng = np.random.default_rng(seed + 1)
    plan = decoder(policy=AttentionPolicy("full"), gated=False, function="gelu", biases=True, seed=seed,
                   context=positions, **changes)
    layers = tuple(
        replace(layer, attention=replace(layer.attention, rope=None), order="post",
                attention_norm=_norm(rng, plan.hidden, "layer"), feed_forward_norm=_norm(rng, plan.hidden, "layer"))
        for layer in plan.layers)
    return replace(plan, arch="bert", kind="encoder", layers=layers, head=None, final_norm=None, position_offset=2,
                   position_embedding=weights(rng, positions + 2, plan.hidden, plan.hidden**0.5),
                   token_type_embedding=weights(rng, 2, plan.hidden), embedding_norm=_norm(rng, plan.hidden, "layer"))


def biased(plan: Plan, *, buckets: int = 12, most: int = 40, seed: int = 3) -> Plan:
    """The plan with a bias by distance instead of rotary embeddings, one table for all layers."""
    rng = np.random.default_rng(seed)
    heads = plan.layers[0].attention.heads
    bias = RelativeBias(rng.standard_normal((buckets, heads)).astype(np.float32), most,
                        plan.layers[0].attention.policy.kind == "full")
    return replace(plan, layers=tuple(
        replace(layer, attention=replace(layer.attention, rope=None, bias=bias)) for layer in plan.layers))


def encoder_decoder(*, forms: dict[str, str] | None = None, seed: int = 0, groups: tuple[int, int] = (4, 2),
                    cross_groups: tuple[int, int] = (4, 4), **changes: Any) -> Plan:
    """A T5-like plan whose encoder has other head counts than its decoder, and cross-attention others again."""
    rng = np.random.default_rng(seed + 7)
    heads, kv_heads = groups
    first = changes.get("layers", 1)
    plan = decoder(heads=heads, kv_heads=kv_heads, forms=forms, seed=seed, **changes)
    reader = biased(decoder(heads=3, kv_heads=3, forms=forms, seed=seed + 1, first=first,
                            policy=AttentionPolicy("full"), **changes), seed=seed + 2)
    reader = replace(reader, kind="encoder", head=None, embedding=plan.embedding)
    heads, kv_heads = cross_groups
    dim = plan.layers[0].attention.head_dim

    def linear(i: int, part: str, rows: int, cols: int, peak: float = 1.0) -> Linear:
        form = (forms or {}).get(part, (forms or {}).get("all", "F32"))
        return Linear(f"{i}.cross.{part}", stored(weights(rng, rows, cols, peak), form), None,
                      "float32" if form in ("F32", "F16", "BF16") else "int8")

    layers = tuple(
        replace(layer, cross=CrossAttention(
            linear(i, "q", heads * dim, plan.hidden, 2.0), linear(i, "k", kv_heads * dim, plan.hidden, 2.0),
            linear(i, "v", kv_heads * dim, plan.hidden), linear(i, "o", plan.hidden, heads * dim),
            _norm(rng, plan.hidden), heads, kv_heads, dim, dim**-0.5))
        for i, layer in enumerate(plan.layers))
    return replace(biased(plan, seed=seed), arch="t5", kind="encoder-decoder", layers=layers, encoder=reader, start=0)


def sessions(plan: Plan, *, context: int, kv: str = "fp32", batch: int = 256, slots: int = 1,
             threads: int = 1) -> tuple[Any, Any]:
    """The native sessions of an encoder-decoder: of its encoder, and of its decoder."""
    recipes, names = recipes_of(plan)
    packed = pack_all(recipes, key=None)
    reader = _core.Session(build_model(plan.encoder, packed, names), "fp32", context, 1, threads, context)
    return reader, _core.Session(build_model(plan, packed, names), kv, context, slots, threads, batch, context, reader)


def read(pair: tuple[Any, Any], text: np.ndarray, *, slot: int = 0) -> None:
    """Let a slot of a decoder attend to a text."""
    reader, session = pair
    reader.truncate(0, 0)
    reader.forward(text, np.zeros(len(text), np.int32))
    session.set_source(slot, reader.normed(np.arange(len(text), dtype=np.int32)))


def answer(pair: tuple[Any, Any], text: np.ndarray, ids: np.ndarray, *, step: int | None = None,
           slot: int = 0) -> np.ndarray:
    """Logits (len(ids), vocab) of a decoder's ids after a text."""
    read(pair, text, slot=slot)
    return logits(pair[1], ids, step=step, slot=slot)


def ids_for(plan: Plan, n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, plan.vocab, n).astype(np.int32)


def logits(session: Any, ids: np.ndarray, *, step: int | None = None, slot: int = 0) -> np.ndarray:
    """Logits (n, vocab) of a decoder's session, or hidden states of an encoder's, in passes of `step` tokens."""
    parts = []
    step = step or session.batch
    for start in range(0, len(ids), step):
        part = np.ascontiguousarray(ids[start:start + step], np.int32)
        session.forward(part, np.full(len(part), slot, np.int32))
        parts.append(session.logits(np.arange(len(part), dtype=np.int32)))
    return np.concatenate(parts)
