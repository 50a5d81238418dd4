"""A stored weight rounded to a QuantFormat, a few rows at a time, over several threads.

Formats with minima search for the range of each group: the span from lowest to highest value is tried at several
shares of its width, scale and minimum are then fitted to the codes by least squares, and the best of all, the plain
span among them, is kept. At four bits and below this takes a third or more off the squared error.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from edgewise.core.numbers import QuantFormat, quantize, round_to
from edgewise.core.storage import Blocks, Dense, QuantizedTensor, Stored

__all__ = ["SHARES", "quantised", "searched"]

Float32 = NDArray[np.float32]
SHARES = (0.9, 0.75)
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
    codes, scale, low = quantize(x, fmt)
    assert low is not None
    values = x.reshape(len(x), -1, size)
    weight = (np.ones(x.shape[1], np.float32) if importance is None else importance).reshape(1, -1, size)
    total = weight.sum(axis=-1)
    levels = np.float32(2**fmt.element.bits - 1)
    best_codes = codes.reshape(values.shape).astype(np.float32)
    best_scale, best_low = scale, low
    best_error = _error(values, best_codes, scale, low, weight)
    top, bottom = values.max(axis=-1), values.min(axis=-1)
    for share in SHARES:
        cut = (top - bottom) * np.float32((1 - share) / 2)
        scale = np.maximum((top - bottom) * np.float32(share) / levels, np.float32(1e-30))
        tried = _coded(values, scale, bottom + cut, levels)
        # Least squares of value = scale * code + minimum, with the codes held.
        mean_code = (weight * tried).sum(axis=-1) / total
        mean_value = (weight * values).sum(axis=-1) / total
        centred = tried - mean_code[..., None]
        spread = (weight * centred * centred).sum(axis=-1)
        fitted = (weight * centred * values).sum(axis=-1) / np.where(spread > 0, spread, 1)
        scale = round_to(np.where((spread > 0) & (fitted > 0), fitted, scale), fmt.scale)  # type: ignore[arg-type]
        scale = np.where(scale > 0, scale, np.float32(1))
        low = round_to(mean_value - scale * mean_code, fmt.scale)  # type: ignore[arg-type]
        tried = _coded(values, scale, low, levels)
        error = _error(values, tried, scale, low, weight)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale, best_low = np.where(better, scale, best_scale), np.where(better, low, best_low)
        np.copyto(best_codes, tried, where=better[..., None])
    return best_codes.reshape(x.shape).astype(codes.dtype), best_scale, best_low


def _coded(values: Float32, scale: Float32, low: Float32, levels: np.float32) -> Float32:
    codes = values - low[..., None]
    codes /= scale[..., None]
    np.rint(codes, out=codes)
    return np.clip(codes, 0, levels, out=codes)


def _error(values: Float32, codes: Float32, scale: Float32, low: Float32, weight: Float32) -> Float32:
    gap = codes * scale[..., None]
    gap += low[..., None]
    gap -= values
    gap *= gap
    gap *= weight
    return np.asarray(gap.sum(axis=-1), np.float32)
