"""Formats for all groups at once: the Pareto front of bytes against predicted divergence.

Divergences of single groups are taken to add up. The front is built by joining one group after the other and keeping
what nothing else beats on both counts, which is exact for a sum; a front that grows beyond a limit is thinned evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgewise.fit.candidates import Candidate

__all__ = ["Allocation", "front_of"]

_LIMIT = 20_000
"""Points of a front; thinning keeps both ends."""


@dataclass(frozen=True)
class Allocation:
    """picks: the place of the candidate of each group. kl: predicted, in nats."""

    picks: tuple[int, ...]
    packed_bytes: int
    stored_bytes: int
    kl: float


def front_of(candidates: Sequence[Sequence[Candidate]], kls: Sequence[Sequence[float]],
             by: Literal["packed", "stored"] = "packed") -> list[Allocation]:
    """Every choice that no other beats in bytes and divergence, from the largest to the smallest.

    candidates, kls: for each group its candidates and their divergences. by: which bytes count.
    """
    sizes = np.zeros((1, 2), np.int64)  # packed, stored
    loss = np.zeros(1)
    picks = np.zeros((1, 0), np.int16)
    column = 0 if by == "packed" else 1
    for choices, costs in zip(candidates, kls, strict=True):
        own = np.array([(choice.packed_bytes, choice.stored_bytes) for choice in choices], np.int64)
        joined = (sizes[:, None] + own[None]).reshape(-1, 2)
        total = (loss[:, None] + np.asarray(costs)[None]).reshape(-1)
        which = np.tile(np.arange(len(choices), dtype=np.int16), len(loss))
        kept = _undominated(joined[:, column], total)
        if len(kept) > _LIMIT:
            kept = kept[np.unique(np.rint(np.linspace(0, len(kept) - 1, _LIMIT)).astype(np.int64))]
        sizes, loss = joined[kept], total[kept]
        picks = np.concatenate([picks[kept // len(choices)], which[kept, None]], axis=1)
    return [Allocation(tuple(int(place) for place in row), int(size[0]), int(size[1]), float(kl))
            for row, size, kl in zip(picks, sizes, loss, strict=True)]


def _undominated(nbytes: NDArray[np.int64], kl: NDArray[np.float64]) -> NDArray[np.int64]:
    """Places of the front, by falling bytes and rising divergence."""
    order = np.lexsort((kl, nbytes))  # the fewest bytes first, among equal ones the least divergence
    best = np.minimum.accumulate(kl[order])
    first = np.concatenate([[True], best[1:] < best[:-1]])
    kept: NDArray[np.int64] = order[first][::-1]
    return kept
