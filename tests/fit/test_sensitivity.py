"""Sensitivities equal what a model with that one change shows when measured the long way."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.core.checkpoint import Step
from edgewise.core.errors import EdgewiseWarning, InvalidValueError, UnsupportedError
from edgewise.core.numbers import QuantFormat
from edgewise.engine.loading import model_of
from edgewise.fit.candidates import candidates_of, groups_of, items_of
from edgewise.fit.rounding import quantised
from edgewise.fit.sensitivity import Bench, errors_of, importance_of, kl_rows, rates_of, sample_of
from edgewise.measure.quality import kl_divergence
from tiny_checkpoint import tiny_checkpoint, tiny_encoder

RNG = np.random.default_rng(0)
IDS = RNG.integers(4, 260, 4000).astype(np.int32)


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.03, 1.0, 10.0])
def test_kl_equals_the_slow_one(noise):
    a = (3 * RNG.standard_normal((37, 500))).astype(np.float32)
    b = (a + noise * RNG.standard_normal(a.shape) + 5).astype(np.float32)
    np.testing.assert_allclose(kl_rows(a, b), kl_divergence(a, b), rtol=2e-4, atol=2e-9)


def test_kl_beyond_all_measure_is_finite_and_large():
    a = np.eye(3, 50, dtype=np.float32) * 1000
    np.testing.assert_allclose(kl_rows(a, -a), kl_divergence(a, -a), rtol=1e-5)
    assert (kl_rows(a, -a) > 1000).all()


def test_kl_of_unequal_shapes_is_refused():
    with pytest.raises(InvalidValueError, match=r"\(2, 3\) and \(2, 4\)"):
        kl_rows(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32))


@pytest.mark.parametrize("tied", [True, False])
def test_a_rate_is_the_divergence_of_the_whole_model_with_that_change_over_its_error(tied):
    checkpoint = tiny_checkpoint(tied=tied)
    bench = Bench(checkpoint, threads=1)
    sample = sample_of(IDS, context=64, tokens=128, checked=64)
    importance = importance_of(checkpoint, sample, 1)
    reference = bench.reference(sample.search)
    groups = groups_of(bench.plan)
    rates = rates_of(bench, reference, groups, importance)
    source = model_of(checkpoint, threads=1, context=64, kv="bf16")
    for group in groups:
        choice = candidates_of(group, [QuantFormat.parse("int3/g32/fp16/min")])[1]
        changed = {name: bench.rounded(group, name, choice, importance) for name in choice.replaced}
        model = model_of(checkpoint.with_tensors({**checkpoint.tensors, **changed}, Step("test")), threads=1,
                         context=64, kv="bf16")
        slow = np.mean([kl_divergence(source.forward(ids), model.forward(ids)) for ids in sample.search])
        error = sum(float((np.square(made.dense() - group.weights[name].dense(), dtype=np.float64)
                           * importance.get(name, 1)).sum()) for name, made in changed.items())
        for name in group.weights:
            assert rates[name] == pytest.approx(slow / error, rel=1e-4)
        assert slow > 1e-4


def test_errors_are_rates_times_squared_errors_and_grow_as_bits_fall(monkeypatch):
    checkpoint = tiny_checkpoint()
    plan = Bench(checkpoint, threads=1).plan
    importance = importance_of(checkpoint, sample_of(IDS, context=64, tokens=128, checked=64), 1)
    items = items_of(plan)
    candidates = [candidates_of(item, [QuantFormat.parse(f"int{bits}/g32/fp16") for bits in (8, 6, 4, 3)], None)
                  for item in items]
    rates = {name: 0.5 + len(name) for item in items for name in item.weights}
    found = errors_of(items, candidates, rates, importance, 2)
    for item, choices, row in zip(items, candidates, found, strict=True):
        assert row[0] == 0.0
        assert row == sorted(row)
        (name, stored), = item.weights.items()
        for choice, cost in zip(choices[1:], row[1:], strict=True):
            gap = quantised(stored, choice.format, importance=importance[name]).dense() - stored.dense()
            slow = rates[name] * float((np.square(gap, dtype=np.float64) * importance[name]).sum())
            assert cost == pytest.approx(slow, rel=1e-4)
    monkeypatch.setattr("edgewise.fit.sensitivity._ERROR_ROWS", 32)
    few = errors_of(items, candidates, rates, importance, 1)
    np.testing.assert_allclose(np.array(few)[:, 1:], np.array(found)[:, 1:], rtol=0.25)


def test_the_source_is_at_no_distance_and_kv_formats_are_at_some():
    bench = Bench(tiny_checkpoint(), threads=1)
    reference = bench.reference(sample_of(IDS, context=64, tokens=128, checked=64).search)
    assert bench.kl(reference) == 0.0
    assert 0 < bench.kl(reference, kv="int8") < bench.kl(reference, kv="int4")


def test_importance_is_the_mean_square_of_each_input():
    checkpoint = tiny_checkpoint(tied=False)
    sample = sample_of(IDS, context=64, tokens=128, checked=64)
    importance = importance_of(checkpoint, sample, 1)
    model = model_of(checkpoint, threads=1, context=64, kv="bf16")
    states = np.concatenate([model.states(ids) for ids in sample.search]).astype(np.float64)
    expected = np.square(states).mean(axis=0)
    np.testing.assert_allclose(importance["lm_head.weight"], expected + 1e-3 * expected.mean(), rtol=1e-5)
    assert all((each > 0).all() for each in importance.values())
    assert importance["model.layers.1.mlp.down_proj.weight"].shape == (128,)


def test_a_large_vocabulary_compares_fewer_positions(monkeypatch):
    monkeypatch.setattr("edgewise.fit.sensitivity._REFERENCE_BYTES", 264 * 4 * 50)
    reference = Bench(tiny_checkpoint(), threads=1).reference(sample_of(IDS, context=64, tokens=128).search)
    assert reference.rows.tolist() == list(range(0, 64, 3))
    assert [logits.shape for logits in reference.logits] == [(22, 264)] * 2


def test_search_and_check_are_apart_and_spread():
    ids = np.arange(10_000, dtype=np.int32)
    sample = sample_of(ids, context=8192, calibrated=2048)
    assert sample.search.shape == (4, 128)
    assert sample.check.shape == (4, 512)
    assert sample.calibration.shape == (4, 512)
    seen = np.concatenate([sample.search.ravel(), sample.check.ravel(), sample.calibration.ravel()])
    assert len(np.unique(seen)) == len(seen)
    assert seen.max() > 8000
    assert all((np.diff(window) == 1).all() for window in (*sample.search, *sample.check, *sample.calibration))
    assert sample_of(ids, context=8192).calibration.shape == (0, 512)
    assert sample_of(ids[:3000], context=8192, calibrated=9999).calibration.size < 3000 - 2560


@pytest.mark.parametrize("length", [640, 700, 1153, 2559, 2560])
def test_a_short_text_gives_shorter_samples_and_says_so(length):
    ids = np.arange(length, dtype=np.int32)
    if length < 2560:
        with pytest.warns(EdgewiseWarning, match=f"{length} tokens"):
            sample = sample_of(ids, context=8192)
    else:
        sample = sample_of(ids, context=8192)
    seen = np.concatenate([sample.search.ravel(), sample.check.ravel()])
    assert len(np.unique(seen)) == len(seen)


def test_too_short_a_text_is_refused():
    with pytest.raises(InvalidValueError, match="639 tokens; the search needs at least 640"):
        sample_of(np.arange(639), context=8192)


def test_an_encoder_is_refused_with_another_way():
    with pytest.raises(UnsupportedError, match="encoder; load it with a format"):
        Bench(tiny_encoder(), threads=1)
