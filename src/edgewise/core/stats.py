"""What a calibration text showed at the input of every linear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError

__all__ = ["InputGatherer", "InputStats", "Stats"]

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]
_ROWS = 1024
"""Rows of one float32 product, which is off by at most 1024 * 2^-24 / (1 - 1024 * 2^-24) < 6.2e-5 of |X|^T |X|, element
by element; products are added up in float64."""


@dataclass(frozen=True, repr=False, eq=False)
class InputStats:
    """Statistics over `count` input vectors of one linear. Vectors are (in,) float64; gram, X^T X, (in, in) float64.

    samples: some of the vectors, (n, in) float32. gradient_square: the sum over sequences of the squared gradient of
    the loss by each weight, (out, in) float64: of one linear, and only where a model is run with its backward pass.
    Sums are kept, not means, so that merging adds and nothing else: `a + b` is what the joined samples would give,
    up to the rounding of a float64 sum.
    """

    count: int
    min: Float64
    max: Float64
    total: Float64
    total_square: Float64
    gram: Float64 | None = None
    samples: Float32 | None = None
    gradient_square: Float64 | None = None

    def __post_init__(self) -> None:
        size = self.min.shape
        if len(size) != 1 or any(v.shape != size for v in (self.max, self.total, self.total_square)):
            raise InvalidValueError(f"statistics are vectors of one length; given min {size}, max {self.max.shape}, "
                                    f"total {self.total.shape}, total_square {self.total_square.shape}")
        if self.gram is not None and self.gram.shape != (size[0], size[0]):
            raise InvalidValueError(f"gram is ({size[0]}, {size[0]}); given {self.gram.shape}")
        for name in ("samples", "gradient_square"):
            values = getattr(self, name)
            if values is not None and (values.ndim != 2 or values.shape[1] != size[0]):
                raise InvalidValueError(f"{name} are (n, {size[0]}); given {values.shape}")

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
        for name, what in (("gram", "X^T X"), ("samples", "samples"), ("gradient_square", "squared gradients")):
            if (getattr(self, name) is None) != (getattr(other, name) is None):
                raise InvalidValueError(f"cannot merge statistics with {what} and without; gather both alike")
        squares = (self.gradient_square, other.gradient_square)
        if squares[0] is not None and squares[1] is not None and squares[0].shape != squares[1].shape:
            raise InvalidValueError(f"cannot merge gradients of weights {squares[0].shape} and {squares[1].shape}")
        gram = None if self.gram is None or other.gram is None else self.gram + other.gram
        samples = None if self.samples is None or other.samples is None else np.concatenate(
            [self.samples, other.samples])
        return InputStats(self.count + other.count, np.minimum(self.min, other.min), np.maximum(self.max, other.max),
                          self.total + other.total, self.total_square + other.total_square, gram, samples,
                          None if squares[0] is None or squares[1] is None else squares[0] + squares[1])

    def __repr__(self) -> str:
        return f"InputStats({len(self.min)} inputs, {self.count} samples{', gram' if self.gram is not None else ''})"


class InputGatherer:
    """Makes InputStats of inputs that come piece by piece, in float32 where that is fast and float64 where it counts.

    samples: keep up to so many of the vectors, evenly spaced over all of them; which ones depends on nothing but their
    number. The memory is that of the statistics: (in,) vectors, (in, in) for gram, and the samples.
    """

    def __init__(self, *, gram: bool = False, samples: int = 0) -> None:
        self._with_gram, self._most = gram, samples
        self._count, self._stride = 0, 1
        self._low: Float32 | None = None
        self._high: Float32 | None = None
        self._total: Float64 | None = None
        self._square: Float64 | None = None
        self._gram: Float64 | None = None
        self._kept: list[Float32] = []

    def add(self, x: NDArray[Any]) -> None:
        """x: (..., in). Raises InvalidValueError for a sample that is not finite, and for another number of inputs."""
        x = np.ascontiguousarray(x, np.float32)
        x = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
        if self._low is None:
            size = x.shape[1]
            self._low, self._high = np.full(size, np.inf, np.float32), np.full(size, -np.inf, np.float32)
            self._total, self._square = np.zeros(size), np.zeros(size)
            self._gram = np.zeros((size, size)) if self._with_gram else None
        assert self._high is not None
        assert self._total is not None
        assert self._square is not None
        if x.shape[1] != len(self._low):
            raise InvalidValueError(f"statistics of {len(self._low)} inputs; given samples of {x.shape[1]}")
        for start in range(0, len(x), _ROWS):
            part = x[start:start + _ROWS]
            low, high = part.min(axis=0), part.max(axis=0)
            if not (np.isfinite(low).all() and np.isfinite(high).all()):
                row, column = np.argwhere(~np.isfinite(part))[0]
                raise InvalidValueError(f"statistics need finite samples; sample {self._count + row}, input {column} "
                                        f"is {part[row, column]}")
            np.minimum(self._low, low, out=self._low)
            np.maximum(self._high, high, out=self._high)
            self._total += part.sum(axis=0, dtype=np.float64)
            if self._gram is None:
                self._square += np.einsum("ij,ij->j", part, part, dtype=np.float64)
            else:
                self._gram += part.T @ part
            self._keep(part)
            self._count += len(part)

    def _keep(self, part: Float32) -> None:
        """Every stride-th vector of all; the stride doubles when they become too many."""
        if not self._most:
            return
        first = -self._count % self._stride
        self._kept.extend(row.copy() for row in part[first::self._stride])
        while len(self._kept) > self._most:
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    def stats(self) -> InputStats:
        """What came so far."""
        if self._low is None or self._high is None or self._total is None or not self._count:
            raise InvalidValueError("statistics need at least one sample; none was given")
        square = np.diag(self._gram).copy() if self._gram is not None else self._square
        assert square is not None
        return InputStats(self._count, self._low.astype(np.float64), self._high.astype(np.float64),
                          self._total.copy(), square.copy(), None if self._gram is None else self._gram.copy(),
                          np.stack(self._kept) if self._most else None)


class Stats(Mapping[str, InputStats]):
    """InputStats by the name of the linear's weight. Immutable; `a + b` merges, names of only one side included.

    inputs: a dict is copied; any other mapping is asked each time, so that it may read from a disk.
    """

    def __init__(self, inputs: Mapping[str, InputStats]) -> None:
        self._inputs = dict(inputs) if isinstance(inputs, dict) else inputs

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
        merged = {name: self[name] for name in self}
        for name, item in other.items():
            merged[name] = merged[name] + item if name in merged else item
        return Stats(merged)

    def __repr__(self) -> str:
        return f"Stats({len(self)} inputs)"
