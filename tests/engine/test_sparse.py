"""Layers that decode with some of their inputs: the dense model where all are read, the same bits for any threads,
passes and tiers, the transcription of `InputSparse`, and what is counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plans import decoder, ids_for, logits
from reference import forward

from edgewise.core.errors import collect_notices
from edgewise.core.storage import Dense, Factored, InputSparse
from edgewise.engine.loading import session_of
from edgewise.engine.memory import scratch_bytes
from edgewise.engine.plan import plan_with
from edgewise.engine.sparse import dense_plan, with_input_sparsity
from edgewise.native import _core
from edgewise.native.probe import tiers

N = 40


def plain(form="int4/g32", **changes):
    return decoder(hidden=96, heads=4, kv_heads=2, head_dim=32, ffn=160, layers=2, context=N,
                   forms={"all": form, "embedding": "F32", "head": "int8/g32"}, **changes)


def sparse(plan, threshold=0.4, rank=0, seed=0):
    rng = np.random.default_rng(seed)

    def changed(linear):
        cols = linear.weight.shape[1]
        low = None
        if rank:
            u, s, v = np.linalg.svd(linear.weight.dense(), full_matrices=False)
            low = Factored(Dense((u[:, :rank] * s[:rank]).astype(np.float32)), Dense(v[:rank].astype(np.float32)))
        values = np.full(cols, threshold) if threshold <= 0 else threshold * rng.uniform(0.5, 1.5, cols)
        return replace(linear, weight=InputSparse(linear.weight, values.astype(np.float32), low))

    return plan_with(plan, changed)


def decoded(session, ids, step=1):
    session.truncate(0, 0)
    session.decoding = True
    found = logits(session, ids, step=step)
    session.decoding = False
    return found


@pytest.fixture(params=tiers()[1:] or tiers())
def tier(request, monkeypatch):
    monkeypatch.setenv("EDGEWISE_ISA", request.param)
    return request.param


@pytest.mark.parametrize("form", ["int4/g32", "int4/g32/fp16/min", "int8/g32"])
def test_a_prompt_is_dense_to_the_bit(form, tier):
    plan = plain(form)
    ids = ids_for(plan, N)
    expected = logits(session_of(plan), ids)
    session = session_of(sparse(plan), threads=2)
    for step in (N, 17, 3, 1):
        session.truncate(0, 0)
        assert np.array_equal(logits(session, ids, step=step), expected), step
    assert session.tokens_decoded == 0


@pytest.mark.parametrize("biases", [False, True])
def test_with_every_input_read_decoding_is_dense_to_the_bit(biases, tier):
    plan = plain(biases=biases)
    ids = ids_for(plan, N)
    everything = plan_with(sparse(plan, threshold=0.0), lambda linear: linear)
    session = session_of(everything)
    found = decoded(session, ids)
    # Zeros are no more than their threshold: a dense kernel multiplies them, and gets zero.
    assert np.array_equal(found, logits(session_of(plan), ids))


@pytest.mark.parametrize("rank", [0, 5])
def test_threads_passes_and_tiers_give_one_answer(rank, monkeypatch):
    plan = sparse(plain("int4/g32/fp16/min"), rank=rank)
    ids = ids_for(plan, N)
    expected = None
    for name in tiers():
        monkeypatch.setenv("EDGEWISE_ISA", name)
        for threads in (1, 2, 3):
            session = session_of(plan, threads=threads)
            for step in (1, 7, N):
                found = decoded(session, ids, step)
                expected = found if expected is None else expected
                assert np.array_equal(found, expected), (name, threads, step)


@pytest.mark.parametrize("rank", [0, 6])
def test_the_transcription_agrees(rank):
    plan = sparse(plain("int8/g32"), rank=rank)
    ids = ids_for(plan, 16)
    found = decoded(session_of(plan), ids)
    expected = forward(plan, ids, activations="plan")
    apart = np.abs(forward(dense_plan(plan), ids, activations="plan") - expected)
    without = plan_with(plan, lambda linear: replace(linear, weight=replace(linear.weight, low_rank=None)))
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()
    assert apart.max() > 0.1 * np.abs(expected).max()
    if rank:
        assert np.abs(forward(without, ids, activations="plan") - expected).max() > 0.02 * np.abs(expected).max()


def test_what_is_read_is_counted():
    plan = sparse(plain())
    session = session_of(plan, threads=2)
    session.prefill(0, ids_for(plan, 5))
    session.generate(0, _core.Sampler(), 9, [])
    assert session.tokens_decoded == 8  # the last one sampled is fed only when another is wanted
    read = session.inputs_read
    cols = np.array([96, 96, 96, 128, 96, 96, 160])
    assert read.shape == (2, 7)
    assert (read > 0).all()
    assert (read < cols).all()
    session.forget_counts()
    assert session.tokens_decoded == 0
    nothing = session_of(plan_with(plan, lambda linear: replace(linear, weight=replace(
        linear.weight, threshold=np.full_like(linear.weight.threshold, np.inf)))))
    decoded(nothing, ids_for(plan, 4))
    assert not nothing.inputs_read.any()
    assert not session_of(plain()).inputs_read.size


def test_a_pass_in_steps_and_a_prompt_between():
    """What was decoded stays in the cache beside what was read."""
    plan = sparse(plain())
    ids = ids_for(plan, N)
    one, other = session_of(plan), session_of(plan, threads=2)
    for session, steps in ((one, [1] * 8), (other, [3, 5])):
        session.prefill(0, ids[:10])
        session.decoding = True
        start = 10
        for step in steps:
            session.forward(ids[start:start + step], np.zeros(step, np.int32))
            start += step
        session.decoding = False
        session.prefill(0, ids[start:start + 9])
    assert np.array_equal(one.last_logits(), other.last_logits())


def test_scratch_is_foreseen_to_the_byte():
    plan = sparse(plain(), rank=3)
    session = session_of(plan, context=33, batch=20, threads=2)
    assert scratch_bytes(plan, 33, 20, session.threads, kv="fp32") == session.scratch_nbytes


def test_layers_that_cannot_decode_so_are_dense_with_a_notice():
    plan = sparse(plain("int3/g32"))
    with collect_notices() as notices:
        made = with_input_sparsity(plan, "here")
    assert all(linear is not None and not isinstance(linear.weight, InputSparse)
               for layer in made.layers for linear in (layer.attention.q, layer.feed_forward.down))
    assert [(notice.kind, notice.where) for notice in notices] == [("fallback", "here")]
    assert "2 of 2 layers" in notices[0].message
    half = replace(plain(), layers=(sparse(plain()).layers[0], plain().layers[1]))
    with collect_notices() as notices:
        made = with_input_sparsity(half, "here")
    assert isinstance(made.layers[0].attention.q.weight, InputSparse)
    assert not notices
