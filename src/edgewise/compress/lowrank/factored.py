"""Linears stored as two thin factors, W ~ L R, which the engine multiplies one after the other.

Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression", ICLR 2025,
arXiv:2403.07378, section 3.1; without statistics, the singular value decomposition itself.

    W G^1/2 = U S V^T   ->   L = U_r  (out, r),   R = U_r^T W  (r, in),   G = X^T X

of all products of rank r the one with the least ||X (W - L R)^T||_F. Every weight keeps one share of its numbers:
r = share out in / (out + in), down to a whole multiple of `multiple`, as groups of quantised weights want it. A weight
for which that is nothing stays as it is.

Differs from the paper: no update of the weights after the truncation (its section 3.2), and L is orthonormal instead of
the singular values being shared by both factors, which changes nothing in L R.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.lowrank.decompose import svd, whitened
from edgewise.compress.quantize.changes import KEPT
from edgewise.compress.walk import Change, Group
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import BF16, FP16, FP32, NumberFormat, float32_to_bf16
from edgewise.core.stats import InputStats
from edgewise.core.storage import Dense, Factored, Stored

__all__ = ["LowRank", "factored_change", "factors_of", "rank_of_share"]


@dataclass(frozen=True)
class LowRank:
    """share: of the numbers of each weight that its factors keep. multiple: the rank is a whole multiple of it."""

    share: float = 0.8
    multiple: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.multiple < 1:
            raise InvalidValueError(f"a share is above 0 and below 1, a multiple at least 1; given {self.share} and "
                                    f"{self.multiple}")


_DEFAULTS = LowRank()


def rank_of_share(shape: tuple[int, ...], config: LowRank = _DEFAULTS) -> int:
    """The rank of a weight (out, in); 0 where the share is too small for one."""
    out, inputs = shape
    return int(config.share * out * inputs / (out + inputs)) // config.multiple * config.multiple


def factors_of(weight: NDArray[np.float32], gram: NDArray[np.floating[Any]] | None, config: LowRank = _DEFAULTS,
               number: NumberFormat = FP32) -> Factored | None:
    """weight: (out, in). gram: (in, in) of its inputs; None: as if these were not correlated. number: of the factors.

    None where the share is too small for a rank.
    """
    rank = rank_of_share(weight.shape, config)
    if rank == 0:
        return None
    made = svd(weight, rank, split="left") if gram is None else whitened(weight, gram, rank)
    return Factored(_stored(made.left, number), _stored(made.right, number))


def _stored(values: NDArray[np.float64], number: NumberFormat) -> Dense:
    floats = np.ascontiguousarray(values, np.float32)
    if number == FP16:
        return Dense(floats.astype(np.float16), FP16)
    return Dense(float32_to_bf16(floats), BF16) if number == BF16 else Dense(floats)


def factored_change(config: LowRank) -> Change:
    """Each linear of a walk as two factors, in the number format that it has."""
    def change(group: Group, tensors: Mapping[str, Stored], stats: InputStats | None) -> dict[str, Stored]:
        gram = None if stats is None else stats.gram
        made: dict[str, Stored] = {}
        for name in group.names:
            if KEPT.search(name):
                continue
            stored = tensors[name]
            factors = factors_of(np.asarray(stored.dense(), np.float32), gram, config,
                                 stored.number if isinstance(stored, Dense) else FP32)
            if factors is not None:
                made[name] = factors
        return made

    return change
