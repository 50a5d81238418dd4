"""Formats for all tensors at once: the Pareto front of bytes against predicted divergence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.allocate import front_of as exact_front
from edgewise.compress.allocate import lower_bound
from edgewise.fit.candidates import Candidate

__all__ = ["Allocation", "Points", "bound_of", "front_of"]


@dataclass(frozen=True)
class Allocation:
    """picks: the place of the candidate of each group. kl: predicted, in nats."""

    picks: tuple[int, ...]
    packed_bytes: int
    stored_bytes: int
    kl: float


@dataclass(frozen=True, eq=False)
class Points:
    """Allocations that no other beats in one kind of bytes and in divergence, from the largest to the smallest.

    packed, stored: (n,) bytes. kl: (n,) nats. exact: no limit has a better allocation.
    """

    packed: NDArray[np.int64]
    stored: NDArray[np.int64]
    kl: NDArray[np.float64]
    picks: NDArray[np.int8]
    exact: bool

    def __len__(self) -> int:
        return len(self.kl)

    def __getitem__(self, place: int) -> Allocation:
        return Allocation(tuple(self.picks[place].tolist()), int(self.packed[place]), int(self.stored[place]),
                          float(self.kl[place]))

    def __iter__(self) -> Iterator[Allocation]:
        return (self[place] for place in range(len(self)))


def front_of(candidates: Sequence[Sequence[Candidate]], kls: Sequence[Sequence[float]],
             by: Literal["packed", "stored"] = "packed") -> Points:
    """candidates, kls: for each group its candidates and their divergences. by: which bytes count."""
    packed, stored = ([[int(getattr(choice, f"{which}_bytes")) for choice in choices] for choices in candidates]
                      for which in ("packed", "stored"))
    front = exact_front(packed if by == "packed" else stored, kls)

    def total(sizes: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        sums = np.zeros(len(front), np.int64)
        for item, each in enumerate(sizes):
            sums += np.asarray(each, np.int64)[front.picks[:, item]]
        return sums

    return Points(total(packed), total(stored), front.losses, front.picks, front.exact)


def bound_of(candidates: Sequence[Sequence[Candidate]], kls: Sequence[Sequence[float]],
             packed_bytes: int) -> float:
    """No allocation of at most so many packed bytes has a smaller predicted divergence."""
    return lower_bound([[choice.packed_bytes for choice in choices] for choices in candidates], kls, packed_bytes)
