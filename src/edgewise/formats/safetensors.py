"""Safetensors files, read as untrusted memory maps and written one tensor at a time.

Layout: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data, whose
offsets count from the end of the header. Tensors must cover the data exactly: no overlap, no gap, nothing after.
Reading is our own so that a hostile header costs little and says what is wrong; arrays are views of the map.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import FormatError, InvalidValueError, SourceError, UnsupportedError, notice
from edgewise.core.numbers import BF16, FP16, FP32, NumberFormat
from edgewise.core.storage import Dense
from edgewise.formats.cache import Progress, write_aside
from edgewise.formats.hostile import parse_json, read_small, regular_file_bytes

__all__ = [
    "Entry", "SafetensorsFile", "TensorFiles", "dtype_name", "nbytes_of", "open_tensors", "tensor_files",
    "write_safetensors",
]

HEADER_LIMIT_BYTES = 6_000_000
INDEX_LIMIT_BYTES = 12_000_000
TENSOR_LIMIT = 32_768
"""Limits of one file, so that the worst header costs less than 64 MB; shards have one each."""
_RANK_LIMIT = 16
_DIMENSION_LIMIT = 1 << 48

_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.uint8,
    "F8_E4M3": np.uint8, "F8_E5M2": np.uint8, "F8_E8M0": np.uint8,
}
"""Safetensors dtype -> the NumPy dtype of the raw view. BF16 and the 8-bit floats are bit patterns."""
_ITEM_BYTES = {name: int(np.dtype(dtype).itemsize) for name, dtype in _DTYPES.items()}
_NUMBERS: dict[str, NumberFormat] = {"F32": FP32, "F16": FP16, "BF16": BF16}
_NAMES = {np.dtype(np.float64): "F64", np.dtype(np.float32): "F32", np.dtype(np.float16): "F16",
          np.dtype(np.int64): "I64", np.dtype(np.int32): "I32", np.dtype(np.int16): "I16", np.dtype(np.int8): "I8",
          np.dtype(np.uint64): "U64", np.dtype(np.uint32): "U32", np.dtype(np.uint16): "U16",
          np.dtype(np.uint8): "U8", np.dtype(np.bool_): "BOOL"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: dtype as safetensors names it, shape, and its bytes [begin, end) from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class SafetensorsFile(Mapping[str, Entry]):
    """The validated header of one file, and views of its tensors.

    Iterates over tensor names in the order of their bytes. metadata: the header's own "__metadata__" strings.
    The file is mapped at once, so that header and data are those of one file even if another takes its name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._size = regular_file_bytes(self.path)
        if self._size < 10:
            raise self._fail(f"{self._size} bytes are too few for a safetensors file", offset=0)
        try:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), self._size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.path}: cannot be mapped: {error}") from error
        self._entries = self._read_header()

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"SafetensorsFile({self.path}, {len(self)} tensors)"

    def array(self, name: str, *, aligned: bool = True) -> NDArray[Any]:
        """The tensor as a read-only view in its raw dtype: uint16 for BF16, uint8 for BOOL and 8-bit floats.

        aligned=False: the caller converts it anyway, so a view that is not aligned to its dtype will do.
        """
        entry = self._entries[name]
        dtype = np.dtype(_DTYPES[entry.dtype])
        if entry.nbytes == 0:
            return np.zeros(entry.shape, dtype)
        flat = np.frombuffer(self._map, dtype, count=entry.nbytes // dtype.itemsize, offset=entry.begin)
        if aligned and not flat.flags.aligned:
            notice("degraded", f"data is not aligned to {dtype.itemsize} bytes, so tensors are copied when used",
                   where=str(self.path))
            flat = flat.copy()
        return flat.reshape(entry.shape)

    def dense(self, name: str, *, aligned: bool = True) -> Dense:
        """A float tensor as Dense. F64 is narrowed to float32, with a notice; other dtypes are UnsupportedError."""
        dtype = self._entries[name].dtype
        if dtype in _NUMBERS:
            return Dense(self.array(name, aligned=aligned), _NUMBERS[dtype])
        if dtype == "F64":
            notice("degraded", "F64 tensors are narrowed to float32", where=str(self.path))
            return Dense(self.array(name).astype(np.float32))
        raise UnsupportedError(
            f"{self.path}, tensor {name!r}: dtype {dtype} is not a plain float tensor; expected F32, F16, BF16 or F64")

    def _fail(self, message: str, *, tensor: str | None = None, offset: int = 8) -> FormatError:
        return FormatError(message, path=self.path, tensor=None if tensor is None else tensor[:200], offset=offset)

    def _read_header(self) -> dict[str, Entry]:
        length = int.from_bytes(self._map[:8], "little")
        if length > self._size - 8:
            raise self._fail(
                f"the header claims {length} bytes but {self._size - 8} follow; not a safetensors file, or cut off",
                offset=0)
        if length > HEADER_LIMIT_BYTES:
            raise self._fail(f"the header claims {length} bytes; at most {HEADER_LIMIT_BYTES} are read", offset=0)
        raw = self._map[8:8 + length]
        if not raw.startswith(b"{"):
            raise self._fail("the header does not begin with '{'; not a safetensors file")
        data_begin = 8 + length
        header = parse_json(raw, path=self.path, offset=8, on_object=_Pairs)
        del raw
        if len(header) > TENSOR_LIMIT:
            raise self._fail(f"{len(header)} tensors in one file; at most {TENSOR_LIMIT} are read (use shards)")
        entries: dict[str, Entry] = {}
        for name, fields in header:
            if name == "__metadata__":
                self.metadata = self._metadata_of(fields)
                continue
            if name in entries:
                raise self._fail("two tensors have this name", tensor=name)
            entries[name] = self._entry_of(name, fields, data_begin)
        return self._covering(entries, data_begin)

    def _metadata_of(self, fields: Any) -> dict[str, str]:
        if not isinstance(fields, _Pairs) or not all(isinstance(value, str) for _, value in fields):
            raise self._fail("__metadata__ must map strings to strings")
        return dict(fields)

    def _entry_of(self, name: str, fields: Any, data_begin: int) -> Entry:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise self._fail(f"tensor name {name[:80]!r} holds half of a surrogate pair") from None
        if not isinstance(fields, _Pairs) or sorted(key for key, _ in fields) != ["data_offsets", "dtype", "shape"]:
            raise self._fail("expected exactly the fields dtype, shape and data_offsets", tensor=name)
        values = dict(fields)
        dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            if isinstance(dtype, str) and dtype in ("F4", "F6_E2M3", "F6_E3M2", "C64"):
                raise UnsupportedError(f"{self.path}, tensor {name!r}: dtype {dtype} is not supported")
            raise self._fail(f"unknown dtype {str(dtype)[:40]!r}; known: {', '.join(_DTYPES)}", tensor=name)
        if (not isinstance(shape, list) or len(shape) > _RANK_LIMIT
                or not all(type(size) is int and 0 <= size < _DIMENSION_LIMIT for size in shape)):
            raise self._fail(f"bad shape {str(shape)[:80]}; expected at most {_RANK_LIMIT} sizes from 0 to 2^48",
                             tensor=name)
        if (not isinstance(offsets, list) or len(offsets) != 2
                or not all(type(offset) is int and offset >= 0 for offset in offsets) or offsets[0] > offsets[1]):
            raise self._fail(f"bad data_offsets {str(offsets)[:80]}; expected [begin, end]", tensor=name)
        begin, end = data_begin + offsets[0], data_begin + offsets[1]
        if end > self._size:
            raise self._fail(f"its data ends at byte {str(end)[:40]}, but the file has {self._size} bytes (cut off?)",
                             tensor=name, offset=min(begin, self._size))
        expected = math.prod(shape) * _ITEM_BYTES[dtype]
        if end - begin != expected:
            raise self._fail(f"{dtype} of shape {shape} takes {str(expected)[:40]} bytes, but its data_offsets span "
                             f"{end - begin}", tensor=name, offset=begin)
        return Entry(dtype, tuple(shape), begin, end)

    def _covering(self, entries: dict[str, Entry], data_begin: int) -> dict[str, Entry]:
        ordered = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
        position = data_begin
        for name, entry in ordered:
            if entry.begin < position:
                raise self._fail(f"its data overlaps the tensor before it by {position - entry.begin} bytes",
                                 tensor=name, offset=entry.begin)
            if entry.begin > position:
                raise self._fail(f"{entry.begin - position} bytes before it belong to no tensor",
                                 tensor=name, offset=position)
            position = entry.end
        if position != self._size:
            raise self._fail(f"{self._size - position} bytes at the end belong to no tensor", offset=position)
        return dict(ordered)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its (key, value) pairs, so that duplicates stay visible; smaller than a dict."""


class TensorFiles(Mapping[str, Entry]):
    """The tensors of a model that lie in one file or in several shards, by name."""

    def __init__(self, homes: Mapping[str, SafetensorsFile]) -> None:
        self._homes = dict(homes)
        self.files = tuple(dict.fromkeys(str(home.path) for home in self._homes.values()))

    def __getitem__(self, name: str) -> Entry:
        return self._homes[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def home(self, name: str) -> SafetensorsFile:
        """The file that holds a tensor."""
        return self._homes[name]

    def array(self, name: str, *, aligned: bool = True) -> NDArray[Any]:
        """See SafetensorsFile.array."""
        return self._homes[name].array(name, aligned=aligned)

    def dense(self, name: str, *, aligned: bool = True) -> Dense:
        """See SafetensorsFile.dense."""
        return self._homes[name].dense(name, aligned=aligned)


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order; empty when it has none."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        return [folder / shard for shard in dict.fromkeys(_weight_map(index).values())]
    return sorted(folder.glob("*.safetensors"))


def open_tensors(folder: str | Path) -> TensorFiles:
    """The tensors of a model folder: model.safetensors, or the shards of model.safetensors.index.json."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").exists() and index.exists():
        return _open_shards(folder, index)
    found = tensor_files(folder)
    if not found:
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack")
                        for path in folder.glob(pattern))
        if others:
            raise UnsupportedError(
                f"{folder} holds its weights as {others[0]}, which can run code when read; expected model.safetensors; "
                "save it again with model.save_pretrained(..., safe_serialization=True)")
        raise SourceError(f"{folder} holds no weights; expected model.safetensors or model.safetensors.index.json")
    if len(found) > 1:
        raise FormatError(
            f"{len(found)} safetensors files ({found[0].name}, ...) and no model.safetensors.index.json that says "
            "which tensor is where", path=folder)
    if found[0].name != "model.safetensors":
        notice("info", f"weights are read from {found[0].name}", where=str(folder))
    file = SafetensorsFile(found[0])
    return TensorFiles(dict.fromkeys(file, file))


def _weight_map(index: Path) -> dict[str, str]:
    content = parse_json(read_small(index, INDEX_LIMIT_BYTES), path=index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("expected an object 'weight_map' from tensor names to file names", path=index)
    for name, shard in weight_map.items():
        if (not isinstance(shard, str) or not shard.endswith(".safetensors") or shard.startswith(".")
                or any(mark in shard for mark in ("/", "\\", "\0", ":")) or not shard.isprintable()):
            raise FormatError(f"shard {str(shard)[:120]!r} is not the plain name of a safetensors file in this folder",
                              path=index, tensor=name[:200])
    return weight_map


def _open_shards(folder: Path, index: Path) -> TensorFiles:
    weight_map = _weight_map(index)
    shards: dict[str, SafetensorsFile] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if not (folder / shard).exists():
            raise FormatError(f"shard {shard} is missing; download the folder again", path=index)
        shards[shard] = SafetensorsFile(folder / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise FormatError(f"the index places it in {shard}, which does not hold it", path=index, tensor=name[:200])
    unlisted = sum(len(file) for file in shards.values()) - len(weight_map)
    if unlisted:
        notice("ignored", f"{unlisted} tensors of the shards are not named by the index", where=str(index))
    return TensorFiles({name: shards[shard] for name, shard in weight_map.items()})


def write_safetensors(path: str | Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]],
                      array: Callable[[str], NDArray[Any]], *, metadata: Mapping[str, str] | None = None,
                      overwrite: bool = True, progress: Progress | None = None) -> None:
    """Write one file, a tensor at a time and in the order given, so that only one of them is in memory.

    tensors: name -> (safetensors dtype, shape). array(name): its raw values, BF16 as uint16.
    Put the widest dtypes first, so that every tensor is aligned to its own size.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + nbytes_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > HEADER_LIMIT_BYTES or len(tensors) > TENSOR_LIMIT:
        raise InvalidValueError(
            f"{path}: {len(tensors)} tensors with a header of {len(encoded)} bytes; one file holds at most "
            f"{TENSOR_LIMIT} and {HEADER_LIMIT_BYTES}; write smaller shards")
    done = 0
    with write_aside(path, overwrite=overwrite) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, (dtype, shape) in tensors.items():
            values = np.ascontiguousarray(array(name)).reshape(shape)
            assert values.dtype == _DTYPES[dtype] or dtype == "BOOL", (name, values.dtype, dtype)
            file.write(values.reshape(-1).view(np.uint8).data)
            done += values.nbytes
            if progress is not None:
                progress(f"writing {Path(path).name}", done, position)


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of that safetensors dtype."""
    return math.prod(shape) * _ITEM_BYTES[dtype]


def dtype_name(values: NDArray[Any]) -> str:
    """The safetensors name of a NumPy dtype. BF16 has none: its bits are uint16."""
    return _NAMES[values.dtype]
