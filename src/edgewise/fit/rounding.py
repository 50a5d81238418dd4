"""A stored weight rounded to a QuantFormat, a few rows at a time, over several threads.

Formats with minima search for the range of each group: the span from lowest to highest value is tried at several
shares of its width, scale and minimum are then fitted to the codes by least squares, and the best of all, the plain
span among them, is kept. At four bits and below this takes a third or more off the squared error.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from edgewise.core.numbers import NumberFormat, QuantFormat, quantize, round_to
from edgewise.core.storage import Blocks, Dense, QuantizedTensor, Stored

__all__ = ["SHARES", "quantised", "searched"]

Float32 = NDArray[np.float32]
SHARES = (0.95, 0.8, 0.65)
"""Of the span of a group that the codes cover, as the search begins."""
_CHUNK_VALUES = 1 << 17
"""Values worked on at a time: their temporaries stay in the processor's second-level cache."""


def quantised(stored: Stored, fmt: QuantFormat, *, importance: Float32 | None = None,
              threads: int = 1) -> QuantizedTensor:
    """(out, in) in any storage form -> the same weight in `fmt`. importance: (in,) weight of each column's error."""
    rows, cols = stored.shape
    step = max(1, _CHUNK_VALUES // cols)
    starts = range(0, rows, step)

    def one(start: int) -> tuple[NDArray[np.generic], Float32, Float32 | None]:
        return searched(_rows(stored, start, min(start + step, rows)), fmt, importance)

    if threads > 1 and len(starts) > 1:
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(one, starts))
    else:
        parts = [one(start) for start in starts]
    codes = np.concatenate([part[0] for part in parts])
    scales = np.concatenate([part[1] for part in parts])
    zeros = [part[2] for part in parts if part[2] is not None]
    zero = np.concatenate(zeros) if zeros else None
    return QuantizedTensor(codes, scales, fmt, zeros=zero if fmt.zero == "int" else None,
                           minima=zero if fmt.zero == "min" else None)


def _rows(stored: Stored, start: int, stop: int) -> Float32:
    if isinstance(stored, Blocks):
        return Blocks(stored.raw[start:stop], stored.codec, (stop - start, *stored.shape[1:])).dense()
    if isinstance(stored, Dense):
        return Dense(stored.data[start:stop], stored.number).dense()
    if isinstance(stored, QuantizedTensor):
        return stored.rows(start, stop).dense()
    return stored.dense()[start:stop]


def searched(x: Float32, fmt: QuantFormat,
             importance: Float32 | None = None) -> tuple[NDArray[np.generic], Float32, Float32 | None]:
    """As core.numbers.quantize; for formats with minima in groups that divide a row, with the search above.

    x: (out, in) float32. importance: (in,) positive.
    """
    size = fmt.granularity.group
    if fmt.zero != "min" or fmt.granularity.kind != "group" or x.shape[1] % size or fmt.element.bits > 4:
        return quantize(x, fmt)
    if not np.isfinite(x).all():
        return quantize(x, fmt)  # which says where
    # A group is a column from here on, (size, groups): sums over it then add whole rows.
    values = np.ascontiguousarray(x.reshape(-1, size).T)
    weight: Float32 | None = None
    total: Float32 | np.float32 = np.float32(size)
    if importance is not None:
        weight = np.tile(importance.reshape(-1, size).T, (1, len(x)))
        total = weight.sum(axis=0)
    weighted = values if weight is None else weight * values
    mean_value = weighted.sum(axis=0) / total
    levels = np.float32(2**fmt.element.bits - 1)
    bottom = values.min(axis=0)
    span = values.max(axis=0) - bottom

    best_scale, best_low = _held(span / levels, fmt), round_to(bottom, _scale_number(fmt))
    best_codes = _coded(values, best_scale, best_low, levels)
    best_error = _error(values, best_codes, best_scale, best_low, weight)
    for share in SHARES:
        start = np.maximum(span * np.float32(share) / levels, np.float32(1e-30))
        tried = _coded(values, start, bottom + span * np.float32((1 - share) / 2), levels)
        # Least squares of value = scale * code + minimum, with the codes held.
        loaded = tried if weight is None else weight * tried
        first, second = loaded.sum(axis=0) / total, (loaded * tried).sum(axis=0) / total
        spread = second - first * first
        # Below this the codes are all but equal, and single precision has nothing left of their spread.
        uneven = spread > 1e-5 * second
        shared = (loaded * values).sum(axis=0) / total - first * mean_value
        fitted = shared / np.where(uneven, spread, 1)
        scale = _held(np.where(uneven & (fitted > 0), fitted, start), fmt)
        low = round_to(mean_value - scale * first, _scale_number(fmt))
        tried = _coded(values, scale, low, levels)
        error = _error(values, tried, scale, low, weight)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale, best_low = np.where(better, scale, best_scale), np.where(better, low, best_low)
        np.copyto(best_codes, tried, where=better)
    codes = np.ascontiguousarray(best_codes.astype(np.uint8).T).reshape(x.shape)
    return codes, best_scale.reshape(len(x), -1), best_low.reshape(len(x), -1)


def _scale_number(fmt: QuantFormat) -> NumberFormat:
    assert isinstance(fmt.scale, NumberFormat)  # quantize, and so every candidate, refuses nested scales
    return fmt.scale


def _held(scale: Float32, fmt: QuantFormat) -> Float32:
    """As the scale is stored; one where that would be zero."""
    rounded = round_to(scale, _scale_number(fmt))
    return np.where(rounded > 0, rounded, np.float32(1))


def _coded(values: Float32, scale: Float32, low: Float32, levels: np.float32) -> Float32:
    codes = values - low
    codes /= scale
    np.rint(codes, out=codes)
    return np.clip(codes, 0, levels, out=codes)


def _error(values: Float32, codes: Float32, scale: Float32, low: Float32, weight: Float32 | None) -> Float32:
    """Of each group, (groups,)."""
    gap = codes * scale
    gap += low
    gap -= values
    gap *= gap
    if weight is not None:
        gap *= weight
    return np.asarray(gap.sum(axis=0), np.float32)
