"""Packing and single kernels of the compiled core, by instruction tier. Tests hold each against NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from edgewise.native import _core  # type: ignore[attr-defined]

__all__ = ["KernelLine", "Packed", "highest", "layer_norm", "matmul", "pack_blocks", "pack_codes", "pack_floats",
           "pack_sparse", "pointwise", "quantised_kernels", "rms_norm", "sparse_kernels", "sum_of_exponentials"]

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class KernelLine(NamedTuple):
    """A line of kernels.inc. kind: Symmetric, Minimum or Table; nested: integer sub-scales under a half-precision
    one; halves: two scales in a block of 32 inputs."""

    bits: int
    kind: str
    nested: bool
    halves: bool


def quantised_kernels() -> list[KernelLine]:
    """Every quantised matmul kernel of the build."""
    lines = [line.split() for line in cast("list[str]", _core.quantised_kernels())]
    return [KernelLine(int(bits), kind, nested == "true", halves == "true") for bits, kind, nested, halves in lines]


def sparse_kernels() -> list[tuple[int, str]]:
    """Every kernel for two of four: bits, and what codes are centred on, Half of the range, a Zero point or None."""
    lines = [line.split() for line in cast("list[str]", _core.sparse_kernels())]
    return [(int(bits), centre) for bits, centre in lines]


class Packed:
    """A (rows, cols) weight in packed form; see native/include/edgewise/packed.h."""

    def __init__(self, format: Any, rows: int, cols: int, data: Bytes) -> None:
        """format: a native PackedFormat. data: (nbytes,) uint8, kept alive and not copied."""
        self.matrix = _core.PackedMatrix(format, rows, cols, data)
        self.shape = (rows, cols)
        self.data = data

    def row(self, index: int) -> Float32:
        """One row unpacked, (cols,)."""
        out = np.empty(self.shape[1], np.float32)
        self.matrix.row(index, out)
        return out

    def dense(self) -> Float32:
        """Every row unpacked, (rows, cols)."""
        return np.stack([self.row(i) for i in range(self.shape[0])])


def pack_blocks(type_name: str, raw: Bytes, cols: int) -> Packed:
    """raw: (rows, bytes per row) uint8, contiguous, in blocks of a GGUF type; cols a multiple of the block."""
    native = _core.PackedFormat.of_blocks(type_name)
    data = np.empty(native.nbytes(len(raw), cols), np.uint8)
    _core.pack_blocks(type_name, raw, cols, data)
    return Packed(native, len(raw), cols, data)


def pack_codes(codes: Bytes, scales: Float32, minima: Float32 | None = None, *, bits: int, scale: str = "fp16",
               group: int = 32, table: Sequence[int] = (), zero_points: bool = False) -> Packed:
    """codes: (rows, cols) unsigned, symmetric ones shifted up by 2^(bits-1). scales, minima: (rows, groups) float32,
    of values that `scale` (fp16, fp32, e8m0) holds exactly. group: inputs per scale, 16 or a multiple of 32.
    table: sixteen int8 values that the codes index; else value = scale * code (+ minimum). zero_points: minima are
    integers of a byte z, and value = scale * (code - z). ValueError: no kernel."""
    rows, cols = codes.shape
    native = _core.PackedFormat("table" if table else "int", bits, minima is not None, scale, group, list(table),
                                zero_points)
    data = np.empty(native.nbytes(rows, cols), np.uint8)
    _core.pack_codes(native, codes, scales, np.zeros((1, 1), np.float32) if minima is None else minima, group, data)
    return Packed(native, rows, cols, data)


def pack_sparse(codes: Bytes, places: Bytes, scales: Float32, minima: Float32 | None = None, *, bits: int,
                scale: str = "fp16", group: int = 64, zero_points: bool = False) -> Packed:
    """Two of every four inputs: codes and their places 0 to 3 (rows, cols / 2). group: kept codes per scale, 16, 32 or
    a multiple of 64; else as pack_codes."""
    rows, kept = codes.shape
    native = _core.PackedFormat("int", bits, minima is not None, scale, 2 * group, [], zero_points, True)
    data = np.empty(native.nbytes(rows, 2 * kept), np.uint8)
    _core.pack_sparse(native, codes, places, scales, np.zeros((1, 1), np.float32) if minima is None else minima, group,
                      data)
    return Packed(native, rows, 2 * kept, data)


def pack_floats(values: NDArray[Any], element: str) -> Packed:
    """values: (rows, cols), float32, float16, or bfloat16 held as uint16; element names which."""
    rows, cols = values.shape
    native = _core.PackedFormat(element)
    data = np.empty(native.nbytes(rows, cols), np.uint8)
    _core.pack_floats(native, np.ascontiguousarray(values).view(np.uint8).reshape(rows, -1), cols, data)
    return Packed(native, rows, cols, data)


def matmul(weight: Packed, x: Float32, tier: str, *, int8: bool = True) -> Float32:
    """x (tokens, cols) W^T -> (tokens, rows). int8: inputs of a quantised weight are rounded first, 32 at a time."""
    y = np.empty((len(x), weight.shape[0]), np.float32)
    _core.matmul(weight.matrix, x, y, tier, int8)
    return y


def rms_norm(x: Float32, weight: Float32 | None, eps: float, tier: str) -> Float32:
    """x: (rows, n) -> x / sqrt(mean(x^2) + eps) * weight. weight: (n,) or None for ones."""
    return _rows("rms_norm", x, weight, None, eps, tier)


def layer_norm(x: Float32, weight: Float32 | None, bias: Float32 | None, eps: float, tier: str) -> Float32:
    """x: (rows, n) -> (x - mean) / sqrt(variance + eps) * weight + bias. weight, bias: (n,) or None."""
    return _rows("layer_norm", x, weight, bias, eps, tier)


def pointwise(function: str, x: Float32, tier: str) -> Float32:
    """silu, gelu, gelu_tanh or relu of every value of x (rows, n)."""
    return _rows(function, x, None, None, 0.0, tier)


def highest(x: Float32, tier: str) -> int:
    """Where the highest of x (n,) is, the first of equal ones; NaN is passed over, and without any number it is 0."""
    return cast("int", _core.highest(np.ascontiguousarray(x), tier))


def sum_of_exponentials(x: Float32, peak: float, tier: str) -> float:
    """Sum of e^(x - peak) over x (n,)."""
    return cast("float", _core.sum_of_exponentials(np.ascontiguousarray(x), peak, tier))


def _rows(name: str, x: Float32, weight: Float32 | None, bias: Float32 | None, eps: float, tier: str) -> Float32:
    nothing = np.empty(0, np.float32)
    y = np.empty_like(x)
    _core.apply_rows(name, x, nothing if weight is None else weight, nothing if bias is None else bias, eps, y, tier)
    return y
