"""Small files of unknown origin: opened only when regular and not too large, JSON with its size and depth capped."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgewise.core.errors import FormatError, SourceError

__all__ = ["parse_json", "read_json", "read_small", "regular_file_bytes"]

_JSON_CONTAINERS = 100_000
_JSON_COMMAS = 200_000


def regular_file_bytes(path: Path) -> int:
    """Size of a regular file. A missing one is a SourceError; a folder, pipe or device is a FormatError."""
    try:
        info = path.stat()
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: no such file, or it cannot be read ({error.__class__.__name__})") from error
    if not stat.S_ISREG(info.st_mode):
        raise FormatError("expected a regular file", path=path)
    return info.st_size


def read_small(path: Path, limit_bytes: int) -> bytes:
    """The bytes of a file of at most `limit_bytes`."""
    size = regular_file_bytes(path)
    if size > limit_bytes:
        raise FormatError(f"the file has {size} bytes; at most {limit_bytes} are expected here", path=path)
    try:
        with open(path, "rb") as file:
            return file.read(limit_bytes)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {os.strerror(error.errno or 0)}") from error


def parse_json(raw: bytes, *, path: Path, offset: int = 0, commas: int = _JSON_COMMAS,
               on_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """JSON from untrusted bytes; duplicate keys are refused.

    offset: where `raw` begins in the file, for messages. commas: how many are allowed.
    on_object: makes each object from its (key, value) pairs.
    """
    # Counting brackets bounds the number of Python objects before any of them is made.
    if raw.count(b"{") + raw.count(b"[") > _JSON_CONTAINERS or raw.count(b",") > commas:
        raise FormatError(
            f"the JSON has more than {_JSON_CONTAINERS} brackets or {commas} commas", path=path, offset=offset)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"the JSON names {twice[:200]!r} twice", path=path, offset=offset)
        return made

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=on_object or unique)
    except RecursionError:
        raise FormatError("the JSON is nested too deeply", path=path, offset=offset) from None
    except UnicodeDecodeError as error:
        raise FormatError("the JSON is not UTF-8", path=path, offset=offset + error.start) from None
    except json.JSONDecodeError as error:
        raise FormatError(f"not valid JSON: {error.msg}", path=path, offset=offset + error.pos) from None
    except ValueError as error:  # an integer of thousands of digits
        raise FormatError(f"not valid JSON: {error}", path=path, offset=offset) from None


def read_json(path: Path, limit_bytes: int = 4_000_000) -> dict[str, Any]:
    """A JSON file that holds one object."""
    value = parse_json(read_small(path, limit_bytes), path=path)
    if not isinstance(value, dict):
        raise FormatError(f"expected a JSON object; found {type(value).__name__}", path=path)
    return value
