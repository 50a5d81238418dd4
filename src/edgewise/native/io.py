"""Typed face of the native file readers: block codecs and GGUF headers. The judges are in tests/native."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from edgewise.native import _core  # type: ignore[attr-defined]

__all__ = ["BlockLayout", "GgufHeader", "GgufKey", "GgufTensor", "block_layouts", "decode_blocks", "encode_blocks",
           "first_nonfinite_block", "gguf_strings", "parse_gguf"]

Bytes = NDArray[np.uint8]


class BlockLayout(NamedTuple):
    """ggml_id: the type's number in a file. values, nbytes: per block. written: whether encode_blocks knows it."""

    ggml_id: int
    values: int
    nbytes: int
    written: bool


class GgufKey(NamedTuple):
    """type: GGUF's value type, of the elements where is_array. The value begins at byte `offset` of the file."""

    name: str
    type: int
    is_array: bool
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    offset: int


class GgufTensor(NamedTuple):
    """shape: slowest dimension first, as NumPy has it. offset: from the start of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GgufHeader(NamedTuple):
    version: int
    alignment: int
    data_offset: int
    keys: list[GgufKey]
    tensors: list[GgufTensor]


def block_layouts() -> dict[str, BlockLayout]:
    """Every block type by name."""
    return {name: BlockLayout(*fields) for name, fields in _core.block_layouts().items()}


def decode_blocks(type_name: str, raw: Bytes) -> NDArray[np.float32]:
    """raw: (rows, bytes per row) uint8, contiguous -> (rows, values) float32. The order of operations is ggml's."""
    return cast("NDArray[np.float32]", _core.decode_blocks(type_name, raw))


def encode_blocks(type_name: str, values: NDArray[np.float32]) -> Bytes:
    """values: (rows, columns) float32, contiguous, finite -> (rows, bytes per row) uint8, by ggml's rounding."""
    return cast("Bytes", _core.encode_blocks(type_name, values))


def first_nonfinite_block(type_name: str, raw: Bytes) -> int | None:
    """The index, counted over all rows, of the first block whose scale is NaN or infinite."""
    index: int = _core.first_nonfinite_block(type_name, raw)
    return None if index < 0 else index


def parse_gguf(file: Bytes) -> GgufHeader:
    """The checked header of a file in memory. Raises ValueError(message, offset, tensor bytes, unsupported)."""
    version, alignment, data_offset, keys, tensors = _core.parse_gguf(file)
    return GgufHeader(version, alignment, data_offset, [GgufKey(*key) for key in keys],
                      [GgufTensor(*tensor) for tensor in tensors])


def gguf_strings(file: Bytes, offset: int, count: int) -> list[str]:
    """The strings under a key, as parse_gguf placed them. Raises ValueError as parse_gguf does."""
    strings: list[str] = _core.gguf_strings(file, offset, count)
    return strings
