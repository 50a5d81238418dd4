"""Sinks and a window, and keys and values in groups of four bits: what a query sees, whatever is stored by then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference
from plans import biased, decoder, ids_for, logits
from reference import forward, norm, rotate

from edgewise.core.errors import InvalidValueError
from edgewise.engine.loading import session_of
from edgewise.engine.memory import kv_bytes
from edgewise.engine.plan import AttentionPolicy, endless, with_attention
from edgewise.native.probe import tiers

SINKS = AttentionPolicy("sinks", 40, 4)
WORST = {"fp32": 2e-5, "fp16": 1e-3, "bf16": 1e-2, "int8": 1e-2, "int4": 1e-1}
"""The largest difference over the largest logit: test_attention.py."""
MEAN = {"fp32": 2e-6, "fp16": 1e-5, "bf16": 4e-4, "int8": 2e-5, "int4": 2e-4}
"""The mean difference, over two layers: a key of the second that falls between two codes may take either, and in four
bits it may move the grid of its group."""
PLANS = {
    "causal": decoder(heads=3, kv_heads=1, layers=2),
    "sliding": decoder(heads=3, kv_heads=1, layers=2, policy=AttentionPolicy("sliding", 70)),
    "sinks": decoder(heads=4, kv_heads=2, layers=2, policy=SINKS),
    "no sinks": decoder(heads=3, kv_heads=1, policy=AttentionPolicy("sinks", 33, 0)),
    "many sinks": decoder(heads=3, kv_heads=3, head_dim=24, policy=AttentionPolicy("sinks", 100, 90)),
    "wide groups": decoder(heads=16, kv_heads=1, layers=2, policy=SINKS),
    "one is near": decoder(heads=2, kv_heads=1, policy=AttentionPolicy("sinks", 1, 1)),
    "biased": biased(decoder(heads=3, kv_heads=3, head_dim=32, policy=SINKS), most=30),
    "and windows": replace(decoder(), layers=decoder(policy=SINKS).layers + decoder(
        policy=AttentionPolicy("sliding", 21), first=1, seed=3).layers),
}
N = 400


def streamed(plan, ids: np.ndarray) -> np.ndarray:
    """Logits of the last of ids by the words of arXiv:2309.17453, section 3.2: the cache holds the sinks and the window
    of the query, and keys and query are turned by their places in it, 0, 1, 2, ... One layer."""
    (layer,), a = plan.layers, plan.layers[0].attention
    h = plan.embedding.weight.dense()[ids].astype(np.float64)
    x = norm(layer.attention_norm, h)
    q, k, v = (x @ part.weight.dense().astype(np.float64).T for part in (a.q, a.k, a.v))
    last = len(ids) - 1
    cache = [p for p in range(len(ids)) if p < a.policy.sinks or p > last - a.policy.window]
    heads = []
    for head in range(a.heads):
        key = head // (a.heads // a.kv_heads)
        own, held = (slice(i * a.head_dim, (i + 1) * a.head_dim) for i in (head, key))
        turned = rotate(a.rope, k[cache, held])
        query = rotate(a.rope, q[last:, own], [len(cache) - 1])
        score = (turned @ query[0]) * a.scale
        weight = np.exp(score - score.max())
        heads.append(weight / weight.sum() @ v[cache, held])
    h = h[last:] + np.concatenate(heads)[None] @ a.o.weight.dense().astype(np.float64).T
    f, y = layer.feed_forward, norm(layer.feed_forward_norm, h)
    gate = y @ f.gate.weight.dense().astype(np.float64).T
    y = gate / (1 + np.exp(-gate)) * (y @ f.up.weight.dense().astype(np.float64).T)
    h = h + y @ f.down.weight.dense().astype(np.float64).T
    return norm(plan.final_norm, h) @ plan.head.weight.dense().astype(np.float64).T


@pytest.mark.parametrize("n", [1, 3, 44, 45, 150, 330])
def test_distances_are_those_in_the_cache(n):
    plan = decoder(heads=4, kv_heads=2, policy=SINKS)
    ids = ids_for(plan, n)
    found = logits(session_of(plan, context=400, batch=64), ids)[-1]
    expected = streamed(plan, ids)[0]
    assert np.abs(found - expected).max() < WORST["fp32"] * np.abs(expected).max()
    if n > 45:  # as they were in the text would be something else
        other = decoder(heads=4, kv_heads=2, policy=AttentionPolicy("sinks", 41, 4))
        assert np.abs(found - streamed(other, ids)[0]).max() > 100 * WORST["fp32"] * np.abs(expected).max()


@pytest.mark.parametrize("kv", ["fp32", "fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", PLANS)
def test_against_the_executor(name, kv):
    plan = PLANS[name]
    ids = ids_for(plan, 200)
    found = logits(session_of(plan, kv=kv, context=200, batch=37, threads=2), ids)
    expected = forward(plan, ids, kv=kv)
    top = np.abs(expected).max()
    assert np.abs(found - expected).mean() < MEAN[kv] * top
    assert np.abs(found - expected).max() < WORST[kv] * top


@pytest.mark.parametrize(("what", "value"), [("GROUP", 32), ("FIRST", 0)])
def test_the_executor_would_see_other_groups(what, value, monkeypatch):
    plan = decoder(heads=3, kv_heads=1)
    ids = ids_for(plan, 200)
    found = logits(session_of(plan, kv="int4", context=200), ids)
    monkeypatch.setattr(reference, what, value)
    expected = forward(plan, ids, kv="int4")
    assert np.abs(found - expected).mean() > 5 * MEAN["int4"] * np.abs(expected).max()


@pytest.fixture(params=tiers()[1:] or tiers())
def tier(request, monkeypatch):
    monkeypatch.setenv("EDGEWISE_ISA", request.param)
    return request.param


@pytest.mark.parametrize("kv", ["bf16", "int4"])
@pytest.mark.parametrize("name", PLANS)
def test_bits_do_not_depend_on_threads_or_passes(name, kv, tier):
    plan, ids = PLANS[name], ids_for(PLANS[name], N)
    expected = logits(session_of(plan, kv=kv, batch=256, context=N), ids)
    for batch, step, threads in ((256, None, 3), (256, 97, 2), (64, 64, 2), (64, 7, 1), (1, 1, 2), (8, 1, 1)):
        found = logits(session_of(plan, kv=kv, batch=batch, threads=threads, context=1 << 12), ids, step=step)
        assert np.array_equal(found, expected), (batch, step, threads)


@pytest.mark.parametrize("kv", ["bf16", "int4"])
@pytest.mark.parametrize("name", ["causal", "sinks", "and windows"])
def test_bits_do_not_depend_on_neighbours(name, kv):
    """Three sequences of different lengths in one session: token by token in turn, and in runs of all."""
    plan = PLANS[name]
    texts = [ids_for(plan, n, seed) for seed, n in enumerate((190, 141, 77))]
    alone = [logits(session_of(plan, kv=kv, context=200), text) for text in texts]
    turns = [(slot, i) for i in range(190) for slot in range(3) if i < len(texts[slot])]
    for order, step in ((turns, 60), (turns, 1), (sorted(turns[:200]) + turns[200:], 200)):
        session = session_of(plan, kv=kv, slots=3, batch=200, context=200, threads=2)
        found = [[], [], []]
        for start in range(0, len(order), step):
            part = order[start:start + step]
            session.forward(np.int32([texts[slot][i] for slot, i in part]), np.int32([slot for slot, _ in part]))
            for (slot, _), row in zip(part, session.logits(np.arange(len(part), dtype=np.int32)), strict=True):
                found[slot].append(row)
        for slot in range(3):
            assert np.array_equal(np.stack(found[slot]), alone[slot])


@pytest.mark.parametrize("name", PLANS)
def test_tiers_agree(name, monkeypatch):
    found = []
    for each in tiers():
        monkeypatch.setenv("EDGEWISE_ISA", each)
        found.append(logits(session_of(PLANS[name], kv="int4", context=200), ids_for(PLANS[name], 150), step=41))
    for other in found[1:]:
        assert np.array_equal(other, found[0])


@pytest.mark.parametrize("kv", ["bf16", "int4"])
@pytest.mark.parametrize("name", ["causal", "sliding", "sinks", "many sinks", "and windows"])
def test_going_on_from_an_earlier_position(name, kv):
    """Wherever truncate() lets a slot go on, it goes on as a text that was never longer; elsewhere it refuses."""
    plan, ids = PLANS[name], ids_for(PLANS[name], N)
    other = np.concatenate([ids[:N // 2], ids_for(plan, N // 2, 9)])
    expected = {}
    for wanted in (N - 1, N - 10, N - 16, 321, 320, 319, 256, 200, 130, 64, 63, 5, 3, 0):
        session = session_of(plan, kv=kv, batch=32, context=1 << 12)
        logits(session, ids, step=32)
        length = session.resumable(0, wanted)
        assert 0 <= length <= wanted
        if length < wanted:
            with pytest.raises(ValueError, match=f"given up; {length} can be gone on from"):
                session.truncate(0, wanted)
        session.truncate(0, length)
        text = np.concatenate([ids[:length], other[length:length + 150]])
        if length not in expected:
            expected[length] = logits(session_of(plan, kv=kv, context=1 << 12), text)[length:]
        assert np.array_equal(logits(session, text[length:], step=32), expected[length])
    reachable = {wanted: session.resumable(0, wanted) for wanted in (130, 70)}
    if name in ("causal", "sliding"):
        assert reachable == ({130: 130, 70: 70} if kv == "bf16" else {130: 130, 70: 64})


def test_memory_is_constant_in_the_length():
    plan = decoder(policy=SINKS)
    assert endless(plan)
    sizes = {session_of(plan, kv=kv, context=context, batch=32).kv_nbytes
             for kv in ["fp16"] for context in (500, 5000, 1 << 30)}
    assert len(sizes) == 1
    # What is held beyond the sinks and the window is what rounding to tiles, and a pass, need.
    entry = kv_bytes(decoder(policy=AttentionPolicy("sliding", 1)), "fp16", 16) // 16
    assert sizes == {entry * (16 + 256)}
    session = session_of(plan, kv="int4", context=1 << 30, batch=32)
    ids = np.tile(ids_for(plan, 50), 60)
    rows = logits(session, ids)
    assert session.length(0) == 3000
    assert np.isfinite(rows).all()


def test_what_left_the_window_changes_nothing():
    """With n sinks and a window of w, one layer: a token is what n + w positions make it, and no other."""
    plan = decoder(policy=SINKS)
    ids = ids_for(plan, 300)
    changed = ids.copy()
    changed[4:300 - 40] = ids_for(plan, 256, 7)
    session = session_of(plan, context=512)
    found = logits(session, ids)[-1]
    session.truncate(0, 0)
    assert np.array_equal(logits(session, changed)[-1], found)
    for at in (3, 260, 299):
        other = changed.copy()
        other[at] = (other[at] + 1) % plan.vocab
        session.truncate(0, 0)
        assert not np.array_equal(logits(session, other)[-1], found), at


def test_policies_are_said_in_words():
    assert AttentionPolicy.parse("sink=4,window=512") == AttentionPolicy("sinks", 512, 4)
    assert AttentionPolicy.parse("window=9") == AttentionPolicy("sinks", 9, 4)
    assert AttentionPolicy.parse(str(AttentionPolicy("sinks", 7, 0))) == AttentionPolicy("sinks", 7, 0)
    assert AttentionPolicy.parse("full") == AttentionPolicy()
    for wrong in ("", "sink=4", "sink=4,window=0", "window=-1", "sink=4;window=3", "window=3,depth=1", "windows=3",
                  "window=3,", "window=1e3"):
        with pytest.raises(InvalidValueError, match="sink=4,window=512"):
            AttentionPolicy.parse(wrong)


def test_layers_with_windows_of_their_own_keep_them():
    plan = replace(PLANS["and windows"], layers=tuple(
        replace(layer, attention=replace(layer.attention, policy=policy))
        for layer, policy in zip(PLANS["and windows"].layers, (AttentionPolicy(), AttentionPolicy("sliding", 9)),
                                 strict=True)))
    changed = [layer.attention.policy for layer in with_attention(plan, SINKS).layers]
    assert changed == [SINKS, AttentionPolicy("sliding", 9)]
    assert endless(with_attention(plan, SINKS))
    assert not endless(plan)
