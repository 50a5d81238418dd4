"""Which packed layout a quantisation format has, and how its codes, scales and zero points are written into it.

| format | layout |
| --- | --- |
| int2 .. int6, int8, ternary; symmetric, minima, zero points; groups of 16 (to 4 bits), 32 m, or rows | as it is |
| int7 | eight bits |
| int1 (the codebook -1, 1) | one bit with a minimum: s * (2 code - 1) = 2 s * code - s |
| FP4, MXFP4 | a table of integers, exactly |
| NF4 and other codebooks of at most sixteen values | a table of multiples of 1/127 of the largest, with a notice |
| two of four kept (Sparse, or n_m in a format): 2, 3, 4, 8 bits, others as 8; groups of 32, 64, 128 m | compressed |

A format that is not in the table has no kernel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import E8M0, FP16, FP32, NumberFormat, QuantFormat
from edgewise.core.storage import QuantizedTensor, Sparse
from edgewise.core.values import dataclass
from edgewise.native import _core  # type: ignore[attr-defined]

__all__ = ["Layout", "kept_of", "layout_of_format", "sparse_layout", "sparse_layout_of_format", "write_codes",
           "write_sparse"]

Bytes = NDArray[np.uint8]
Float32 = NDArray[np.float32]
_SPARSE_BITS = (2, 3, 4)
_FEW_VALUES = 16


@dataclass(frozen=True)
class Layout:
    """How codes of a format are packed.

    native: a PackedFormat. group: codes to a scale. shift: added to each code; scale_factor: into each scale.
    zero: what stands beside a scale: "none", "minima", "points" (a byte each) or "negated" (minus half of the scale).
    moved: how far a value of the format moves, relative to the largest one.
    """

    native: Any
    group: int
    shift: int = 0
    scale_factor: float = 1.0
    zero: str = "none"
    moved: float = 0.0


def _group_of(fmt: QuantFormat, cols: int, unit: int) -> int:
    """Inputs to a scale, a whole row as so many units."""
    if fmt.granularity.kind == "group" and fmt.granularity.group < cols:
        return fmt.granularity.group
    return -(-cols // unit) * unit


def _table_of(element: NumberFormat) -> tuple[list[int], float, float] | None:
    """Sixteen integers that stand for the values of a format, what a unit of them is worth, and how far a value moves,
    relative to the largest; None where a look-up cannot hold them."""
    if element.kind == "int" or element.bits > 4:
        return None
    values = np.zeros(_FEW_VALUES)
    values[:2**element.bits] = np.nan_to_num(element.values())
    for factor in (1.0, 2.0, 4.0, 8.0):  # exact where it can be
        if np.array_equal(values * factor, np.rint(values * factor)) and np.abs(values * factor).max() <= 127:
            return [int(v) for v in values * factor], 1.0 / factor, 0.0
    largest = float(np.abs(values).max())
    table = np.rint(values / largest * 127)
    return [int(v) for v in table], largest / 127, float(np.abs(table / 127 - values / largest).max())


def layout_of_format(fmt: QuantFormat, cols: int) -> Layout | None:
    """Of a dense weight; None where no kernel fits."""
    if not isinstance(fmt.scale, NumberFormat) or fmt.n_m or fmt.prefixes:
        return None
    group, element = _group_of(fmt, cols, 32), fmt.element
    if group != 16 and group % 32:
        return None
    bits, table, factor, shift, moved = element.bits, list[int](), 1.0, 0, 0.0
    zero = {"none": "none", "min": "minima", "int": "points"}[fmt.zero]
    if element.kind == "codebook" and element.codebook == (-1.0, 1.0) and group % 32 == 0:
        zero, factor = "negated", 2.0
    elif element.kind == "int":
        if fmt.zero == "none" and not element.signed:
            return None
        bits = 8 if bits == 7 else bits
        shift = 2 ** (bits - 1) if fmt.zero == "none" else 0
    elif (found := _table_of(element)) is not None:
        (table, factor, moved), bits = found, 4
    else:
        return None
    # A scale in bfloat16, or one that is multiplied by no power of two, needs single precision.
    scale = "fp16" if fmt.scale == FP16 and factor in (0.125, 0.25, 0.5, 1.0, 2.0) else "fp32"
    if fmt.scale == E8M0 and table and factor in (0.5, 1.0):
        scale = "e8m0"
    layout = _made("table" if table else "int", bits, zero, scale, group, table, False, shift, factor)
    return None if layout is None else replace(layout, moved=moved)


def sparse_layout(fmt: QuantFormat, cols: int) -> Layout | None:
    """Of a weight that keeps two of every four inputs; None where no kernel fits.

    fmt: of the kept values, its groups counted in these. cols: of the whole weight.
    """
    if not isinstance(fmt.scale, NumberFormat) or fmt.n_m or fmt.prefixes or fmt.element.kind != "int":
        return None
    if cols % 4 or (fmt.zero == "none" and not fmt.element.signed):
        return None
    group = 2 * fmt.granularity.group if fmt.granularity.kind == "group" else cols
    group = group if group < cols else -(-cols // 128) * 128
    bits = fmt.element.bits if fmt.element.bits in _SPARSE_BITS else 8
    zero = {"none": "none", "min": "minima", "int": "points"}[fmt.zero]
    return _made("int", bits, zero, "fp16" if fmt.scale == FP16 else "fp32", group, [], True,
                 2 ** (bits - 1) if fmt.zero == "none" else 0, 1.0)


def _made(element: str, bits: int, zero: str, scale: str, group: int, table: list[int], sparse: bool, shift: int,
          factor: float) -> Layout | None:
    try:
        native = _core.PackedFormat(element, bits, zero != "none", scale, group, table, zero == "points", sparse)
    except ValueError:
        return None
    return Layout(native, group // 2 if sparse else group, shift, factor, zero)


def write_codes(stored: QuantizedTensor, layout: Layout, out: Bytes) -> None:
    """Whole panels of rows, or the last rows of a weight."""
    codes, scales, minima = _parts(stored, layout)
    _core.pack_codes(layout.native, codes, scales, minima, layout.group, out)


def write_sparse(values: QuantizedTensor, places: Bytes, layout: Layout, out: Bytes) -> None:
    """The same of a sparse weight: values and places (rows, in / 2)."""
    codes, scales, minima = _parts(values, layout)
    _core.pack_sparse(layout.native, codes, np.ascontiguousarray(places, np.uint8), scales, minima, layout.group, out)


def _parts(stored: QuantizedTensor, layout: Layout) -> tuple[Bytes, Float32, Float32]:
    shape = (stored.shape[0], stored.format.granularity.groups(stored.shape[1]))

    def spread(values: Any) -> Float32:
        return np.ascontiguousarray(np.broadcast_to(values, shape), np.float32)

    codes = np.ascontiguousarray(stored.codes).view(np.uint8) + np.uint8(layout.shift)
    scales = spread(stored.scales * np.float32(layout.scale_factor))
    if layout.zero == "negated":
        if stored.format.scale != FP32 and float(np.abs(scales).max(initial=0.0)) > FP16.max_value:
            raise InvalidValueError(f"a scale of {stored.format} above {FP16.max_value / 2:.0f} cannot be doubled")
        return codes, scales, spread(-stored.scales)
    if layout.zero == "none":
        return codes, scales, np.zeros((1, 1), np.float32)
    return codes, scales, spread(stored.minima if layout.zero == "minima" else stored.zeros)


def kept_of(stored: Sparse | QuantizedTensor) -> tuple[QuantizedTensor, Bytes] | None:
    """Values and places in fours (rows, in / 2) of a weight that keeps two of four, or one of two; None of others."""
    if isinstance(stored, Sparse):
        values = stored.values
        if stored.encoding != "n_m" or not isinstance(values, QuantizedTensor):
            return None
        if stored.n_m == (2, 4):
            return values, np.asarray(stored.index, np.uint8)
        if stored.n_m == (1, 2) and stored.shape[1] % 4 == 0:
            return values, np.asarray(stored.index + np.arange(stored.index.shape[1]) % 2 * 2, np.uint8)
        return None
    fmt, (rows, cols) = stored.format, stored.shape
    if fmt.n_m not in ((2, 4), (1, 2)) or fmt.zero != "none" or cols % 4:
        return None
    if fmt.granularity.kind == "group" and fmt.granularity.group < cols and fmt.granularity.group % 4:
        return None
    grouped = np.asarray(stored.codes).reshape(rows, cols // 4, 4)
    if (np.count_nonzero(grouped, axis=2) > 2).any():
        raise InvalidValueError("a group of four holds more than two codes that are not zero, but its format is "
                                f"{fmt.n_m[0]}:{fmt.n_m[1]} sparse")
    places = np.sort(np.argsort(grouped == 0, axis=2, kind="stable")[:, :, :2], axis=2)
    kept = np.take_along_axis(grouped, places, axis=2).reshape(rows, cols // 2)
    return (QuantizedTensor(kept, stored.scales, _of_kept(fmt)), places.reshape(rows, cols // 2).astype(np.uint8))


def _of_kept(fmt: QuantFormat) -> QuantFormat:
    """The format of the kept values alone: half as many to a group."""
    granularity = fmt.granularity
    if granularity.kind == "group":
        granularity = replace(granularity, group=granularity.group // 2)
    return replace(fmt, n_m=None, granularity=granularity)


def sparse_layout_of_format(fmt: QuantFormat, cols: int) -> Layout | None:
    """Of a format that says n_m itself."""
    if fmt.n_m not in ((2, 4), (1, 2)) or fmt.zero != "none":
        return None
    return sparse_layout(_of_kept(fmt), cols)
