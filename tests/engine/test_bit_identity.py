"""The logits of a token are the same bits for any threads, passes, neighbours and tiers. Every storage form at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plans import MIXED, answer, biased, decoder, encoder_decoder, ids_for, logits, read, sessions
from reference import forward

from edgewise.core.numbers import BF16
from edgewise.core.storage import Dense
from edgewise.engine.loading import in_floats, session_of
from edgewise.engine.plan import AttentionPolicy, Experts, Linear
from edgewise.native import _core
from edgewise.native.probe import tiers

N = 280  # past the first chunk of 256 positions
PLANS = {
    "mixed": decoder(hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=256, forms=MIXED, context=N),
    "float": decoder(heads=3, kv_heads=1, layers=2, context=N, policy=AttentionPolicy("sliding", 70)),
    "codes": decoder(hidden=96, heads=16, kv_heads=1, head_dim=16, ffn=112, biases=True, context=N,
                     forms={"all": "int4/g32/fp16/min", "down": "int3/g16/fp16", "embedding": "F16",
                            "head": "int8/axis"}),
    "bfloat16": in_floats(decoder(heads=3, kv_heads=1, layers=2, context=N, hidden=72, ffn=100), BF16),
    "biased": biased(decoder(heads=3, kv_heads=3, head_dim=32, context=N, forms={"all": "Q8_0", "embedding": "F32"},
                             hidden=64, ffn=96), most=100),
}


def routed(plan):
    """The plan with three experts in each layer, two for a token: its own feed-forward and two like it."""
    def expert(ffn, i):
        return replace(ffn, **{part: replace(linear, name=f"{linear.name}.{i}", weight=Dense(turned(linear, i), BF16))
                               for part in ("gate", "up", "down") for linear in [getattr(ffn, part)]})

    def turned(linear, i):
        return np.ascontiguousarray(np.roll(linear.weight.data, i, axis=0))

    rng = np.random.default_rng(3)
    return replace(plan, layers=tuple(
        replace(layer, feed_forward=Experts(
            Linear(f"router.{n}", Dense(rng.standard_normal((3, plan.hidden)).astype(np.float32)), None, "float32"),
            tuple(expert(layer.feed_forward, i) for i in range(3)), 2, True)) for n, layer in enumerate(plan.layers)))


PLANS["bfloat16 experts"] = routed(PLANS["bfloat16"])
ANSWERED = {
    "float": encoder_decoder(layers=2, context=N),
    "codes": encoder_decoder(hidden=96, ffn=64, cross_groups=(6, 2), context=N, forms={
        "all": "int4/g32/fp16/min", "down": "int3/g16/fp16", "embedding": "F16", "head": "int8/axis"}),
}


@pytest.fixture(params=tiers()[1:] or tiers())
def tier(request, monkeypatch):
    monkeypatch.setenv("EDGEWISE_ISA", request.param)
    return request.param


@pytest.mark.parametrize("kv", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("name", PLANS)
def test_threads_passes_and_neighbours(name, kv, tier):
    plan, ids = PLANS[name], ids_for(PLANS[name], N)
    expected = logits(session_of(plan, kv=kv, batch=256), ids)
    for threads in (2, 3):
        assert np.array_equal(logits(session_of(plan, kv=kv, batch=256, threads=threads), ids), expected), threads
    for step in (1, 7, 64):
        found = logits(session_of(plan, kv=kv, batch=64, threads=2), ids, step=step)
        assert np.array_equal(found, expected), step


@pytest.mark.parametrize("kv", ["fp16", "bf16", "int8", "int4", "fp32"])
@pytest.mark.parametrize("name", PLANS)
def test_sequences_side_by_side(name, kv, tier):
    """Three sequences of different lengths, one token of each in turn, then in runs."""
    plan = PLANS[name]
    texts = [ids_for(plan, n, seed) for seed, n in enumerate((60, 41, 17))]
    alone = [logits(session_of(plan, kv=kv), text) for text in texts]
    order = [(slot, i) for i in range(60) for slot in range(3) if i < len(texts[slot])]
    for runs in (order, sorted(order[:70]) + order[70:]):
        session = session_of(plan, kv=kv, slots=3, batch=35, threads=2)
        found = [[], [], []]
        for start in range(0, len(runs), 35):
            part = runs[start:start + 35]
            if runs is not order and start == 35:
                part = sorted(part)
            session.forward(np.int32([texts[slot][i] for slot, i in part]), np.int32([slot for slot, _ in part]))
            rows = session.logits(np.arange(len(part), dtype=np.int32))
            for (slot, _), row in zip(part, rows, strict=True):
                found[slot].append(row)
        for slot in range(3):
            assert np.array_equal(np.stack(found[slot]), alone[slot])


@pytest.mark.parametrize("name", PLANS)
def test_generation_has_the_bits_of_reading(name, tier):
    plan = PLANS[name]
    session = session_of(plan, kv="fp16", threads=2)
    session.prefill(0, ids_for(plan, 250))
    tokens, rows = [], []
    sampler = _core.Sampler(temperature=1.0, seed=1)
    for _ in range(12):
        tokens.append(session.generate(0, sampler, 1, [])[0].token)
        rows.append(session.last_logits())
    text = np.int32([*ids_for(plan, 250), *tokens])
    assert np.array_equal(np.stack(rows), logits(session_of(plan, kv="fp16"), text)[249:261])


@pytest.mark.parametrize("name", PLANS)
def test_tiers_agree(name, monkeypatch):
    """More than the contract asks: the kernels of all tiers add in one order."""
    ids, found = ids_for(PLANS[name], 40), []
    for each in tiers():
        monkeypatch.setenv("EDGEWISE_ISA", each)
        found.append(logits(session_of(PLANS[name], kv="fp16"), ids, step=17))
    for other in found[1:]:
        assert np.array_equal(other, found[0])


@pytest.mark.parametrize("name", PLANS)
def test_the_bits_are_those_of_the_right_answer(name):
    """Against the executor that rounds inputs as the kernels do. A code on an edge may fall either way: one step."""
    plan, ids = PLANS[name], ids_for(PLANS[name], 64)
    expected = forward(plan, ids, activations="plan")
    miss = np.abs(logits(session_of(plan, kv="fp32"), ids) - expected) / np.abs(expected).max()
    assert miss.mean() < 2e-4
    assert miss.max() < 2e-2


@pytest.mark.parametrize("kv", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("name", ANSWERED)
def test_answers_to_a_text(name, kv, tier):
    """Threads, passes, and how the text's keys were made."""
    plan = ANSWERED[name]
    text, ids = ids_for(plan, N, 5), ids_for(plan, 70)
    expected = answer(sessions(plan, context=N, kv=kv), text, ids)
    for threads, batch, step in ((2, 256, None), (3, 256, None), (1, 64, 1), (2, 64, 7), (2, 1, 1), (3, 33, 33)):
        found = answer(sessions(plan, context=N, kv=kv, threads=threads, batch=batch), text, ids, step=step)
        assert np.array_equal(found, expected), (threads, batch, step)


@pytest.mark.parametrize("name", ANSWERED)
def test_answers_to_texts_side_by_side(name, tier):
    """Three texts in three slots, their answers token by token in turn; then one slot gets another text."""
    plan = ANSWERED[name]
    texts = [ids_for(plan, n, seed) for seed, n in enumerate((60, 41, 1))]
    answers = [ids_for(plan, n, seed) for seed, n in enumerate((25, 9, 20), 7)]
    alone = [answer(sessions(plan, context=64), text, ids) for text, ids in zip(texts, answers, strict=True)]
    pair = sessions(plan, context=64, slots=3, batch=20, threads=2)
    for slot, text in enumerate(texts):
        read(pair, text, slot=slot)
    order = [(slot, i) for i in range(25) for slot in range(3) if i < len(answers[slot])]
    found = [[], [], []]
    for start in range(0, len(order), 20):
        part = order[start:start + 20]
        pair[1].forward(np.int32([answers[slot][i] for slot, i in part]), np.int32([slot for slot, _ in part]))
        for (slot, _), row in zip(part, pair[1].logits(np.arange(len(part), dtype=np.int32)), strict=True):
            found[slot].append(row)
    for slot in range(3):
        assert np.array_equal(np.stack(found[slot]), alone[slot])
    assert np.array_equal(answer(pair, texts[0], answers[0], slot=1), alone[0])


def test_tiers_agree_on_answers(monkeypatch):
    for plan in ANSWERED.values():
        found = []
        for each in tiers():
            monkeypatch.setenv("EDGEWISE_ISA", each)
            found.append(answer(sessions(plan, context=48), ids_for(plan, 40, 5), ids_for(plan, 20), step=13))
        for other in found[1:]:
            assert np.array_equal(other, found[0])
