"""Several narrow products in one wide multiplication: what a DSP slice or a SIMD lane does, exact, and its count.

One operand x is shared; the others, w_0 .. w_{P-1}, lie side by side in a word at given shifts. One multiplication
x * word makes all products x w_p; they are added up in the word and separated later. A product of a lower slice that is
negative borrows from the slice above it; unpacking gives it back, from the lowest slice up. A slice overflows after
`spill` products, so that a longer sum is taken in parts.

EdgeQAT (arXiv:2402.10787) multiplies 4-bit tokens with two rows of 4-bit weights at once; AccLLM (arXiv:2505.03745)
packs 2-, 4- and 8-bit weights into the 27-bit port of a DSP. Both papers give the idea; shifts and spills are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError

__all__ = ["DSP_8X2", "DSP_8X4", "DSP_8X8", "SIMD_4X4", "Packing", "packed_matmul"]

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """x_bits, w_bits: signed operands. shifts: of each w, rising from 0. accumulator_bits: of the word that sums."""

    x_bits: int
    w_bits: int
    shifts: tuple[int, ...]
    accumulator_bits: int

    def __post_init__(self) -> None:
        rising = self.shifts[:1] == (0,) and all(a < b for a, b in zip(self.shifts, self.shifts[1:], strict=False))
        if not (1 <= self.x_bits <= 16 and 1 <= self.w_bits <= 16 and rising and self.accumulator_bits <= 62
                and self.spill >= 1):
            raise InvalidValueError("a packing has operands of 1 to 16 bits, shifts that rise from 0 and leave room "
                                    f"for one product, and at most 62 bits to add up in; given {self}")

    @property
    def spill(self) -> int:
        """Products that may be added before a slice could overflow: (2^(gap - 1) - 1) / (2^(x-1) 2^(w-1))."""
        gaps = [b - a for a, b in zip(self.shifts, (*self.shifts[1:], self.accumulator_bits), strict=True)]
        return int((2 ** (min(gaps) - 1) - 1) // 2 ** (self.x_bits + self.w_bits - 2))

    def pack(self, w: NDArray[Any]) -> Int64:
        """(..., P) signed integers -> (...) words."""
        return np.asarray((w.astype(np.int64) << np.array(self.shifts, np.int64)).sum(axis=-1), np.int64)

    def unpack(self, total: Int64) -> Int64:
        """(...) sums of at most `spill` products -> (..., P)."""
        slices, rest = [], np.asarray(total, np.int64)
        ends = (*self.shifts[1:], self.accumulator_bits)
        for start, end in zip(self.shifts, ends, strict=True):
            gap = end - start
            low = rest & ((1 << gap) - 1)
            low = low - ((low >> (gap - 1)) << gap)
            slices.append(low)
            rest = (rest - low) >> gap
        return np.stack(slices, axis=-1)


SIMD_4X4 = Packing(4, 4, (0, 16), 32)
"""Two 4-bit weights for a 4-bit activation in a 32-bit lane: 511 products before a spill."""
DSP_8X2 = Packing(8, 2, (0, 12, 24), 48)
DSP_8X4 = Packing(8, 4, (0, 14), 48)
DSP_8X8 = Packing(8, 8, (0, 18), 48)


def packed_matmul(x: NDArray[Any], w: NDArray[Any], packing: Packing) -> tuple[Int64, int]:
    """x: (tokens, in), w: (out, in), signed integers -> (tokens, out) exact products, and multiplications made.

    A last row of w without companions takes a word of its own.
    """
    for name, values, bits in (("x", x, packing.x_bits), ("w", w, packing.w_bits)):
        limit = 2 ** (bits - 1)
        if values.ndim != 2 or (values.size and not -limit <= int(values.min()) <= int(values.max()) < limit):
            raise InvalidValueError(f"{name} is a matrix of {bits}-bit signed integers; given shape {values.shape}, "
                                    f"{values.min() if values.size else 0} to {values.max() if values.size else 0}")
    if x.shape[1] != w.shape[1]:
        raise InvalidValueError(f"x (tokens, in) and w (out, in) share `in`; given {x.shape} and {w.shape}")
    out, inputs = w.shape
    share = len(packing.shifts)
    padded = np.zeros((-(-out // share) * share, inputs), np.int64)
    padded[:out] = w
    words = packing.pack(padded.reshape(-1, share, inputs).transpose(0, 2, 1))  # (words, in)
    total = np.zeros((len(x), len(words), share), np.int64)
    for start in range(0, inputs, packing.spill):
        part = slice(start, start + packing.spill)
        total += packing.unpack(x[:, part].astype(np.int64) @ words[:, part].T)
    return total.reshape(len(x), -1)[:, :out], len(x) * len(words) * inputs
