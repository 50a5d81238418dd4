"""One GGUF file, or the shards of one model, as it is: raw keys and raw tensor names, mapped and checked.

Nothing is copied: numeric arrays and tensors are views of the mapping; lists of strings are made when asked for.
`formats.gguf` turns this into a Checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import EdgewiseError, FormatError, SourceError, UnsupportedError
from edgewise.core.storage import LazyTensors, Stored
from edgewise.core.values import dataclass
from edgewise.formats.ggml_blocks import codec, stored_of
from edgewise.native.io import GgufHeader, GgufKey, GgufTensor, gguf_strings, parse_gguf

__all__ = ["ARRAY", "BOOL", "NUMBERS", "STRING", "GgufFile", "GgufMetadata", "GgufShards", "read_gguf_raw"]

BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS: dict[int, str] = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8",
                           12: "<f8"}
"""GGUF value type -> NumPy dtype."""

Bytes = NDArray[np.uint8]
Result = TypeVar("Result")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class GgufMetadata(Mapping[str, Any]):
    """The keys of a file: numbers, booleans and strings as Python values, arrays of numbers as NumPy views,
    arrays of strings as lists, made anew at each access."""

    def __init__(self, path: Path, data: Bytes, keys: list[GgufKey]) -> None:
        self._path = path
        self._data = data
        self._keys = {key.name: key for key in keys}

    def __getitem__(self, name: str) -> Any:
        key = self._keys[name]
        if key.type == STRING:
            strings = _native(self._path, lambda: gguf_strings(self._data, key.offset, key.count))
            return strings if key.is_array else strings[0]
        dtype = np.dtype("u1" if key.type == BOOL else NUMBERS[key.type])
        values = np.frombuffer(self._data, dtype, count=key.count, offset=key.offset)
        if key.type == BOOL:
            values = values != 0
        return values if key.is_array else values[0].item()

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def integer(self, name: str, default: int) -> int:
        """A key that must hold an integer where it is present."""
        key = self._keys.get(name)
        if key is None:
            return default
        if key.is_array or key.type in (BOOL, STRING, 6, 12):
            raise FormatError(f"key {name} is not an integer", path=self._path, offset=key.offset)
        return int(self[name])

    def offset(self, name: str) -> int:
        """Where the value of a key begins in the file."""
        return self._keys[name].offset

    def count(self, name: str) -> int:
        """Elements of an array, without reading it; 1 for anything else."""
        return self._keys[name].count

    def below(self, prefix: str) -> Mapping[str, Any]:
        """The keys that begin with `prefix`, under their full names; still lazy."""
        return GgufMetadata(self._path, self._data, [key for key in self._keys.values() if key.name.startswith(prefix)])

    def __repr__(self) -> str:
        return f"GgufMetadata({len(self)} keys, {self._path})"


class GgufFile:
    """One mapped file with its checked header.

    Raises SourceError when it cannot be opened, FormatError (with byte offset and tensor) when it is damaged,
    UnsupportedError when it is of a version or holds a block type that edgewise does not read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.data = _map(self.path)
        self.header: GgufHeader = _native(self.path, lambda: parse_gguf(self.data))
        self.metadata = GgufMetadata(self.path, self.data, self.header.keys)
        self.tensors: dict[str, GgufTensor] = {tensor.name: tensor for tensor in self.header.tensors}

    def raw(self, name: str) -> Bytes:
        """A tensor's bytes, (rows, bytes per row), a view of the file."""
        tensor = self.tensors[name]
        flat = self.data[tensor.offset:tensor.offset + tensor.nbytes]
        return flat.reshape(-1, codec(tensor.type).row_nbytes(tensor.shape[-1]))

    def stored(self, name: str) -> Stored:
        """A tensor under its raw name, as stored."""
        tensor = self.tensors[name]
        return stored_of(tensor.type, self.raw(name), tensor.shape)

    def check_finite(self, name: str) -> None:
        """Refuse a tensor with a NaN or infinite scale (a value, for F32, F16 and BF16). Reads only the scales."""
        tensor = self.tensors[name]
        found = codec(tensor.type).nonfinite_byte(self.raw(name))
        if found is not None:
            raise FormatError(f"a {tensor.type} block has a scale or value that is NaN or infinite; the file is "
                              "damaged, or was converted from a broken model", path=self.path, tensor=name,
                              offset=tensor.offset + found)


@dataclass(frozen=True)
class GgufShards:
    """The files of one model. The first one's keys are the model's."""

    files: tuple[GgufFile, ...]
    home: Mapping[str, GgufFile]

    @property
    def metadata(self) -> GgufMetadata:
        return self.files[0].metadata

    def shape(self, name: str) -> tuple[int, ...]:
        return self.home[name].tensors[name].shape

    def stored(self, name: str) -> Stored:
        return self.home[name].stored(name)

    @classmethod
    def open(cls, path: str | Path) -> GgufShards:
        """The file at `path`, and its siblings when it is one of `name-00001-of-00003.gguf`."""
        path = Path(path)
        first = GgufFile(path)
        count = first.metadata.integer("split.count", 1)
        if count <= 1:
            return cls((first,), dict.fromkeys(first.tensors, first))
        named = _SHARD.search(path.name)
        if named is None or int(named[2]) != count:
            raise FormatError(f"this is one of {count} shards, and its name should end in -00001-of-{count:05}.gguf, "
                              "so that the others can be found; rename the shards", path=path)
        files = []
        for number in range(1, count + 1):
            sibling = path.with_name(f"{path.name[:named.start()]}-{number:05}-of-{count:05}.gguf")
            if not sibling.exists():
                raise SourceError(f"{sibling}: no such file; {path.name} is one of {count} shards, and all must lie "
                                  "side by side")
            files.append(first if sibling == path else GgufFile(sibling))
        return cls(tuple(files), _homes(files))


def _homes(files: list[GgufFile]) -> dict[str, GgufFile]:
    home: dict[str, GgufFile] = {}
    for number, file in enumerate(files):
        place, count = file.metadata.integer("split.no", -1), file.metadata.integer("split.count", 1)
        if place != number or count != len(files):
            raise FormatError(f"by its name this is shard {number + 1} of {len(files)}, but its keys say split.no "
                              f"{place} (counted from 0) of {count}", path=file.path)
        for name, tensor in file.tensors.items():
            if name in home:
                raise FormatError(f"is also in {home[name].path.name}", path=file.path, tensor=name,
                                  offset=tensor.offset)
            home[name] = file
    total = files[0].metadata.integer("split.tensors.count", len(home))
    if total != len(home):
        raise FormatError(f"the shards hold {len(home)} tensors, but split.tensors.count is {total}",
                              path=files[0].path)
    return home


def read_gguf_raw(path: str | Path) -> tuple[Mapping[str, Any], Mapping[str, Stored]]:
    """Keys and tensors under the file's own names, whatever its architecture; shards are joined."""
    shards = GgufShards.open(path)

    def maker(name: str) -> Callable[[], Stored]:
        return lambda: shards.stored(name)

    return shards.metadata, LazyTensors({name: maker(name) for name in shards.home})


def _map(path: Path) -> Bytes:
    try:
        if not path.exists():
            raise SourceError(f"{path}: no such file")
        if not path.is_file():
            raise SourceError(f"{path}: not a regular file; expected a GGUF file")
        if path.stat().st_size < 24:
            raise FormatError(f"not a GGUF file: it has {path.stat().st_size} bytes, and a header has at least 24",
                              path=path, offset=0)
        return np.memmap(path, np.uint8, "r").view(np.ndarray)
    except (OSError, ValueError) as error:
        if isinstance(error, EdgewiseError):
            raise
        raise SourceError(f"{path}: cannot be read: {error}") from error


def _native(path: Path, call: Callable[[], Result]) -> Result:
    """Run a native reader; what it finds wrong becomes an error that names the file."""
    try:
        return call()
    except ValueError as error:
        if len(error.args) != 4:
            raise
        message, offset, tensor, unsupported = error.args
        name = tensor.decode("utf-8", "replace") or None
        if unsupported:
            raise UnsupportedError(f"{path}{f', tensor {name!r}' if name else ''}, byte {offset}: {message}") from None
        raise FormatError(message, path=path, tensor=name, offset=offset) from None
