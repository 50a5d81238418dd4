"""Allocation against every choice there is, and the bound against what it bounds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from edgewise.compress.allocate import front_of, lower_bound
from edgewise.core.errors import InvalidValueError


def problem(seed, items=6, options=4, step=1):
    rng = np.random.default_rng(seed)
    sizes = [sorted((step * rng.integers(1, 60, options)).tolist(), reverse=True) for _ in range(items)]
    losses = [sorted(rng.exponential(1.0, options).tolist()) for _ in range(items)]
    if seed % 2:  # options that others beat, and equal ones
        losses[0][1], losses[1] = losses[0][-1] + 1, [losses[1][0]] * options
    return sizes, losses


def every_choice(sizes, losses):
    for picks in itertools.product(*(range(len(each)) for each in sizes)):
        yield (sum(size[pick] for size, pick in zip(sizes, picks, strict=True)),
               sum(loss[pick] for loss, pick in zip(losses, picks, strict=True)))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("step", [1, 4096])
def test_it_is_the_best_of_every_choice_at_every_limit(seed, step):
    sizes, losses = problem(seed, step=step)
    front = front_of(sizes, losses)
    choices = list(every_choice(sizes, losses))
    assert front.exact
    for limit in {size for size, _ in choices} | {0, min(s for s, _ in choices) - 1, 10**9}:
        best = min((loss for size, loss in choices if size <= limit), default=None)
        place = front.at_most(limit)
        if best is None:
            assert place is None
            continue
        assert front.sizes[place] <= limit
        assert front.losses[place] == pytest.approx(best, rel=1e-12)
        assert lower_bound(sizes, losses, limit) <= best * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_picks_are_what_they_say_and_nothing_on_the_front_is_beaten(seed):
    sizes, losses = problem(seed)
    front = front_of(sizes, losses)
    assert (np.diff(front.sizes) < 0).all()
    assert (np.diff(front.losses) > 0).all()
    for size, loss, picks in zip(front.sizes, front.losses, front.picks, strict=True):
        assert size == sum(sizes[item][pick] for item, pick in enumerate(picks))
        assert loss == pytest.approx(sum(losses[item][pick] for item, pick in enumerate(picks)))


@pytest.mark.parametrize("levels", [40, 200])
def test_a_coarse_unit_keeps_every_limit_and_the_bound(levels):
    sizes, losses = problem(3, items=7, options=3, step=7)
    sizes = [[size + place % 3 for place, size in enumerate(each)] for each in sizes]
    exact, coarse = front_of(sizes, losses), front_of(sizes, losses, levels=levels)
    assert not coarse.exact
    for limit in exact.sizes[exact.sizes >= coarse.sizes[-1]]:
        place = coarse.at_most(int(limit))
        assert coarse.sizes[place] <= limit
        best = exact.losses[exact.at_most(int(limit))]
        assert lower_bound(sizes, losses, int(limit)) - 1e-12 <= best <= coarse.losses[place] + 1e-12
    assert np.mean([coarse.losses[coarse.at_most(int(limit))] / exact.losses[exact.at_most(int(limit))]
                    for limit in exact.sizes[:len(exact) // 2]]) < 1.5


def test_many_tensors_are_within_the_bound_of_one_item():
    rng = np.random.default_rng(0)
    bits = np.array([8.5, 6.5, 5.5, 5, 4.5, 4, 3.5, 3, 2.5])
    weights = rng.choice([192 * 576, 576 * 576, 1536 * 576], 210)
    sizes = [(np.ceil(bits * count / 8 / 4096) * 4096).astype(int).tolist() for count in weights]
    losses = [(scale * 4.0**-bits).tolist() for scale in np.exp(rng.standard_normal(210))]
    front = front_of(sizes, losses)
    limit = int(weights.sum() * 4.3 / 8)
    found, bound = front.losses[front.at_most(limit)], lower_bound(sizes, losses, limit)
    assert front.exact
    assert bound <= found < 1.01 * bound  # a mixed item is one of 210
    uniform = sum(loss[5] for loss in losses)
    assert found < 0.8 * uniform


def test_one_item_and_one_option():
    front = front_of([[5]], [[0.25]])
    assert (front.sizes.tolist(), front.losses.tolist(), front.picks.tolist()) == ([5], [0.25], [[0]])
    assert front.at_most(4) is None
    assert lower_bound([[5]], [[0.25]], 4) == math.inf


@pytest.mark.parametrize(("sizes", "losses", "words"), [
    ([], [], "at least one item"), ([[1]], [], "losses for each"), ([[1, 2]], [[0.1]], "as many"),
    ([[]], [[]], "at least one"), ([[-1]], [[0.1]], "not negative"), ([[1]], [[math.nan]], "finite"),
])
def test_what_is_no_problem_is_refused(sizes, losses, words):
    with pytest.raises(InvalidValueError, match=words):
        front_of(sizes, losses)
