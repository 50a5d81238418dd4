"""How a tensor is stored: dense, quantised, as a file's own blocks, factored, sparse, a sum, or input-sparse. All nest.

`Stored` is a protocol; `dense()` and `matmul()` are references for tests and export, never a fast path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import BF16, FP16, FP32, NumberFormat, QuantFormat, bf16_to_float32, dequantize
from edgewise.core.values import dataclass

__all__ = ["BlockCodec", "Blocks", "Dense", "Factored", "InputSparse", "LazyTensors", "QuantizedTensor", "Sparse",
           "Stored", "Sum", "rows_of"]

Array = NDArray[Any]
Float32 = NDArray[np.float32]


@runtime_checkable
class Stored(Protocol):
    """A tensor in some storage form. shape is the logical shape; nbytes is what it costs as stored."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def dense(self) -> Float32:
        """The value as float32, of `shape`."""
        ...

    def matmul(self, x: Float32) -> Float32:
        """x: (..., in) float32 -> (..., out) float32, for a (out, in) weight. Reference only."""
        ...


class _MatmulByDense:
    """matmul written once for every storage form that has dense()."""

    def matmul(self, x: Float32) -> Float32:
        weight: Float32 = self.dense()  # type: ignore[attr-defined]
        return np.asarray(x @ weight.T, dtype=np.float32)


T = TypeVar("T")


def _later(cls: type[T], **values: Any) -> T:
    """A tensor whose bytes are made by `_make` when they are asked for; see `_made`."""
    tensor = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(tensor, name, value)
    return tensor


def _made(tensor: Any, name: str, bytes_name: str) -> Any:
    """What an attribute that is not there yet is: the bytes of a tensor that was made by `later`."""
    if name == bytes_name and "_make" in tensor.__dict__:
        return tensor.__dict__["_make"]()
    raise AttributeError(f"{type(tensor).__name__!r} object has no attribute {name!r}")


@dataclass(frozen=True, repr=False, eq=False)
class Dense(_MatmulByDense):
    """A plain array. number says what the bytes mean: float32, float16, or bfloat16 held as uint16."""

    data: Array
    number: NumberFormat = FP32

    def __post_init__(self) -> None:
        expected = {FP32: np.float32, FP16: np.float16, BF16: np.uint16}.get(self.number)
        if expected is None:
            raise InvalidValueError(f"Dense stores FP32, FP16 or BF16; given {self.number}; use QuantizedTensor")
        if self.data.dtype != expected:
            raise InvalidValueError(f"Dense {self.number} expects dtype {np.dtype(expected)}; given {self.data.dtype}")

    @staticmethod
    def later(make: Callable[[], Array], number: NumberFormat, shape: tuple[int, ...]) -> Dense:
        """An array that is read, checked or moved each time it is asked for, and not before."""
        return _later(Dense, _make=make, _shape=shape, number=number)

    if not TYPE_CHECKING:
        def __getattr__(self, name: str) -> Any:
            return _made(self, name, "data")

    @property
    def shape(self) -> tuple[int, ...]:
        known: tuple[int, ...] | None = self.__dict__.get("_shape")
        return tuple(self.data.shape) if known is None else known

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.number.bits // 8

    def dense(self) -> Float32:
        if self.number == BF16:
            return bf16_to_float32(self.data)
        return np.asarray(self.data, dtype=np.float32)

    def __repr__(self) -> str:
        return f"Dense({'x'.join(map(str, self.shape))} {self.number.name})"


@dataclass(frozen=True, repr=False, eq=False)
class QuantizedTensor(_MatmulByDense):
    """Unpacked integer codes with their scales, as a compression method produces them.

    codes: (out, in), int8 for signed elements, uint8 for unsigned ones and for indices into a codebook.
    scales: (out, groups) float32, already rounded to the values of format.scale.
    minima: (out, groups) float32 when format.zero is "min": value = code * scale + minimum.
    zeros: (out, groups) float32 integers when format.zero is "int": value = (code - zero) * scale.
    """

    codes: Array
    scales: Float32
    format: QuantFormat
    zeros: Float32 | None = None
    minima: Float32 | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        return self.format.nbytes(self.shape)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Rows start to stop as a tensor of their own."""
        def part(values: Array) -> Array:
            return values if self.format.granularity.kind == "tensor" else values[start:stop]

        return QuantizedTensor(self.codes[start:stop], part(self.scales), self.format,
                               zeros=None if self.zeros is None else part(self.zeros),
                               minima=None if self.minima is None else part(self.minima))

    def dense(self) -> Float32:
        return dequantize(self.codes, self.scales, self.format, zeros=self.zeros, minima=self.minima)

    def __repr__(self) -> str:
        return f"QuantizedTensor({'x'.join(map(str, self.shape))} {self.format})"


class BlockCodec(Protocol):
    """A file format's own block layout, such as GGUF's Q4_1: `block` values in `block_nbytes` bytes."""

    @property
    def name(self) -> str: ...

    @property
    def block(self) -> int: ...

    @property
    def block_nbytes(self) -> int: ...

    def decode(self, raw: NDArray[np.uint8]) -> Float32:
        """raw: (rows, blocks * block_nbytes) uint8 -> (rows, blocks * block) float32."""
        ...


@dataclass(frozen=True, repr=False, eq=False)
class Blocks(_MatmulByDense):
    """A tensor kept in a file's own blocks, byte for byte.

    raw: (rows, bytes per row) uint8 with rows = prod(shape[:-1]).
    """

    raw: NDArray[np.uint8]
    codec: BlockCodec
    logical_shape: tuple[int, ...]

    @staticmethod
    def later(make: Callable[[], NDArray[np.uint8]], codec: BlockCodec, shape: tuple[int, ...]) -> Blocks:
        """Blocks whose bytes are read, checked or moved each time they are asked for, and not before."""
        return _later(Blocks, _make=make, codec=codec, logical_shape=shape)

    if not TYPE_CHECKING:
        def __getattr__(self, name: str) -> Any:
            return _made(self, name, "raw")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.logical_shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.logical_shape) // self.codec.block * self.codec.block_nbytes

    def dense(self) -> Float32:
        return self.codec.decode(self.raw).reshape(self.logical_shape)

    def __repr__(self) -> str:
        return f"Blocks({'x'.join(map(str, self.shape))} {self.codec.name})"


@dataclass(frozen=True, repr=False, eq=False)
class Factored:
    """W = left @ right: left (out, rank), right (rank, in), each in any storage form."""

    left: Stored
    right: Stored

    def __post_init__(self) -> None:
        if self.left.shape[-1] != self.right.shape[0]:
            raise InvalidValueError(
                f"Factored expects left (out, r) and right (r, in); given {self.left.shape} and {self.right.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[0], self.right.shape[1])

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def dense(self) -> Float32:
        return self.left.dense() @ self.right.dense()

    def matmul(self, x: Float32) -> Float32:
        return self.left.matmul(self.right.matmul(x))

    def __repr__(self) -> str:
        return f"Factored({self.left!r} @ {self.right!r})"


@dataclass(frozen=True, repr=False, eq=False)
class Sum:
    """W = the sum of its parts, of one shape, each in any storage form: a rounded weight and a correction."""

    parts: tuple[Stored, ...]

    def __post_init__(self) -> None:
        if not self.parts or any(part.shape != self.parts[0].shape for part in self.parts):
            raise InvalidValueError(f"Sum expects parts of one shape; given {[part.shape for part in self.parts]}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parts[0].shape)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def dense(self) -> Float32:
        total = self.parts[0].dense()
        for part in self.parts[1:]:
            total = total + part.dense()
        return total

    def matmul(self, x: Float32) -> Float32:
        total = self.parts[0].matmul(x)
        for part in self.parts[1:]:
            total = total + part.matmul(x)
        return total

    def __repr__(self) -> str:
        return f"Sum({' + '.join(map(repr, self.parts))})"


@dataclass(frozen=True, repr=False, eq=False)
class InputSparse:
    """A weight of which a decoded token reads only some inputs.

    y = W (m x) + L R ((1 - m) x), m = 1 where |x| > threshold.
    weight: (out, in). threshold: (in,) float32, at least zero; infinite where an input is never read. low_rank: L R of
    shape (out, in), or None. Prompts take W as it is, and so do `dense`, `matmul` and an export.
    """

    weight: Stored
    threshold: Float32
    low_rank: Factored | None = None

    def __post_init__(self) -> None:
        if self.threshold.shape != (self.weight.shape[1],) or self.threshold.dtype != np.float32:
            raise InvalidValueError(f"InputSparse expects a float32 threshold for each of {self.weight.shape[1]} "
                                    f"inputs; given {self.threshold.dtype} of shape {self.threshold.shape}")
        if not (self.threshold >= 0).all():  # not a number either
            raise InvalidValueError("InputSparse expects thresholds of at least zero")
        if self.low_rank is not None and self.low_rank.shape != self.weight.shape:
            raise InvalidValueError(f"InputSparse expects a product of shape {self.weight.shape}; given "
                                    f"{self.low_rank.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.threshold.nbytes + (0 if self.low_rank is None else self.low_rank.nbytes)

    def dense(self) -> Float32:
        return self.weight.dense()

    def matmul(self, x: Float32) -> Float32:
        return self.weight.matmul(x)

    def decode(self, x: Float32) -> Float32:
        """x: (..., in) of tokens that are decoded -> (..., out). Reference only."""
        read = np.where(np.abs(x) > self.threshold, x, np.float32(0))
        y = self.weight.matmul(read)
        return y if self.low_rank is None else y + self.low_rank.matmul(x - read)

    def __repr__(self) -> str:
        return f"InputSparse({self.weight!r}{'' if self.low_rank is None else f' + {self.low_rank!r}'})"


@dataclass(frozen=True, repr=False, eq=False)
class Sparse(_MatmulByDense):
    """Only the non-zero values are stored.

    encoding "n_m": of every m consecutive inputs n are kept; index (out, in/m*n) uint8 is each kept value's place
    in its group of m; values (out, in/m*n) in any storage form. n_m = (n, m).
    encoding "csr": index = column of each value, row_starts (out+1); values (1, nnz).
    """

    encoding: Literal["n_m", "csr"]
    index: Array
    values: Stored
    logical_shape: tuple[int, int]
    n_m: tuple[int, int] | None = None
    row_starts: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.logical_shape

    @property
    def nbytes(self) -> int:
        if self.encoding == "n_m":
            assert self.n_m is not None
            bits = max(1, (self.n_m[1] - 1).bit_length())
            return self.values.nbytes + (self.index.size * bits + 7) // 8
        assert self.row_starts is not None
        return self.values.nbytes + int(self.index.nbytes) + int(self.row_starts.nbytes)

    def dense(self) -> Float32:
        out, inputs = self.logical_shape
        weight = np.zeros((out, inputs), np.float32)
        values = self.values.dense()
        if self.encoding == "n_m":
            assert self.n_m is not None
            n, m = self.n_m
            group = np.arange(self.index.shape[1]) // n
            columns = group[None, :] * m + self.index
            np.put_along_axis(weight, columns.astype(np.int64), values, axis=1)
            return weight
        assert self.row_starts is not None
        rows = np.repeat(np.arange(out), np.diff(self.row_starts))
        weight[rows, self.index] = values.reshape(-1)
        return weight

    def __repr__(self) -> str:
        return f"Sparse({'x'.join(map(str, self.shape))} {self.encoding} {self.values!r})"


class LazyTensors(Mapping[str, Stored]):
    """Tensors by name, made when asked for. A maker is a function without arguments that returns a Stored."""

    def __init__(self, makers: Mapping[str, Callable[[], Stored]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Stored:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __repr__(self) -> str:
        return f"LazyTensors({len(self)} tensors)"


def rows_of(stored: Stored, rows: slice | int) -> Stored:
    """Part of a tensor along its first axis, in its own storage form: a slice of step 1, or one element of the axis.

    A view where the form allows it. A tensor in compressed sparse rows becomes dense, and so does one row of a
    quantised, factored or n:m sparse matrix.
    """
    if isinstance(rows, int):
        start, stop, shape = rows, rows + 1, stored.shape[1:]
    else:
        start, stop, _ = rows.indices(stored.shape[0])
        shape = (stop - start, *stored.shape[1:])
    if not 0 <= start <= stop <= stored.shape[0]:
        raise InvalidValueError(f"rows {start} to {stop} of a tensor of shape {stored.shape}")

    if isinstance(stored, Blocks):
        each = math.prod(stored.shape[1:-1])
        if "_make" in stored.__dict__:
            return Blocks.later(lambda: stored.raw[start * each:stop * each], stored.codec, shape)
        return replace(stored, raw=stored.raw[start * each:stop * each], logical_shape=shape)
    if isinstance(stored, Dense):
        if "_make" in stored.__dict__:
            return Dense.later(lambda: stored.data[start:stop].reshape(shape), stored.number, shape)
        return replace(stored, data=stored.data[start:stop].reshape(shape))
    if isinstance(stored, QuantizedTensor) and isinstance(rows, slice):
        return stored.rows(start, stop)
    if isinstance(stored, Factored) and isinstance(rows, slice):
        return replace(stored, left=rows_of(stored.left, rows))
    if isinstance(stored, Sparse) and stored.encoding == "n_m" and isinstance(rows, slice):
        return replace(stored, index=stored.index[start:stop], values=rows_of(stored.values, rows),
                       logical_shape=(stop - start, stored.shape[1]))
    if isinstance(stored, Sum) and isinstance(rows, slice):
        return Sum(tuple(rows_of(part, rows) for part in stored.parts))
    if isinstance(stored, InputSparse) and isinstance(rows, slice):
        low = stored.low_rank
        return replace(stored, weight=rows_of(stored.weight, rows),
                       low_rank=None if low is None else replace(low, left=rows_of(low.left, rows)))
    return Dense(np.ascontiguousarray(stored.dense()[start:stop]).reshape(shape))
