"""Statistics of inputs in a folder: an index and a NumPy archive for each tensor that several linears read.

X^T X of every linear of a large model is more than its weights. Here it lies on a disk, is read when asked for, and
what a killed run has gathered is still there.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from edgewise.core.errors import FormatError, InvalidValueError
from edgewise.core.stats import InputStats
from edgewise.formats.cache import write_aside
from edgewise.formats.hostile import read_json

__all__ = ["StatsFolder"]

_FIELDS = tuple(field.name for field in fields(InputStats) if field.name != "count")
_LIMIT_BYTES = 64_000_000


class StatsFolder(Mapping[str, InputStats]):
    """InputStats by the name of a linear's weight, each read from the folder when it is asked for.

    The folder is made if missing. key: what tells one run from another; a folder of another run is refused.
    """

    def __init__(self, folder: str | Path, *, key: str = "") -> None:
        self._folder = Path(folder)
        self._index = self._folder / "stats.json"
        self._files: dict[str, str] = {}
        if self._index.is_file():
            held = read_json(self._index, _LIMIT_BYTES)
            files = held.get("files")
            if not isinstance(files, dict) or not all(
                    isinstance(file, str) and file == Path(file).name for file in files.values()):
                raise FormatError("expected 'files' as file names by tensor", path=self._index)
            if held.get("key") != key:
                raise InvalidValueError(f"{folder} holds statistics of another run ({str(held.get('key'))[:120]}); "
                                        "choose another folder, or delete that one")
            self._files = files
        self._key = key

    def add(self, names: Sequence[str], stats: InputStats) -> None:
        """Write the statistics that these linears share, whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = f"{len(set(self._files.values())):05d}.npz"
        given = {name: getattr(stats, name) for name in _FIELDS}
        with write_aside(self._folder / file) as handle:
            np.savez(handle, count=np.int64(stats.count), **{k: v for k, v in given.items() if v is not None})
        files = {**self._files, **dict.fromkeys(names, file)}
        with write_aside(self._index) as handle:
            handle.write(json.dumps({"key": self._key, "files": files}).encode())
        self._files = files

    def __getitem__(self, name: str) -> InputStats:
        path = self._folder / self._files[name]
        try:
            with np.load(path, allow_pickle=False) as archive:
                return InputStats(int(archive["count"]), **{
                    field: archive[field] for field in _FIELDS if field in archive})
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise FormatError(f"damaged statistics: {error}; delete the folder and gather them again", path=path,
                              tensor=name) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files
