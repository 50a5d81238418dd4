"""One option for each of many items, such that the sum of losses is least within a limit on the sum of sizes.

The multiple-choice knapsack (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, chapter 11), solved for every
limit at once by dynamic programming over sizes:

    f_0(s) = 0;   f_i(s) = min over options o of item i of  f_{i-1}(s - size_o) + loss_o

Sizes are counted in their greatest common divisor, which is exact. Where that makes more than `levels` steps, a coarser
unit is taken and sizes are rounded up to it: every choice still keeps its limit, and `lower_bound` says how far from
the best it can be at most. Losses are taken to add up; how good that is, a measurement of the whole has to say.

`lower_bound` is the optimum of the linear relaxation, in which an item may mix its options: along the lower convex hull
of each item's (size, loss) the steps are taken in order of loss saved per byte (same source, section 11.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError

__all__ = ["LEVELS", "Front", "front_of", "lower_bound"]

LEVELS = 1 << 18
"""Steps of size that the programming distinguishes."""
_MOST_OPTIONS = 127


@dataclass(frozen=True, eq=False)
class Front:
    """Every choice that no other beats in size and loss, from the largest to the smallest.

    sizes: (n,) int64, falling. losses: (n,), rising. picks: (n, items), the option of each item. exact: no limit has a
    better choice than the one here.
    """

    sizes: NDArray[np.int64]
    losses: NDArray[np.float64]
    picks: NDArray[np.int8]
    exact: bool

    def __len__(self) -> int:
        return len(self.sizes)

    def at_most(self, limit: int) -> int | None:
        """Which choice has the least loss within a limit; None where nothing is as small."""
        place = int(np.searchsorted(-self.sizes, -limit))
        return place if place < len(self.sizes) else None


def front_of(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], *, levels: int = LEVELS) -> Front:
    """The front over all items. sizes, losses: of the options of each item; sizes are whole numbers of bytes."""
    _check(sizes, losses)
    base = sum(min(each) for each in sizes)
    extras = [np.asarray(each, np.int64) - min(each) for each in sizes]
    unit = math.gcd(*(int(extra) for each in extras for extra in each)) or 1
    span = sum(int(each.max()) for each in extras) // unit
    exact = span < levels
    if not exact:
        unit = -(-span * unit // (levels - len(extras) - 1)) if levels > len(extras) + 1 else span * unit
    steps = [-(-each // unit) for each in extras]
    least, picked = _programme(steps, [np.asarray(each, np.float64) for each in losses])

    # Of every level the choice; what a larger limit does not improve on is no point of the front.
    better = np.concatenate([[True], least[1:] < least[:-1]])
    level = np.flatnonzero(better)
    picks = np.empty((len(level), len(extras)), np.int8)
    left = level.copy()
    for item in range(len(extras) - 1, -1, -1):
        picks[:, item] = picked[item][np.minimum(left, len(picked[item]) - 1)]
        left -= steps[item][picks[:, item]]
    actual = np.full(len(level), base, np.int64)
    total = np.zeros(len(level))
    for item, extra in enumerate(extras):
        actual += extra[picks[:, item]]
        total += np.asarray(losses[item], np.float64)[picks[:, item]]
    order = np.lexsort((total, actual))  # rounding may have let a choice be smaller than its level
    best = np.minimum.accumulate(total[order])
    kept = order[np.concatenate([[True], best[1:] < best[:-1]])][::-1]
    return Front(actual[kept], total[kept], picks[kept], exact)


def _programme(steps: Sequence[NDArray[np.int64]], losses: Sequence[NDArray[np.float64]]
               ) -> tuple[NDArray[np.float64], list[NDArray[np.int8]]]:
    """(least loss within each level, the option of each item at each level of what it and those before it take)."""
    least = np.zeros(1)
    picked: list[NDArray[np.int8]] = []
    for step, loss in zip(steps, losses, strict=True):
        top = len(least) - 1
        grown = np.full(top + int(step.max()) + 1, np.inf)
        choice = np.zeros(len(grown), np.int8)
        for option in np.lexsort((step, loss)):  # of equal sums the option that saves itself least
            start, gain = int(step[option]), float(loss[option])
            reach = np.full(len(grown) - start, least[-1])
            reach[:top + 1] = least
            reach += gain
            better = reach < grown[start:]
            np.copyto(grown[start:], reach, where=better)
            np.copyto(choice[start:], np.int8(option), where=better)
        least = grown
        picked.append(choice)
    return least, picked


def lower_bound(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: int) -> float:
    """No choice within the limit has a smaller loss. Infinite where nothing is as small."""
    _check(sizes, losses)
    left = limit - sum(min(each) for each in sizes)
    if left < 0:
        return math.inf
    total, saved = 0.0, []
    for size, loss in zip(sizes, losses, strict=True):
        hull = _hull(np.asarray(size, np.float64), np.asarray(loss, np.float64))
        total += hull[0][1]
        saved += [((b[1] - a[1]) / (b[0] - a[0]), b[0] - a[0], a[1] - b[1]) for a, b in pairwise(hull)]
    room = float(left)
    for _, more, gain in sorted(saved):
        share = min(1.0, room / more)
        total -= share * gain
        room -= share * more
        if room <= 0:
            break
    return total


def _hull(size: NDArray[np.float64], loss: NDArray[np.float64]) -> list[tuple[float, float]]:
    """The lower convex hull of an item's options, from the smallest size to the least loss."""
    hull: list[tuple[float, float]] = []
    for place in np.lexsort((loss, size)):
        point = (float(size[place]), float(loss[place]))
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and ((hull[-1][1] - hull[-2][1]) * (point[0] - hull[-2][0])
                                 >= (point[1] - hull[-2][1]) * (hull[-1][0] - hull[-2][0])):
            hull.pop()
        hull.append(point)
    return hull


def _check(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> None:
    if not sizes or len(sizes) != len(losses):
        raise InvalidValueError(f"an allocation needs at least one item, and losses for each; given {len(sizes)} items "
                                f"and {len(losses)} rows of losses")
    for item, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
        if not len(size) or len(size) != len(loss):
            raise InvalidValueError(f"item {item} has {len(size)} sizes and {len(loss)} losses; expected as many, and "
                                    "at least one")
        if len(size) > _MOST_OPTIONS:
            raise InvalidValueError(f"item {item} has {len(size)} options; at most {_MOST_OPTIONS} are told apart")
        if min(size) < 0 or not all(math.isfinite(value) for value in loss):
            raise InvalidValueError(f"item {item}: sizes are not negative and losses finite; given {list(size)} and "
                                    f"{list(loss)}")
