"""The Pareto front equals what trying every combination finds."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from edgewise.fit.allocate import bound_of, front_of
from edgewise.fit.candidates import Candidate


def problem(groups: int, choices: int, seed: int) -> tuple[list[list[Candidate]], list[list[float]]]:
    rng = np.random.default_rng(seed)
    candidates = [[Candidate(None, (), int(size), int(size) - 7)
                   for size in sorted(rng.integers(10, 200, choices), reverse=True)] for _ in range(groups)]
    return candidates, [[0.0, *np.sort(rng.uniform(0, 1, choices - 1))] for _ in range(groups)]


def every_front(candidates, kls, by) -> set[tuple[int, float]]:
    """By trying all: the points that no other point equals or beats in both."""
    points = set()
    for picks in product(*(range(len(choices)) for choices in candidates)):
        chosen = [choices[pick] for choices, pick in zip(candidates, picks, strict=True)]
        size = sum(each.packed_bytes if by == "packed" else each.stored_bytes for each in chosen)
        points.add((size, round(sum(costs[pick] for costs, pick in zip(kls, picks, strict=True)), 9)))
    return {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}


@pytest.mark.parametrize("by", ["packed", "stored"])
@pytest.mark.parametrize("seed", range(6))
def test_equals_trying_every_combination(seed, by):
    candidates, kls = problem(4, 5, seed)
    front = front_of(candidates, kls, by)
    found = {(point.packed_bytes if by == "packed" else point.stored_bytes, round(point.kl, 9)) for point in front}
    assert found == every_front(candidates, kls, by)
    for point in front:
        chosen = [choices[pick] for choices, pick in zip(candidates, point.picks, strict=True)]
        assert sum(each.packed_bytes for each in chosen) == point.packed_bytes
        assert sum(each.stored_bytes for each in chosen) == point.stored_bytes
        assert sum(costs[pick] for costs, pick in zip(kls, point.picks, strict=True)) == pytest.approx(point.kl)


def test_runs_from_the_largest_to_the_smallest():
    front = front_of(*problem(5, 4, 9))
    assert [p.packed_bytes for p in front] == sorted((p.packed_bytes for p in front), reverse=True)
    assert [p.kl for p in front] == sorted(p.kl for p in front)
    assert front[0].kl == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_is_below_and_near(seed):
    candidates, kls = problem(6, 5, seed)
    front = front_of(candidates, kls)
    assert front.exact
    for point in front:
        assert bound_of(candidates, kls, point.packed_bytes) <= point.kl + 1e-12
    smallest = min(point.packed_bytes for point in front)
    assert bound_of(candidates, kls, smallest - 1) == np.inf
