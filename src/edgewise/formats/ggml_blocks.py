"""ggml's block types as codecs: tensors of GGUF files, and of ours, kept byte for byte.

F32, F16 and BF16 are plain arrays (`Dense`); every other type is `Blocks` with a `GgmlCodec`.
Written: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4, rounded by ggml's own rules, which multiply by the
reciprocal of the scale and round halves up: files made here equal those of other tools to the bit.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError, UnsupportedError
from edgewise.core.numbers import BF16, E8M0, FP4, FP16, FP32, Granularity, NumberFormat
from edgewise.core.storage import Blocks, Dense, QuantizedTensor, Stored
from edgewise.core.values import dataclass
from edgewise.native.io import BlockLayout, block_layouts, decode_blocks, encode_blocks, first_nonfinite_block

__all__ = ["PLAIN", "READ", "WRITTEN", "GgmlCodec", "codec", "encode", "ggml_bytes", "stored_of",
           "type_of"]

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_LAYOUTS: dict[str, BlockLayout] = block_layouts()
READ: tuple[str, ...] = tuple(_LAYOUTS)
WRITTEN: tuple[str, ...] = tuple(name for name, layout in _LAYOUTS.items() if layout.written)
PLAIN: dict[str, tuple[Any, NumberFormat]] = {
    "F32": (np.float32, FP32), "F16": (np.float16, FP16), "BF16": (np.uint16, BF16)}
"""Types without blocks: the dtype of their array, and what its bits mean."""


@dataclass(frozen=True)
class GgmlCodec:
    """One block type: `block` values in `block_nbytes` bytes; ggml_id is its number in a GGUF file."""

    name: str
    block: int
    block_nbytes: int
    ggml_id: int

    def decode(self, raw: Bytes) -> Float32:
        """raw: (rows, blocks * block_nbytes) uint8 -> (rows, blocks * block) float32."""
        if raw.ndim != 2 or raw.dtype != np.uint8 or raw.shape[1] % self.block_nbytes:
            raise InvalidValueError(f"{self.name} decodes (rows, blocks * {self.block_nbytes}) uint8; "
                                    f"given {raw.shape} {raw.dtype}")
        return decode_blocks(self.name, np.ascontiguousarray(raw))

    def row_nbytes(self, values: int) -> int:
        """Bytes of a row of `values` values."""
        if values % self.block:
            raise InvalidValueError(f"{self.name} holds rows of a multiple of {self.block} values; given {values}")
        return values // self.block * self.block_nbytes

    def nonfinite_byte(self, raw: Bytes) -> int | None:
        """Where in `raw` the first block with a NaN or infinite scale begins (a value, for the plain types)."""
        index = first_nonfinite_block(self.name, np.ascontiguousarray(raw))
        return None if index is None else index * self.block_nbytes


@cache
def codec(name: str) -> GgmlCodec:
    """The codec of a block type, by ggml's name ("Q4_1")."""
    layout = _LAYOUTS.get(name)
    if layout is None:
        raise UnsupportedError(f"block type {name!r} is not one that edgewise reads; it reads {', '.join(READ)}")
    return GgmlCodec(name, layout.values, layout.nbytes, layout.ggml_id)


def type_of(stored: Stored) -> str | None:
    """The block type that holds a tensor as it is stored, without any rounding; None where no type does."""
    if isinstance(stored, Blocks) and isinstance(stored.codec, GgmlCodec):
        return stored.codec.name
    if isinstance(stored, Dense):
        return {FP32: "F32", FP16: "F16", BF16: "BF16"}[stored.number]
    if isinstance(stored, QuantizedTensor):
        return _type_of_codes(stored)
    return None


def encode(array: NDArray[Any], name: str) -> Dense | Blocks:
    """Round float values to a block type. array: (..., columns), columns a multiple of the block; finite."""
    form = codec(name)
    if name not in WRITTEN:
        raise UnsupportedError(f"{name} is read but not written; written are {', '.join(WRITTEN)}")
    values = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(values).all():
        bad = int(np.sum(~np.isfinite(values)))
        raise InvalidValueError(f"cannot round to {name}: {bad} values are NaN or infinite")
    form.row_nbytes(values.shape[-1])
    raw = encode_blocks(name, values.reshape(math.prod(values.shape[:-1]), values.shape[-1]))
    if form.nonfinite_byte(raw) is not None:
        raise InvalidValueError(f"cannot round to {name}: half-precision numbers end at 65504, and the largest "
                                f"value is {float(np.abs(values).max()):g}; choose F32 or BF16")
    return stored_of(name, raw, values.shape)


def stored_of(name: str, raw: Bytes, shape: tuple[int, ...]) -> Dense | Blocks:
    """Bytes of a block type as a tensor; nothing is copied where `raw` is contiguous."""
    if name in PLAIN:
        dtype, number = PLAIN[name]
        return Dense(raw.reshape(-1).view(dtype).reshape(shape), number)
    return Blocks(raw.reshape(math.prod(shape[:-1]), -1), codec(name), shape)


def ggml_bytes(stored: Stored, name: str) -> Bytes:
    """A tensor as the bytes of a block type, (rows, bytes per row).

    Copied as they are when the tensor is stored in that type, packed without rounding when its codes and scales
    are those of the type, rounded otherwise.
    """
    rows = math.prod(stored.shape[:-1])
    if type_of(stored) == name:
        if isinstance(stored, Blocks):
            return stored.raw
        if isinstance(stored, Dense):
            return np.ascontiguousarray(stored.data).view(np.uint8).reshape(rows, -1)
        assert isinstance(stored, QuantizedTensor)
        return _pack(stored, name)
    made = encode(stored.dense(), name)
    return made.raw if isinstance(made, Blocks) else made.data.view(np.uint8).reshape(rows, -1)


# The integer formats with groups of 32 and half-precision scales: (bits, zero) -> block type.
_CODES = {(4, "none"): "Q4_0", (5, "none"): "Q5_0", (8, "none"): "Q8_0", (4, "min"): "Q4_1", (5, "min"): "Q5_1"}


def _type_of_codes(tensor: QuantizedTensor) -> str | None:
    """The block type with the same codes, scales and minima."""
    fmt = tensor.format
    if fmt.granularity != Granularity("group", 32) or fmt.n_m is not None or tensor.shape[-1] % 32:
        return None
    if fmt.element == FP4 and fmt.scale == E8M0:
        return "MXFP4" if bool(np.all(tensor.scales <= 2.0**125)) else None
    if fmt.element.kind != "int" or fmt.scale != FP16 or fmt.element.signed != (fmt.zero == "none"):
        return None
    return _CODES.get((fmt.element.bits, fmt.zero))


def _pack(tensor: QuantizedTensor, name: str) -> Bytes:
    """Codes and scales as the bytes of their block type, (rows, bytes per row). Nothing is rounded."""
    rows, columns = tensor.shape
    codes = tensor.codes.reshape(rows, columns // 32, 32)
    if name == "MXFP4":
        parts: list[Bytes] = [(np.log2(tensor.scales) + 127).astype(np.uint8)[..., None]]
    else:
        parts = [_halves(tensor.scales)]
    if tensor.minima is not None:
        parts.append(_halves(tensor.minima))
    if name == "Q8_0":
        parts.append(codes.astype(np.int8).view(np.uint8))
    else:
        offset = {"Q4_0": 8, "Q5_0": 16}.get(name, 0)
        unsigned = (codes.astype(np.int16) + offset).astype(np.uint8)
        if name in ("Q5_0", "Q5_1"):
            parts.append(np.packbits(unsigned >> 4, axis=-1, bitorder="little"))
        parts.append(((unsigned[..., :16] & 15) | (unsigned[..., 16:] & 15) << 4).astype(np.uint8))
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _halves(numbers: Float32) -> Bytes:
    """(rows, groups) float32 -> (rows, groups, 2) bytes of half precision, little-endian."""
    return np.ascontiguousarray(numbers.astype("<f2")[..., None]).view(np.uint8)
