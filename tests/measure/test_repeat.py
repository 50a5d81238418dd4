"""Statistics of repeated runs, on costs that are known."""

from __future__ import annotations

import math
import random

import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.measure.repeat import Sample, compare, median_interval, repeat, rounds, time_call


def coverage(n: int, k: int) -> float:
    return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n


@pytest.mark.parametrize(("n", "k"), [(6, 1), (8, 1), (9, 2), (15, 4), (20, 6), (100, 40)])
def test_interval_ranks_are_those_of_the_sign_test(n, k):
    assert median_interval(range(1, n + 1)) == (k, n + 1 - k)
    assert coverage(n, k) >= 0.95 > coverage(n, k + 1)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_too_few_values_have_no_interval(n):
    assert median_interval(range(n)) is None
    sample = Sample(tuple(map(float, range(1, n + 1))))
    assert sample.quantity("t").spread == (1, n)


def test_the_interval_covers_the_median_as_often_as_promised():
    rng = random.Random(0)
    inside = 0
    for _ in range(2000):
        low, high = median_interval([rng.lognormvariate(0, 1) for _ in range(15)])
        inside += low <= 1.0 <= high
    assert inside / 2000 == pytest.approx(coverage(15, 4), abs=0.015)


def test_repeat_drops_the_warm_up():
    runs = []
    sample = repeat(lambda: runs.append(1), warmup=2, repeats=5, measure=lambda call: call() or float(len(runs)))
    assert len(runs) == 7
    assert sample.values == (3, 4, 5, 6, 7)
    assert sample.median == 5


def test_compare_pairs_runs_and_forgets_a_common_slowness():
    weather = random.Random(1)
    calls: list[str] = []
    state = {"n": 0, "slow": 1.0}

    def cost(call):
        if state["n"] % 2 == 0:
            state["slow"] = weather.choice([1.0, 1.7, 3.0])  # neighbours come and go between pairs
        state["n"] += 1
        call()
        return state["slow"] * {"a": 1.1, "b": 1.0}[calls[-1]]

    result = compare(lambda: calls.append("a"), lambda: calls.append("b"), warmup=1, pairs=15, measure=cost)
    assert result.ratio == pytest.approx(1.1)
    low, high = result.interval
    assert low == pytest.approx(1.1)
    assert high == pytest.approx(1.1)
    pairs = ["".join(calls[i:i + 2]) for i in range(2, len(calls), 2)]
    assert len(pairs) == 15
    assert set(pairs) == {"ab", "ba"}
    assert result.quantity().value == result.ratio


def test_time_call_runs_it_once():
    runs = []
    assert time_call(lambda: runs.append(1)) > 0
    assert runs == [1]


@pytest.mark.parametrize("make", [
    lambda: repeat(print, repeats=0), lambda: repeat(print, warmup=-1),
    lambda: compare(lambda: None, lambda: None, pairs=0),
    lambda: compare(lambda: None, lambda: None, measure=lambda call: 0.0),
])
def test_refusals(make):
    with pytest.raises(InvalidValueError):
        make()


def test_rounds_run_everything_once_per_round_in_random_order():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    costs = iter(range(1000))

    def measure(call):
        call()
        return float(next(costs))

    found = rounds(calls, warmup=1, repeats=8, seed=1, measure=measure)
    turns = [order[i:i + 3] for i in range(0, len(order), 3)]
    assert len(turns) == 9
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    for name in "abc":
        assert found[name].values == tuple(float(3 * i + turn.index(name)) for i, turn in enumerate(turns) if i)
