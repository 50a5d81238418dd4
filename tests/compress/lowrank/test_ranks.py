"""Ranks: beside a search of everything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from edgewise.compress.lowrank.ranks import break_even, rank_of_energy, rank_of_error, ranks_within
from edgewise.core.errors import InvalidValueError

RNG = np.random.default_rng(2)


def spectrum(count, fall):
    return np.sort(RNG.random(count) * fall ** np.arange(count))[::-1]


def test_the_break_even_rank_is_the_last_that_saves_something():
    for shape in ((8, 8), (3, 100), (7, 5), (1, 1)):
        slow = max([r for r in range(1, min(shape) + 1) if r * sum(shape) < shape[0] * shape[1]], default=0)
        assert break_even(shape) == slow
    assert break_even((64, 64), lambda rows, cols: rows * -(-cols // 32)) == 31  # whole blocks of 32 inputs


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_rank_of_energy_is_the_least_that_holds_it(share):
    values = spectrum(12, 0.8)
    held = [float((values[:r]**2).sum()) for r in range(13)]
    assert rank_of_energy(values, share) == next(r for r in range(1, 13) if held[r] >= share * held[12] * (1 - 1e-12))


@pytest.mark.parametrize("error", [0.0, 0.05, 0.3, 0.9])
def test_rank_of_error_is_the_least_that_keeps_it(error):
    values = spectrum(12, 0.7)
    left = [float(np.sqrt((values[r:]**2).sum())) for r in range(13)]
    rank = rank_of_error(values, error)
    assert left[rank] <= error * left[0]
    assert rank == 1 or left[rank - 1] > error * left[0]


def test_a_weight_of_zeros_has_rank_one():
    assert rank_of_energy(np.zeros(4), 0.9) == 1
    assert rank_of_error(np.zeros(4), 0.1) == 1


def searched(spectra, shapes, limit, importance):
    best = np.inf
    for choice in product(*([*range(1, break_even(shape) + 1), None] for shape in shapes)):
        cost = sum(m * n if r is None else r * (m + n) for r, (m, n) in zip(choice, shapes, strict=True))
        if cost <= limit:
            lost = sum(0 if r is None else w * float((s[r:]**2).sum())
                       for r, s, w in zip(choice, spectra, importance, strict=True))
            best = min(best, lost)
    return best


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8, 1.0])
def test_ranks_within_a_budget_drop_the_least(share):
    shapes = [(12, 12), (8, 20), (16, 9)]
    spectra = [spectrum(min(shape), fall) for shape, fall in zip(shapes, (0.6, 0.95, 0.8), strict=True)]
    limit = int(share * sum(m * n for m, n in shapes))
    for importance in (None, [1.0, 3.0, 0.5]):
        weights = importance or [1 / float((s**2).sum()) for s in spectra]
        found = ranks_within(spectra, shapes, limit, importance=importance)
        assert found.cost <= limit
        assert found.dropped == pytest.approx(searched(spectra, shapes, limit, weights), abs=1e-12)
        assert found.bound <= found.dropped + 1e-12
        lost = sum(0 if r is None else w * float((s[r:]**2).sum())
                   for r, s, w in zip(found.ranks, spectra, weights, strict=True))
        assert lost == pytest.approx(found.dropped, abs=1e-12)
    assert (share < 1) == any(rank is not None for rank in found.ranks)


def test_of_many_large_weights_little_is_missed_and_multiples_are_kept():
    shapes = [(576, 576), (1536, 576), (576, 1536)] * 6
    spectra = [spectrum(576, fall) for fall in RNG.uniform(0.98, 0.999, len(shapes))]
    limit = int(0.7 * sum(m * n for m, n in shapes))
    found = ranks_within(spectra, shapes, limit, multiple=8)
    assert all(rank is None or rank % 8 == 0 for rank in found.ranks)
    assert found.cost <= limit
    assert found.dropped <= 1.02 * found.bound + 1e-3


@pytest.mark.parametrize(("call", "words"), [
    (lambda: rank_of_energy(np.ones(3), 0.0), "share of energy"), (lambda: rank_of_error(np.ones(3), 1.0), "relative"),
    (lambda: rank_of_energy(np.arange(3.0), 0.5), "falling"), (lambda: ranks_within([], [], 1), "one spectrum"),
    (lambda: ranks_within([np.ones(3)], [(4, 4)], 10), "4 singular values"),
    (lambda: ranks_within([np.ones(4)], [(4, 4)], 1), "the limit is 1"),
    (lambda: ranks_within([np.ones(4)], [(4, 4)], 9, multiple=0), "multiples"),
])
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(InvalidValueError, match=words):
        call()
