"""The grid of each group: which scale, and which zero point or minimum, its values are rounded with.

Every method of this room chooses grids here and rounds with them, so that they differ in what they claim to differ in.
A group is a column of a (size, groups) array: sums over it then add whole rows.

    plain     the span of the values, as core.numbers.quantize takes it
    searched  the span at several shares of its width; scale (and minimum) then fitted to the codes by weighted least
              squares; the best of all, the plain grid among them, by weighted squared error

Of a signed integer that is not restricted, the search also tries scales whose lowest code, of which there is no
positive twin, stands for the value that is largest in size: the scale is then negative where that value is positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import E8M0, Granularity, NumberFormat, QuantFormat, quantize, round_to
from edgewise.core.storage import QuantizedTensor

__all__ = ["SHARES", "Grid", "assembled", "codes_of", "from_groups", "grid_of", "to_groups", "values_of", "weights_of"]

Float32 = NDArray[np.float32]
SHARES = (0.95, 0.8, 0.65)
"""Of the span of a group that the codes cover, as the search begins."""
_TINY = np.float32(1e-30)


@dataclass(frozen=True, eq=False)
class Grid:
    """scale: (groups,) float32, of the values of the format's scale. offset: (groups,) zero points or minima."""

    scale: Float32
    offset: Float32 | None = None

    @property
    def shift(self) -> Float32:
        """The offset of a format that has one."""
        assert self.offset is not None, "a grid without zero points or minima"
        return self.offset


def scale_number(fmt: QuantFormat) -> NumberFormat:
    """The number format of a scale. Raises InvalidValueError where scales are quantised themselves."""
    if isinstance(fmt.scale, QuantFormat):
        raise InvalidValueError(f"{fmt} has scales that are themselves quantised; take one with plain scales, such as "
                                "int4/g32/fp16")
    return fmt.scale


def to_groups(x: Float32, granularity: Granularity) -> Float32:
    """(out, in) -> (size, groups), a last group that is short filled up with the row's last value."""
    inputs = x.shape[1]
    if granularity.kind == "tensor":
        return np.ascontiguousarray(x.reshape(1, -1).T)
    size = granularity.group if granularity.kind == "group" else inputs
    if pad := -inputs % size:
        x = np.concatenate([x, np.repeat(x[:, -1:], pad, axis=1)], axis=1)
    return np.ascontiguousarray(x.reshape(-1, size).T)


def weights_of(importance: NDArray[np.floating] | None, shape: tuple[int, int],
               granularity: Granularity) -> Float32 | None:
    """Importance (in,) of each input as the weights (size, groups) of a grid's error; what fills a group has none."""
    filled = granularity.kind == "group" and shape[1] % granularity.group
    if importance is None and not filled:
        return None
    row = np.ones(shape[1], np.float32) if importance is None else np.asarray(importance, np.float32)
    if row.shape != shape[1:]:
        raise InvalidValueError(f"importance is one number per input, {shape[1:]}; given {row.shape}")
    if filled:
        row = np.concatenate([row, np.zeros(-shape[1] % granularity.group, np.float32)])
    return to_groups(np.broadcast_to(row, (shape[0], len(row))), granularity)


def from_groups(values: NDArray[np.generic], shape: tuple[int, int]) -> NDArray[np.generic]:
    """The inverse of to_groups: (size, groups) -> (out, in) of `shape`."""
    return np.ascontiguousarray(np.ascontiguousarray(values.T).reshape(shape[0], -1)[:, :shape[1]])


def grid_of(values: Float32, fmt: QuantFormat, weight: Float32 | None = None, *, search: bool = True) -> Grid:
    """The grid of each group. values: (size, groups) finite float32. weight: of each value's squared error,
    (size, groups), (size, 1) or None; not negative. search: else the plain grid."""
    number = scale_number(fmt)
    whole = QuantFormat(fmt.element, Granularity("axis"), fmt.scale, fmt.zero)
    _, scale, offset = quantize(values.T, whole)
    plain = Grid(scale[:, 0], None if offset is None else offset[:, 0])
    if not search or number == E8M0:  # powers of two leave nothing to fit
        return plain
    with np.errstate(over="ignore", invalid="ignore"):  # an infinite error is less than none, and loses
        if fmt.zero == "min":
            return _with_minimum(values, fmt, number, weight, plain)
        if fmt.zero == "int":
            return _with_zero_point(values, fmt, number, weight, plain)
        return _symmetric(values, fmt, number, weight, plain)


def codes_of(values: NDArray[np.floating], grid: Grid, fmt: QuantFormat) -> NDArray[np.generic]:
    """Nearest codes, in the dtype that QuantizedTensor holds. values: (..., groups) against a grid of (groups,)."""
    if fmt.element.kind != "int":
        return fmt.element.encode(values / grid.scale)
    low, high = fmt.element.code_range
    codes = _rounded(values, grid, fmt, low, high)
    return codes.astype((np.int8 if fmt.element.bits <= 8 else np.int16) if fmt.element.signed else
                        (np.uint8 if fmt.element.bits <= 8 else np.uint16))


def _rounded(values: NDArray[np.floating], grid: Grid, fmt: QuantFormat, low: int, high: int) -> NDArray[np.floating]:
    if fmt.zero == "min":
        codes = values - grid.shift
        codes /= grid.scale
        np.rint(codes, out=codes)
    else:
        codes = values / grid.scale
        np.rint(codes, out=codes)
        if fmt.zero == "int":
            codes += grid.shift
    return np.clip(codes, low, high, out=codes)


def values_of(codes: NDArray[np.generic], grid: Grid, fmt: QuantFormat) -> Float32:
    """What codes (..., groups) stand for."""
    values = codes.astype(np.float32) if fmt.element.kind == "int" else fmt.element.decode(codes)
    if fmt.zero == "int":
        values = values - grid.shift
    values = values * grid.scale
    return np.asarray(values if fmt.zero != "min" else values + grid.shift, np.float32)


def assembled(codes: NDArray[np.generic], grid: Grid, fmt: QuantFormat) -> QuantizedTensor:
    """codes: (out, in). grid: of all groups, row by row."""
    def shaped(values: Float32) -> Float32:
        return np.ascontiguousarray(values.reshape(1 if fmt.granularity.kind == "tensor" else codes.shape[0], -1))

    offset = None if grid.offset is None else shaped(grid.offset)
    return QuantizedTensor(codes, shaped(grid.scale), fmt, zeros=offset if fmt.zero == "int" else None,
                           minima=offset if fmt.zero == "min" else None)


def _held(scale: Float32, number: NumberFormat) -> Float32:
    """As the scale is stored; one where that would be zero."""
    rounded = round_to(scale, number)
    return np.where(rounded != 0, rounded, np.float32(1))


def _error(values: Float32, codes: Float32, scale: Float32, low: Float32 | np.float32,
           weight: Float32 | None) -> Float32:
    """Of each group, (groups,)."""
    gap = codes * scale
    gap += low
    gap -= values
    gap *= gap
    if weight is not None:
        gap *= weight
    return np.asarray(gap.sum(axis=0), np.float32)


def _with_minimum(values: Float32, fmt: QuantFormat, number: NumberFormat, weight: Float32 | None,
                  best: Grid) -> Grid:
    total: Float32 | np.float32 = np.float32(len(values))
    weighted = values
    if weight is not None:
        total = np.maximum(np.broadcast_to(weight, values.shape).sum(axis=0), _TINY)
        weighted = weight * values
    mean_value = weighted.sum(axis=0) / total
    top = 2**fmt.element.bits - 1
    levels = np.float32(top)
    bottom = values.min(axis=0)
    span = values.max(axis=0) - bottom
    scale_best, low_best = best.scale, best.shift
    least = _error(values, _rounded(values, best, fmt, 0, top), scale_best, low_best, weight)
    for share in SHARES:
        start = np.maximum(span * np.float32(share) / levels, _TINY)
        tried = _rounded(values, Grid(start, bottom + span * np.float32((1 - share) / 2)), fmt, 0, top)
        # Least squares of value = scale * code + minimum, with the codes held.
        loaded = tried if weight is None else weight * tried
        first, second = loaded.sum(axis=0) / total, (loaded * tried).sum(axis=0) / total
        spread = second - first * first
        # Below this the codes are all but equal, and single precision has nothing left of their spread.
        uneven = spread > 1e-5 * second
        shared = (loaded * values).sum(axis=0) / total - first * mean_value
        fitted = shared / np.where(uneven, spread, 1)
        scale = _held(np.where(uneven & (fitted > 0), fitted, start), number)
        low = round_to(mean_value - scale * first, number)
        error = _error(values, _rounded(values, Grid(scale, low), fmt, 0, top), scale, low, weight)
        better = error < least
        least = np.where(better, error, least)
        scale_best, low_best = np.where(better, scale, scale_best), np.where(better, low, low_best)
    return Grid(scale_best, low_best)


def _with_zero_point(values: Float32, fmt: QuantFormat, number: NumberFormat, weight: Float32 | None,
                     best: Grid) -> Grid:
    top = 2**fmt.element.bits - 1
    bottom, peak = np.minimum(values.min(axis=0), 0), np.maximum(values.max(axis=0), 0)
    scale_best, zero_best = best.scale, best.shift
    least = _error(values, _rounded(values, best, fmt, 0, top) - zero_best, scale_best, np.float32(0), weight)
    for share in SHARES:
        start = np.maximum((peak - bottom) * np.float32(share / top), _TINY)
        zero = np.clip(np.rint(-bottom * np.float32(share) / start), 0, top).astype(np.float32)
        tried = _rounded(values, Grid(start, zero), fmt, 0, top) - zero
        scale = _held(_fitted(values, tried, weight, start), number)
        codes = _rounded(values, Grid(scale, zero), fmt, 0, top) - zero
        error = _error(values, codes, scale, np.float32(0), weight)
        better = error < least
        least = np.where(better, error, least)
        scale_best, zero_best = np.where(better, scale, scale_best), np.where(better, zero, zero_best)
    return Grid(scale_best, zero_best)


def _symmetric(values: Float32, fmt: QuantFormat, number: NumberFormat, weight: Float32 | None, best: Grid) -> Grid:
    element = fmt.element
    peak = np.abs(values).max(axis=0)
    starts = [peak * np.float32(share / max(element.max_value, 1.0)) for share in SHARES]
    if element.kind == "int" and element.signed and not element.restricted and element.bits > 1:
        extreme = np.take_along_axis(values, np.abs(values).argmax(axis=0)[None], axis=0)[0]
        starts += [extreme * np.float32(share / element.code_range[0]) for share in (1.0, *SHARES)]

    def numbers(scale: Float32) -> Float32:
        return values_of(codes_of(values, Grid(scale), fmt), Grid(np.ones_like(scale)), fmt)

    scale_best = best.scale
    least = _error(values, numbers(scale_best), scale_best, np.float32(0), weight)
    for start in starts:
        start = np.where(np.abs(start) > _TINY, start, np.float32(1))
        scale = _held(_fitted(values, numbers(start), weight, start), number)
        error = _error(values, numbers(scale), scale, np.float32(0), weight)
        better = error < least
        least = np.where(better, error, least)
        scale_best = np.where(better, scale, scale_best)
    return Grid(scale_best)


def _fitted(values: Float32, codes: Float32, weight: Float32 | None, start: Float32) -> Float32:
    """Least squares of value = scale * code, with the codes held; `start` where that has no sense."""
    loaded = codes if weight is None else weight * codes
    square = (loaded * codes).sum(axis=0)
    fitted = (loaded * values).sum(axis=0) / np.where(square > 0, square, 1)
    return np.asarray(np.where((square > 0) & (fitted * start > 0), fitted, start), np.float32)
