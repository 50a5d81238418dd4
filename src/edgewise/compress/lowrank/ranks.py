"""Which rank a weight gets: from a share of energy, from an error, or from what many weights may cost together.

Energy is the square of singular values, those of W or, whitened, of X W^T (`decompose.whitened_spectrum`): then the
energy dropped is the squared error of the outputs on the calibration text.

Under a budget each weight takes one option, a rank or to stay as it is, so that the sum of the energies dropped is
least: the multiple-choice knapsack, which `compress.allocate` solves exactly, or with a bound on what was missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.allocate import front_of, lower_bound
from edgewise.core.errors import InvalidValueError

__all__ = ["Ranks", "break_even", "parameters", "rank_of_energy", "rank_of_error", "ranks_within"]

Array = NDArray[Any]
_MOST_RANKS = 120
"""Ranks that a weight chooses among, evenly over those that save something."""
_LEVELS = 1 << 15


def parameters(rows: int, cols: int) -> int:
    """The cost of a matrix where no other is asked for: its numbers."""
    return rows * cols


def break_even(shape: tuple[int, int], cost: Callable[[int, int], int] = parameters) -> int:
    """The largest rank whose two factors cost less than the weight; 0 where none does.

    Counted in numbers, rank (out + in) < out in. cost(rows, cols): bytes of a stored matrix, rising in rows and cols.
    """
    out, inputs = shape
    whole = cost(out, inputs)
    low, high = 0, min(shape)
    while low < high:
        middle = (low + high + 1) // 2
        if cost(out, middle) + cost(middle, inputs) < whole:
            low = middle
        else:
            high = middle - 1
    return low


def rank_of_energy(spectrum: Array, share: float) -> int:
    """The least rank that holds at least this share of the energy. spectrum: singular values, falling."""
    energy = _energy(spectrum)
    if not 0 < share <= 1:
        raise InvalidValueError(f"a share of energy is in (0, 1]; given {share}")
    held = np.cumsum(energy)
    if held[-1] == 0:
        return 1
    return min(int(np.searchsorted(held, share * held[-1])) + 1, len(energy))


def rank_of_error(spectrum: Array, error: float) -> int:
    """The least rank whose error is at most this, relative to the whole: ||X (W - W')^T|| <= error ||X W^T||."""
    energy = _energy(spectrum)
    if not 0 <= error < 1:
        raise InvalidValueError(f"a relative error is in [0, 1); given {error}")
    dropped = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
    return max(int(np.argmax(dropped <= error**2 * dropped[0])), 1)


@dataclass(frozen=True)
class Ranks:
    """Of each weight the rank, or None where it stays as it is. cost: of all; dropped: the sum of energies, each in its
    weight's share; bound: no choice within the limit drops less."""

    ranks: tuple[int | None, ...]
    cost: int
    dropped: float
    bound: float


def ranks_within(spectra: Sequence[Array], shapes: Sequence[tuple[int, int]], limit: int, *,
                 cost: Callable[[int, int], int] = parameters, importance: Sequence[float] | None = None,
                 multiple: int = 1) -> Ranks:
    """The ranks that drop the least energy within a limit on the sum of costs.

    spectra: of each weight all singular values, falling. importance: what a unit of each one's energy counts; by
    default one over its own energy, so that relative errors are added. multiple: ranks are multiples of it, as kernels
    like them. Raises InvalidValueError where even the smallest ranks cost more.
    """
    if not spectra or len(spectra) != len(shapes) or (importance is not None and len(importance) != len(spectra)):
        raise InvalidValueError(f"one spectrum, shape and importance for each weight; given {len(spectra)}, "
                                f"{len(shapes)} and {None if importance is None else len(importance)}")
    sizes: list[list[int]] = []
    losses: list[list[float]] = []
    options: list[list[int | None]] = []
    for number, (spectrum, shape) in enumerate(zip(spectra, shapes, strict=True)):
        energy = _energy(spectrum)
        if len(energy) != min(shape):
            raise InvalidValueError(f"weight {number} of shape {shape} has {min(shape)} singular values; given "
                                    f"{len(energy)}")
        weight = 1 / max(float(energy.sum()), 1e-300) if importance is None else float(importance[number])
        dropped = np.append(np.cumsum(energy[::-1])[::-1], 0.0) * weight
        ranks = _choices(break_even(shape, cost), multiple)
        options.append([*ranks, None])
        sizes.append([*(cost(shape[0], rank) + cost(rank, shape[1]) for rank in ranks), cost(*shape)])
        losses.append([*(float(dropped[rank]) for rank in ranks), 0.0])
    front = front_of(sizes, losses, levels=_LEVELS)
    place = front.at_most(limit)
    if place is None:
        raise InvalidValueError(f"{len(spectra)} weights of the least ranks cost {int(front.sizes[-1])}; the limit is "
                                f"{limit}")
    picks = front.picks[place]
    return Ranks(tuple(each[int(pick)] for each, pick in zip(options, picks, strict=True)), int(front.sizes[place]),
                 float(front.losses[place]), max(lower_bound(sizes, losses, limit), 0.0))


def _choices(most: int, multiple: int) -> list[int]:
    if multiple < 1:
        raise InvalidValueError(f"ranks are multiples of at least 1; given {multiple}")
    count = most // multiple
    if count <= _MOST_RANKS:
        return [multiple * (i + 1) for i in range(count)]
    return sorted({multiple * int(step) for step in np.linspace(1, count, _MOST_RANKS).round()})


def _energy(spectrum: Array) -> NDArray[np.float64]:
    values = np.asarray(spectrum, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or (values < 0).any() or (
            np.diff(values) > 1e-9 * max(float(values[0]), 1e-300)).any():
        raise InvalidValueError("a spectrum is a falling vector of finite singular values, at least one")
    return np.square(values)
