"""Device tables: the ones that ship with edgewise, and the user's own, as TOML or JSON.

A table holds the fields of `core.device.Device`. Every number of a shipped table names its source, by its dotted path
or by that of the part it belongs to; "computed" and "estimated" say from what.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from edgewise.core.device import Device
from edgewise.core.errors import FormatError, InvalidValueError, SourceError

__all__ = ["dump", "list_devices", "load", "save"]

_LARGEST_FILE = 1_000_000


def list_devices() -> tuple[str, ...]:
    """Names of the shipped tables, for `load`."""
    return tuple(sorted(item.name.removesuffix(".toml") for item in resources.files(__package__).iterdir()
                        if item.name.endswith(".toml")))


def load(name_or_path: str | Path) -> Device:
    """A shipped device by its name, or a table at a path (.toml or .json).

    Raises SourceError when there is neither, FormatError when the file is not a device table.
    """
    if str(name_or_path) in list_devices():
        text = (resources.files(__package__) / f"{name_or_path}.toml").read_text("utf-8")
        return _parse(text, f"{name_or_path}.toml")
    path = Path(name_or_path)
    if not path.is_file():
        raise SourceError(f"no device {str(name_or_path)!r}: expected the path of a .toml or .json table, or one of "
                          f"{', '.join(list_devices())}; `edgewise device --out FILE` writes one for this machine")
    if path.stat().st_size > _LARGEST_FILE:
        raise FormatError(f"a device table has at most {_LARGEST_FILE:,} bytes; given {path.stat().st_size:,}",
                          path=path)
    try:
        return _parse(path.read_text("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise FormatError("a device table is UTF-8 text", path=path, offset=error.start) from None


def _parse(text: str, path: str) -> Device:
    try:
        data = json.loads(text) if path.endswith(".json") else tomllib.loads(text)
        return Device.from_json(data)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"not a readable table: {error}", path=path) from None
    except InvalidValueError as error:
        raise FormatError(str(error), path=path) from None


def save(device: Device, path: str | Path) -> None:
    """Write a device as TOML, or as JSON when the name ends so. An existing file is replaced."""
    path = Path(path)
    text = json.dumps(device.to_json(), indent=2) + "\n" if path.suffix == ".json" else dump(device)
    path.write_text(text, "utf-8")


def dump(device: Device) -> str:
    """The device as TOML; `load` reads it back."""
    return "\n".join(_lines(device.to_json())) + "\n"


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    for key, value in data.items():
        if not isinstance(value, list | dict):
            yield f"{key} = {_value(value)}"
    for key in ("tiers", "units", "links"):
        for part in data[key]:
            yield from ("", f"[[{key}]]")
            yield from (f"{name} = {_value(value)}" for name, value in part.items() if value != {})
    if data["sources"]:
        yield from ("", "[sources]")
        yield from (f"{_string(name)} = {_string(text)}" for name, text in data["sources"].items())


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_string(name)} = {_value(item)}" for name, item in value.items()) + " }"
    return repr(value)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, except that TOML wants DEL escaped too.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
