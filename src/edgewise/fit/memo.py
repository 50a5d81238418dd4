"""What a search has made already, by what it was made of: checkpoints in folders, the oldest given up first.

An entry is a model folder and beside it a small JSON record. It appears under its name when complete, and may vanish
when there is no room left: what is read from it stays readable, since its files are mapped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import BudgetError, EdgewiseError, InvalidValueError, notice
from edgewise.formats.cache import locked, write_aside
from edgewise.formats.folder import read_folder
from edgewise.formats.folder_writer import write_folder

__all__ = ["Memo"]


class Memo:
    """Entries in a folder, of at most `limit_bytes` together. Several processes may use one at a time."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise InvalidValueError(f"a limit is at least 0 bytes; given {limit_bytes}")
        self.folder, self.limit_bytes = Path(folder), limit_bytes

    def _at(self, key: str) -> Path:
        return self.folder / sha256(key.encode()).hexdigest()[:32]

    def get(self, key: str) -> tuple[Checkpoint, dict[str, Any]] | None:
        """What was kept under a key, and its record; None where nothing is, or no longer."""
        at = self._at(key)
        try:
            record: dict[str, Any] = json.loads((at / "record.json").read_text("utf-8"))
            if record.pop("key") != key:
                return None
            made = replace(read_folder(at / "model"), files=())
            os.utime(at)
        except (OSError, ValueError, KeyError, EdgewiseError):
            return None
        return made, record

    def put(self, key: str, checkpoint: Checkpoint, record: Mapping[str, Any]) -> None:
        """Keep a checkpoint. One that is larger than the limit is not kept; without room on the disk, a notice."""
        if checkpoint.nbytes > self.limit_bytes:
            return
        at = self._at(key)
        with locked(self.folder / "memo.lock"):
            if (at / "record.json").is_file():
                return
            self._make_room(checkpoint.nbytes)
            shutil.rmtree(at, ignore_errors=True)
            try:
                write_folder(checkpoint, at / "model")
                with write_aside(at / "record.json") as file:
                    file.write(json.dumps({"key": key, **record}).encode())
            except (BudgetError, OSError) as error:
                shutil.rmtree(at, ignore_errors=True)
                notice("degraded", f"what a step made is not kept, and will be made again: {error}",
                       where=str(self.folder))

    def _make_room(self, needed: int) -> None:
        sizes: dict[Path, tuple[float, int]] = {}
        for at in self.folder.iterdir():
            if at.is_dir():
                with suppress(OSError):
                    sizes[at] = (at.stat().st_mtime, sum(path.stat().st_size for path in at.rglob("*")
                                                         if path.is_file()))
        total = sum(size for _, size in sizes.values())
        for at in sorted(sizes, key=lambda at: sizes[at]):
            if total + needed <= self.limit_bytes:
                return
            shutil.rmtree(at, ignore_errors=True)
            total -= sizes[at][1]
