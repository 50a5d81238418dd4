"""Quantised model folders of other tools, read into our storage forms: GPTQ, AWQ and compressed-tensors.

A reader takes quantization_config and the safetensors entries, and gives a maker for each weight that lies in several
entries, with the names of those entries. Codes, scales and zero points are taken over to the bit; nothing is rounded
again. What they share is here: codes packed into 32-bit words, and the storage form that scales and zero points make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import FormatError, UnsupportedError, notice
from edgewise.core.numbers import BF16, FP16, FP32, Granularity, NumberFormat, QuantFormat, bf16_to_float32, int_format
from edgewise.core.storage import Dense, QuantizedTensor, Stored
from edgewise.formats.quantized_folder import pack_bits, unpack_bits
from edgewise.formats.safetensors import TensorFiles

__all__ = ["Foreign", "Home", "from_words", "quantised", "read_foreign", "to_words"]

Array = NDArray[Any]
_READERS = {"gptq": "gptq_folder", "awq": "awq_folder", "compressed-tensors": "compressed_tensors"}
_SCALES = {"F16": FP16, "BF16": BF16, "F32": FP32}


@dataclass
class Foreign:
    """Weights by name, and the entries that they are made of."""

    makers: dict[str, Callable[[], Stored]] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class Home:
    """Where a reader reads: the entries of a folder, their checks and their errors."""

    files: TensorFiles
    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

    def modules(self, ending: str) -> Iterator[str]:
        """Names of the linears that have an entry `.ending`, in the order of the files."""
        return (name.removesuffix(f".{ending}") for name in self.files if name.endswith(f".{ending}"))

    def fail(self, message: str, tensor: str) -> FormatError:
        return FormatError(message, path=self.folder, tensor=tensor[:200])

    def entry(self, name: str, dtypes: tuple[str, ...], rank: int) -> tuple[int, ...]:
        """The shape of an entry that has to be there, with one of the dtypes."""
        if name not in self.files:
            raise self.fail("this entry is missing from the safetensors files", name)
        found = self.files[name]
        if found.dtype not in dtypes or len(found.shape) != rank:
            raise self.fail(f"expected {' or '.join(dtypes)} with {rank} dimensions; it is {found.dtype} of shape "
                            f"{list(found.shape)}", name)
        return found.shape

    def shaped(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        """Check that an entry is there, in one of the dtypes and of this shape."""
        given = self.entry(name, dtypes, len(shape))
        if given != shape:
            raise self.fail(f"its shape is {list(given)}; with the other entries of the weight it is {list(shape)}",
                            name)

    def scales(self, name: str) -> tuple[NDArray[np.float32], NumberFormat]:
        """An entry of scales as float32, finite, and the number format that it is stored in."""
        number = _SCALES[self.files[name].dtype]
        values = self.files.array(name)
        exact = bf16_to_float32(values) if number == BF16 else np.asarray(values, np.float32)
        if not np.isfinite(exact).all():
            raise self.fail("a scale is not finite; the file is damaged or was quantised wrongly", name)
        return exact, number


def read_foreign(quantization: Mapping[str, Any], files: TensorFiles, folder: Path) -> Foreign:
    """The weights of a folder by its quant_method. Raises UnsupportedError for a method that is not read."""
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise UnsupportedError(
            f"{folder / 'config.json'}: the weights are quantised by {str(method)[:60]!r}, which edgewise does not "
            f"read; it reads {', '.join(_READERS)}; else take the unquantised model, or its GGUF, and let "
            "`edgewise fit` shrink it")
    reader = import_module(f"edgewise.formats.{_READERS[method]}")
    found: Foreign = reader.read(quantization, Home(files, folder))
    if not found.makers:
        raise FormatError(f"quantization_config says {method}, but no weight is stored that way", path=folder)
    return found


def from_words(words: Array, count: int, bits: int) -> NDArray[np.uint8]:
    """words: (rows, n) int32, each row a stream of bits, the lowest first -> (rows, count) uint8 codes."""
    raw = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    codes: NDArray[np.uint8] = unpack_bits(raw[:, :-(-count * bits // 8)], count, bits)
    return codes


def to_words(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """The inverse of from_words: (rows, count) uint8 -> (rows, ceil(count * bits / 32)) int32."""
    raw = pack_bits(codes, bits)
    padded = np.zeros((len(raw), -(-raw.shape[1] // 4) * 4), np.uint8)
    padded[:, :raw.shape[1]] = raw
    return padded.view("<i4").astype(np.int32, copy=False)


def quantised(codes: NDArray[np.uint8], scales: NDArray[np.float32], zeros: NDArray[np.uint8], bits: int,
              scale: NumberFormat, granularity: Granularity) -> QuantizedTensor:
    """codes: (out, in), zeros: (out, groups), both unsigned; scales (out, groups). value = (code - zero) * scale.

    Where every zero point is the middle of the range, the result is a signed format without zero points.
    """
    middle = 1 << (bits - 1)
    if (zeros == middle).all():
        signed = (codes.astype(np.int16) - middle).astype(np.int8)
        return QuantizedTensor(signed, scales, QuantFormat(int_format(bits), granularity, scale))
    fmt = QuantFormat(replace(int_format(bits), signed=False), granularity, scale, "int")
    return QuantizedTensor(codes, scales, fmt, zeros=zeros.astype(np.float32))


def ordered(codes: NDArray[np.uint8], scales: NDArray[np.float32], zeros: NDArray[np.uint8], bits: int,
            scale: NumberFormat, group: int, order: NDArray[np.int32] | None, name: str) -> Stored:
    """As quantised, with the group of each input given: (in,) int32, or None for groups of neighbours.

    Groups that are not neighbours (the "act-order" of GPTQ) have no storage form here; such a weight is held as
    16-bit floats, and a notice says so.
    """
    inputs = codes.shape[1]
    granularity = Granularity("group", group) if group < inputs else Granularity("axis")
    if order is None or np.array_equal(order, np.arange(inputs, dtype=np.int32) // group):
        return quantised(codes, scales, zeros, bits, scale, granularity)
    notice("fallback", "its inputs are grouped by importance (desc_act), not by place; the weight is held as 16-bit "
           "floats", where=name)
    values = (codes.astype(np.float32) - zeros[:, order].astype(np.float32)) * scales[:, order]
    return Dense(values.astype(np.float16), FP16)
