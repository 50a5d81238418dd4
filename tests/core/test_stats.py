"""Statistics of parts, merged, are the statistics of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.core.errors import InvalidValueError
from edgewise.core.stats import InputGatherer, InputStats, Stats

FIELDS = ("min", "max", "absmax", "total", "total_square", "mean", "mean_square", "gram")


@given(st.data())
def test_merging_parts_is_the_whole(data):
    # Small integers, so that float64 sums are exact whatever their order.
    x = data.draw(arrays.arrays(np.int16, st.tuples(st.integers(2, 20), st.integers(1, 6))))
    cut = data.draw(st.integers(1, len(x) - 1))
    whole = InputStats.from_samples(x, gram=True)
    merged = InputStats.from_samples(x[:cut], gram=True) + InputStats.from_samples(x[cut:], gram=True)
    assert merged.count == whole.count == len(x)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))


def test_against_numpy():
    x = np.random.default_rng(0).normal(3, 2, (4, 25, 7)).astype(np.float32)
    stats, flat = InputStats.from_samples(x, gram=True), x.reshape(-1, 7).astype(np.float64)
    assert stats.count == 100
    np.testing.assert_array_equal(stats.absmax, np.abs(flat).max(axis=0))
    np.testing.assert_allclose(stats.mean, flat.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.mean_square, (flat**2).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.gram, flat.T @ flat, rtol=1e-12)
    np.testing.assert_allclose(np.diag(stats.gram), stats.total_square, rtol=1e-12)


def test_merging_by_name_keeps_names_of_one_side():
    left = Stats.from_samples({"q": np.ones((2, 3)), "k": np.ones((1, 3))})
    right = Stats.from_samples({"q": np.zeros((1, 3)), "v": np.ones((1, 3))})
    both = left + right
    assert {name: item.count for name, item in both.items()} == {"q": 3, "k": 1, "v": 1}
    assert left["q"].count == 2
    assert repr(both) == "Stats(3 inputs)"
    assert repr(both["q"]) == "InputStats(3 inputs, 3 samples)"


@pytest.mark.parametrize(("make", "message"), [
    (lambda: InputStats.from_samples(np.zeros((0, 3))), "at least one sample"),
    (lambda: InputStats.from_samples(np.array([[1.0, np.nan]])), "sample 0, input 1 is nan"),
    (lambda: InputStats.from_samples(np.ones((1, 2))) + InputStats.from_samples(np.ones((1, 3))), "2 and 3 inputs"),
    (lambda: InputStats.from_samples(np.ones((1, 2)), gram=True) + InputStats.from_samples(np.ones((1, 2))), "without"),
    (lambda: InputStats(1, np.ones(2), np.ones(3), np.ones(2), np.ones(2)), "one length"),
    (lambda: InputStats(1, *[np.ones(2)] * 4, gram=np.ones((2, 3))), "gram is"),
])
def test_refusals(make, message):
    with pytest.raises(InvalidValueError, match=message):
        make()


@pytest.mark.parametrize("count", [1, 3, 1024, 2500])
def test_gathered_in_pieces_is_what_float64_gives(count):
    rng = np.random.default_rng(count)
    x = (rng.standard_normal((count, 40)) * np.exp(rng.standard_normal(40)) + rng.standard_normal(40)).astype(
        np.float32)
    exact = InputStats.from_samples(x, gram=True)
    gatherer = InputGatherer(gram=True)
    for part in np.array_split(x, 3):
        if len(part):
            gatherer.add(part)
    found = gatherer.stats()
    assert found.count == count
    assert np.array_equal(found.min, exact.min)
    assert np.array_equal(found.max, exact.max)
    assert np.allclose(found.total, exact.total, rtol=1e-12, atol=1e-9)
    size = np.abs(x).astype(np.float64)
    assert (np.abs(found.gram - exact.gram) <= 6.2e-5 * (size.T @ size)).all()
    assert np.array_equal(found.gram, found.gram.T)
    without = InputGatherer()
    without.add(x)
    assert without.stats().gram is None
    assert np.allclose(without.stats().total_square, exact.total_square, rtol=1e-12)


def test_samples_are_evenly_spaced_and_few():
    x = np.arange(1000, dtype=np.float32)[:, None]
    whole, pieces = InputGatherer(samples=60), InputGatherer(samples=60)
    whole.add(x)
    for start in range(0, 1000, 7):
        pieces.add(x[start:start + 7])
    kept = whole.stats().samples[:, 0]
    assert np.array_equal(kept, pieces.stats().samples[:, 0])
    assert np.array_equal(kept, np.arange(0, 1000, 32))
    both = whole.stats() + pieces.stats()
    assert both.samples.shape == (64, 1)
    assert InputStats.from_samples(x).samples is None
    with pytest.raises(InvalidValueError, match="with samples and without"):
        whole.stats() + InputStats.from_samples(x)


def test_the_gatherer_refuses_what_statistics_cannot_hold():
    gatherer = InputGatherer()
    with pytest.raises(InvalidValueError, match="at least one sample"):
        gatherer.stats()
    gatherer.add(np.ones((2, 3)))
    with pytest.raises(InvalidValueError, match="sample 3, input 1 is nan"):
        gatherer.add(np.array([[0, 0, 0], [0, np.nan, 0]]))
    with pytest.raises(InvalidValueError, match="of 3 inputs"):
        gatherer.add(np.ones((2, 4)))


def test_squared_gradients_merge():
    def item(seed):
        made = InputStats.from_samples(np.ones((2, 3)))
        return replace(made, gradient_square=np.full((5, 3), float(seed)))

    assert np.array_equal((item(1) + item(2)).gradient_square, np.full((5, 3), 3.0))
    with pytest.raises(InvalidValueError, match="gradient_square are"):
        replace(item(1), gradient_square=np.ones((5, 4)))


def test_stats_of_another_mapping_are_read_when_asked():
    class Lazy(Mapping):
        asked = 0

        def __getitem__(self, name):
            Lazy.asked += 1
            return InputStats.from_samples(np.ones((2, 3)))

        def __iter__(self):
            return iter(["a"])

        def __len__(self):
            return 1

    stats = Stats(Lazy())
    assert Lazy.asked == 0
    assert stats["a"].count == 2
    assert (stats + stats)["a"].count == 4
