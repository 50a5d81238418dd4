"""Statistics of parts, merged, are the statistics of the whole."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.core.errors import InvalidValueError
from edgewise.core.stats import InputStats, Stats

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
