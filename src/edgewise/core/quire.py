"""Exact dot products: every product kept whole, the sum rounded once. Posit Standard (2022), section 3.4: the quire.

Values of a format of at most 16 bits are whole multiples of a power of two, so a sum of products is a whole number in
fixed point. It is built from slices of the operands that float64 multiplies and adds without rounding.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgewise.core.elements import NumberFormat, rounding_table
from edgewise.core.errors import InvalidValueError

__all__ = ["exact_matmul", "quire_bits", "quire_matmul", "round_exact"]


class _Fixed(NamedTuple):
    """whole: the value of every code times 2^fraction, as Python integers; not_a_number: by code."""

    whole: list[int]
    fraction: int
    not_a_number: NDArray[np.bool_]


@lru_cache(maxsize=64)
def _fixed(fmt: NumberFormat) -> _Fixed:
    values = fmt.values()
    parts = [(0, 1) if math.isnan(value) else float(value).as_integer_ratio() for value in values]
    fraction = max(below.bit_length() - 1 for _, below in parts)
    return _Fixed([above * (2**fraction // below) for above, below in parts], fraction, np.isnan(values))


def quire_bits(fmt: NumberFormat, count: int) -> int:
    """Bits of a two's complement accumulator that holds the sum of any `count` products: sign, range and carries."""
    largest = max(abs(whole) for whole in _fixed(fmt).whole)
    return (largest * largest * count).bit_length() + 1


def exact_matmul(left: NDArray[Any], right: NDArray[Any], fmt: NumberFormat) -> tuple[NDArray[Any], int, NDArray[Any]]:
    """Codes (m, k) times codes (k, n), both of `fmt`, without any rounding.

    Returns Python integers (m, n) and f, with result = integer / 2^f; and where an operand was not a number, (m, n)
    bool.
    """
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise InvalidValueError(f"a product takes codes (m, k) and (k, n); given {left.shape} and {right.shape}")
    fixed = _fixed(fmt)
    first = -fmt.code_range[0] if fmt.kind == "int" else 0  # values() lists integers from the lowest code
    a, b = left.astype(np.int64) + first, right.astype(np.int64) + first
    # Slices so narrow that k products of two of them stay below 2^53.
    width = (53 - max(1, left.shape[1]).bit_length()) // 2
    tables = _slices(fmt, width)
    total = np.zeros((len(left), right.shape[1]), object)
    for high, upper in enumerate(tables):
        for low, lower in enumerate(tables):
            partial = (upper[a] @ lower[b]).astype(np.int64).astype(object)
            total += partial * (1 << width * (high + low))
    wrong = np.asarray(fixed.not_a_number[a].any(axis=1))[:, None] | np.asarray(fixed.not_a_number[b].any(axis=0))[None]
    return total, 2 * fixed.fraction, wrong


@lru_cache(maxsize=64)
def _slices(fmt: NumberFormat, width: int) -> list[NDArray[np.float64]]:
    """The fixed-point values in slices of `width` bits, lowest first, each with the sign of its value."""
    whole = _fixed(fmt).whole
    longest = max(abs(value).bit_length() for value in whole)
    mask = (1 << width) - 1
    return [np.array([math.copysign(abs(value) >> at & mask, value) for value in whole], np.float64)
            for at in range(0, max(longest, 1), width)]


def round_exact(whole: int, fraction: int, fmt: NumberFormat) -> int:
    """The code of `fmt` nearest to whole / 2^fraction, as fmt.encode rounds, without a rounding before it."""
    boundaries, up, unit = _whole_boundaries(fmt)
    shift = unit - fraction
    # Both on the finer of the two grids.
    scaled, coarse = (whole << shift, 0) if shift >= 0 else (whole, -shift)
    place = bisect_left(boundaries, scaled, key=lambda boundary: boundary << coarse)
    if place < len(boundaries) and boundaries[place] << coarse == scaled and up[place]:
        place += 1
    return int(rounding_table(fmt).codes[place])


@lru_cache(maxsize=64)
def _whole_boundaries(fmt: NumberFormat) -> tuple[list[int], list[bool], int]:
    table = rounding_table(fmt)
    parts = [float(value).as_integer_ratio() for value in table.exact]
    unit = max((below.bit_length() - 1 for _, below in parts), default=0)
    return [above * (2**unit // below) for above, below in parts], table.up.tolist(), unit


def quire_matmul(left: NDArray[Any], right: NDArray[Any], fmt: NumberFormat,
                 out: NumberFormat | None = None) -> NDArray[Any]:
    """Codes (m, k) times codes (k, n) -> codes (m, n) of `out` (`fmt` itself by default): exact, rounded once.

    An operand that is not a number makes its results not a number; InvalidValueError where `out` has no such code.
    """
    target = out or fmt
    total, fraction, wrong = exact_matmul(left, right, fmt)
    dtype = target.encode(np.zeros(0)).dtype
    codes = np.array([[round_exact(int(value), fraction, target) for value in row] for row in total], dtype)
    codes = codes.reshape(total.shape)
    if wrong.any():
        codes[wrong] = target.encode(np.array([np.nan]))[0]
    return codes
