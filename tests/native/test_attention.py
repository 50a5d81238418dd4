"""Attention through a Session on tiny plans against the NumPy executor: policies, groups, sizes, KV formats, chunks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plans import decoder, encoder, ids_for, logits
from reference import MUTATIONS, forward

from edgewise.engine.loading import session_of
from edgewise.engine.plan import AttentionPolicy
from edgewise.native.probe import best_tier, tiers

MEAN = {"fp32": 2e-6, "fp16": 2e-6, "bf16": 2e-5, "int8": 2e-6, "int4": 2e-6}
"""Mean difference over the largest logit: float32 sums of a few hundred terms. The judge rounds keys, values and
queries as the cache does, so what is left is arithmetic; of bf16 the weights are rounded too, and one that lies between
two may take either. Weights that were not rounded would miss by 5e-5."""

WORST = {"fp32": 2e-5, "fp16": 1e-3, "bf16": 1e-2, "int8": 1e-2, "int4": 1e-1}
"""The largest difference over the largest logit. A key that falls between two codes may take either: one step."""

EXACT = {"fp32": 2e-5, "fp16": 3e-3, "bf16": 2e-2, "int8": 5e-2, "int4": 5e-1}
"""The same against keys and values that were never rounded: what the format costs on these plans."""


def check(plan, n: int, *, kv: str = "fp32", step: int | None = None, threads: int = 1) -> np.ndarray:
    ids = ids_for(plan, n)
    found = logits(session_of(plan, kv=kv, context=n, batch=min(n, 256), threads=threads), ids, step=step)
    expected = forward(plan, ids, kv=kv)
    top = np.abs(expected).max()
    assert np.abs(found - expected).mean() < MEAN[kv] * top
    assert np.abs(found - expected).max() < WORST[kv] * top
    return found


@pytest.mark.parametrize("kv", ["fp32", "fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 128])
def test_head_sizes(head_dim, kv):
    plan = decoder(heads=2, kv_heads=1, head_dim=head_dim)
    found = check(plan, 40, kv=kv)
    exact = forward(plan, ids_for(plan, 40))
    assert np.abs(found - exact).max() < EXACT[kv] * np.abs(exact).max()


@pytest.mark.parametrize("kv", ["fp32", "int8"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (6, 2), (8, 2), (12, 1), (13, 1), (16, 1), (32, 2)])
def test_groups(heads, kv_heads, kv):
    """Query heads per key head: up to twelve share a pass, more take several; one token at a time too."""
    plan = decoder(heads=heads, kv_heads=kv_heads)
    together = check(plan, 35, kv=kv)
    assert np.array_equal(check(plan, 35, kv=kv, step=1), together)


@pytest.mark.parametrize("kv", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_contexts_of_several_chunks(kv):
    """560 positions: three chunks of 256, merged; in passes of 256 and, at the boundaries, one by one."""
    plan = decoder(heads=3, kv_heads=1)
    found = check(plan, 560, kv=kv)
    session = session_of(plan, kv=kv, context=560)
    ids = ids_for(plan, 560)
    for start, stop in [(0, 254), (254, 258), (258, 510), (510, 515)]:
        part = logits(session, ids[start:stop], step=1 if stop - start < 10 else None)
        assert np.array_equal(part, found[start:stop])


@pytest.mark.parametrize("window", [1, 7, 100, 256, 300, 1000])
def test_sliding_windows(window):
    """Smaller than a chunk, no multiple of one, larger than the text; beginning in an earlier chunk or in the last."""
    plan = decoder(heads=3, kv_heads=1, policy=AttentionPolicy("sliding", window))
    together = check(plan, 540)
    assert np.array_equal(check(plan, 540, step=23), together)
    session = session_of(plan, context=540)
    logits(session, ids_for(plan, 540)[:505])
    assert np.array_equal(logits(session, ids_for(plan, 540)[505:520], step=1), together[505:520])


def test_a_window_off_by_one_is_seen():
    plan = decoder(policy=AttentionPolicy("sliding", 7))
    ids = ids_for(plan, 40)
    found = logits(session_of(plan, context=40), ids)
    expected = forward(MUTATIONS["mask"](plan), ids)
    assert np.abs(found - expected).max() > 1000 * WORST["fp32"] * np.abs(expected).max()


@pytest.mark.parametrize("n", [1, 15, 33, 300, 520])
def test_full_attention(n):
    """Every position sees all; the whole sequence is one pass."""
    plan = replace(decoder(heads=3, kv_heads=1), layers=tuple(
        replace(layer, attention=replace(layer.attention, policy=AttentionPolicy("full")))
        for layer in decoder(heads=3, kv_heads=1).layers))
    ids = ids_for(plan, n)
    found = logits(session_of(plan, context=n, batch=n), ids)
    expected = forward(plan, ids)
    assert np.abs(found - expected).max() < WORST["fp32"] * np.abs(expected).max()


def test_an_encoder():
    plan = encoder()
    ids = ids_for(plan, 63)
    session = session_of(plan, context=64, batch=64)
    session.forward(ids, np.zeros(63, np.int32))
    found = session.normed(np.arange(63, dtype=np.int32))
    expected = forward(plan, ids)
    assert np.abs(found - expected).max() < WORST["fp32"] * np.abs(expected).max()
    for name in ("mask", "position offset", "embedding norm epsilon", "norm order"):
        changed = forward(MUTATIONS[name](plan), ids)
        assert np.abs(found - changed).max() > 2 * WORST["fp32"] * np.abs(expected).max(), name


@pytest.mark.parametrize("kv", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_tiers_have_the_same_bits(kv, monkeypatch):
    plan = decoder(heads=6, kv_heads=2, head_dim=24, layers=2)
    found = []
    for tier in tiers():
        monkeypatch.setenv("EDGEWISE_ISA", tier)
        session = session_of(plan, kv=kv, context=64)
        assert session.tier == tier
        found.append(logits(session, ids_for(plan, 50)))
    assert best_tier() == tiers()[-1]
    for other in found[1:]:
        assert np.array_equal(other, found[0])


def test_layers_of_different_shapes():
    """Each layer brings its own heads, head size, rotary frequencies, window and feed-forward width."""
    one = decoder(heads=4, kv_heads=2, head_dim=16)
    two = decoder(heads=3, kv_heads=3, head_dim=24, ffn=72, function="gelu_tanh", policy=AttentionPolicy("sliding", 9),
                  seed=5, first=1)
    three = decoder(heads=1, kv_heads=1, head_dim=128, ffn=17, gated=False, function="relu", biases=True, seed=6,
                    first=2)
    plan = replace(one, layers=one.layers + two.layers + three.layers)
    check(plan, 50, threads=2)


def test_scales_factors_and_partial_rotation():
    """Embedding and logit scales, an attention factor, and rotary dimensions that are fewer than a head's."""
    plan = decoder(head_dim=32)
    rope = replace(plan.layers[0].attention.rope, attention_factor=1.3,
                   inverse_frequency=plan.layers[0].attention.rope.inverse_frequency[:10])
    layer = replace(plan.layers[0], attention=replace(plan.layers[0].attention, rope=rope, scale=0.3))
    check(replace(plan, layers=(layer,), embedding_scale=1.7, logit_scale=0.25), 40)
