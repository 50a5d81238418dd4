"""Repeated and interleaved runs on a machine that others use too.

A single run says little: neighbours can halve a speed for seconds. `compare` therefore runs two callables in pairs,
close together in time and in random order within the pair, and looks at the ratio within each pair.

The interval is that of the median by order statistics: of n independent values, the k-th smallest and the k-th
largest enclose the median with probability 1 - 2 P(B < k), B binomial with n trials of one half. It assumes no
distribution. k is the largest with at least 95 %; below 6 values there is none.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgewise.core.errors import InvalidValueError
from edgewise.core.report import Quantity

__all__ = ["Comparison", "Sample", "compare", "median_interval", "repeat", "rounds",
           "time_call"]


def time_call(call: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """The interval that holds the median with at least that confidence; None when there are too few values."""
    n, tail, k = len(values), 0.0, 0
    while k < (n + 1) // 2:
        tail += math.comb(n, k) / 2**n  # P(B <= k)
        if 2 * tail > 1 - confidence:
            break
        k += 1
    if k == 0:
        return None
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


@dataclass(frozen=True)
class Sample:
    """Values of repeated runs, in the order they were taken."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the median; None below 6 values."""
        return median_interval(self.values)

    def quantity(self, name: str, unit: str = "s") -> Quantity:
        """The median with its interval, or with the range of all values when there are too few for one."""
        return Quantity(name, self.median, unit, self.interval or (min(self.values), max(self.values)))


@dataclass(frozen=True)
class Comparison:
    """Paired runs of two callables. ratio: first / second, below 1 when the first takes less."""

    first: Sample
    second: Sample

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(a / b for a, b in zip(self.first.values, self.second.values, strict=True))

    @property
    def ratio(self) -> float:
        """The median of the ratios within pairs."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of `ratio`; None below 6 pairs."""
        return median_interval(self.ratios)

    def quantity(self, name: str = "ratio") -> Quantity:
        return Quantity(name, self.ratio, "", self.interval or (min(self.ratios), max(self.ratios)))


def repeat(call: Callable[[], Any], *, warmup: int = 1, repeats: int = 7,
           measure: Callable[[Callable[[], Any]], float] = time_call) -> Sample:
    """Run `call` warmup + repeats times and keep the later ones. measure: what one run costs; by default seconds."""
    _check(warmup, repeats, "repeats")
    for _ in range(warmup):
        call()
    return Sample(tuple(measure(call) for _ in range(repeats)))


def rounds(calls: Mapping[str, Callable[[], Any]], *, warmup: int = 1, repeats: int = 7, seed: int = 0,
           measure: Callable[[Callable[[], Any]], float] = time_call) -> dict[str, Sample]:
    """Run every call once per round, in random order within the round, and keep the rounds after the warm-up.

    So a slow moment of the machine falls on all of them. seed: of the order. measure: what one run costs.
    """
    _check(warmup, repeats, "repeats")
    order = random.Random(seed)
    costs: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name in order.sample(sorted(calls), len(calls)):
            cost = measure(calls[name])
            if turn >= warmup:
                costs[name].append(cost)
    return {name: Sample(tuple(values)) for name, values in costs.items()}


def compare(first: Callable[[], Any], second: Callable[[], Any], *, warmup: int = 1, pairs: int = 15, seed: int = 0,
            measure: Callable[[Callable[[], Any]], float] = time_call) -> Comparison:
    """Run both in `pairs` pairs, after `warmup` runs of each. seed: of the order within each pair.

    measure: what one run costs; it must be positive.
    """
    _check(warmup, pairs, "pairs")
    for _ in range(warmup):
        first()
        second()
    order = random.Random(seed)
    costs: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        for which in (0, 1) if order.random() < 0.5 else (1, 0):
            cost = measure((first, second)[which])
            if not cost > 0:
                raise InvalidValueError(f"a ratio needs positive costs; a run of the {('first', 'second')[which]} "
                                        f"cost {cost}")
            costs[which].append(cost)
    return Comparison(Sample(tuple(costs[0])), Sample(tuple(costs[1])))


def _check(warmup: int, count: int, name: str) -> None:
    if warmup < 0 or count < 1:
        raise InvalidValueError(f"warmup is at least 0 and {name} at least 1; given {warmup} and {count}")
