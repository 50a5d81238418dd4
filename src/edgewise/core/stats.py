"""What a calibration text showed at the input of every linear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError

__all__ = ["InputStats", "Stats"]

Float64 = NDArray[np.float64]


@dataclass(frozen=True, repr=False, eq=False)
class InputStats:
    """Statistics over `count` input vectors of one linear. Vectors are (in,) float64; gram is (in, in) float64.

    Sums are kept, not means, so that merging adds and nothing else: `a + b` is what the joined samples would give,
    up to the rounding of a float64 sum.
    """

    count: int
    min: Float64
    max: Float64
    total: Float64
    total_square: Float64
    gram: Float64 | None = None

    def __post_init__(self) -> None:
        size = self.min.shape
        if len(size) != 1 or any(v.shape != size for v in (self.max, self.total, self.total_square)):
            raise InvalidValueError(f"statistics are vectors of one length; given min {size}, max {self.max.shape}, "
                                    f"total {self.total.shape}, total_square {self.total_square.shape}")
        if self.gram is not None and self.gram.shape != (size[0], size[0]):
            raise InvalidValueError(f"gram is ({size[0]}, {size[0]}); given {self.gram.shape}")

    @classmethod
    def from_samples(cls, x: NDArray[Any], *, gram: bool = False) -> InputStats:
        """x: (..., in) of at least one finite vector. gram: keep X^T X as well."""
        x = np.asarray(x, np.float64)
        x = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
        if x.size == 0:
            raise InvalidValueError(f"statistics need at least one sample; given shape {x.shape}")
        if not np.isfinite(x).all():
            row, column = np.argwhere(~np.isfinite(x))[0]
            raise InvalidValueError(f"statistics need finite samples; sample {row}, input {column} is {x[row, column]}")
        return cls(len(x), x.min(axis=0), x.max(axis=0), x.sum(axis=0), np.square(x).sum(axis=0),
                   x.T @ x if gram else None)

    @property
    def absmax(self) -> Float64:
        return np.maximum(np.abs(self.min), np.abs(self.max))

    @property
    def mean(self) -> Float64:
        return self.total / self.count

    @property
    def mean_square(self) -> Float64:
        return self.total_square / self.count

    def __add__(self, other: InputStats) -> InputStats:
        if not isinstance(other, InputStats):
            return NotImplemented
        if self.min.shape != other.min.shape:
            raise InvalidValueError(f"cannot merge statistics of {len(self.min)} and {len(other.min)} inputs")
        if (self.gram is None) != (other.gram is None):
            raise InvalidValueError("cannot merge statistics with X^T X and without; gather both alike")
        gram = None if self.gram is None or other.gram is None else self.gram + other.gram
        return InputStats(self.count + other.count, np.minimum(self.min, other.min), np.maximum(self.max, other.max),
                          self.total + other.total, self.total_square + other.total_square, gram)

    def __repr__(self) -> str:
        return f"InputStats({len(self.min)} inputs, {self.count} samples{', gram' if self.gram is not None else ''})"


class Stats(Mapping[str, InputStats]):
    """InputStats by the name of the linear's weight. Immutable; `a + b` merges, names of only one side included."""

    def __init__(self, inputs: Mapping[str, InputStats]) -> None:
        self._inputs = dict(inputs)

    @classmethod
    def from_samples(cls, samples: Mapping[str, NDArray[Any]], *, gram: bool = False) -> Stats:
        """samples: by name, (..., in)."""
        return cls({name: InputStats.from_samples(x, gram=gram) for name, x in samples.items()})

    def __getitem__(self, name: str) -> InputStats:
        return self._inputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)

    def __add__(self, other: Stats) -> Stats:
        if not isinstance(other, Stats):
            return NotImplemented
        merged = dict(self._inputs)
        for name, item in other.items():
            merged[name] = merged[name] + item if name in merged else item
        return Stats(merged)

    def __repr__(self) -> str:
        return f"Stats({len(self)} inputs)"
