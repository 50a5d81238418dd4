"""Frozen dataclasses to plain JSON data and back, by their type hints. Arrays and callables stay out."""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from edgewise.core.errors import InvalidValueError

__all__ = ["Plain", "from_plain", "to_plain"]

T = TypeVar("T")


class Plain:
    """Gives a dataclass `to_json` and `from_json`. A field with metadata {"plain": False} is left out."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `from_json` is its inverse. Fields at their default None are left out."""
        data: dict[str, Any] = to_plain(self)
        return data

    @classmethod
    def from_json(cls: type[T], data: Mapping[str, Any]) -> T:
        """Raises InvalidValueError for an unknown or missing field, or a value of the wrong kind, with its path."""
        made: T = from_plain(cls, data, cls.__name__)
        return made


def to_plain(value: Any) -> Any:
    """Dataclasses become dicts, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if f.metadata.get("plain", True)]
        return {f.name: to_plain(getattr(value, f.name)) for f in fields
                if not (getattr(value, f.name) is None and f.default is None)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy scalar
        return value.item()
    raise InvalidValueError(f"{type(value).__name__} does not convert to JSON")


def from_plain(hint: Any, data: Any, where: str) -> Any:
    """`data` as a value of type `hint`; `where` is its path, for messages."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint, data, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        return _first_that_fits([a for a in arguments if a is not type(None)], data, where)
    if origin is Literal:
        if data not in arguments:
            raise InvalidValueError(f"{where}: expected one of {', '.join(map(str, arguments))}; given {data!r}")
        return data
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise InvalidValueError(f"{where}: expected a list; given {_short(data)}")
        kinds = [arguments[0]] * len(data) if arguments[1:] == (...,) else list(arguments)
        if len(kinds) != len(data):
            raise InvalidValueError(f"{where}: expected {len(kinds)} items; given {len(data)}")
        return tuple(from_plain(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, data,
                                                                                               strict=True)))
    if origin in (dict, Mapping, collections.abc.Mapping):
        if not isinstance(data, Mapping):
            raise InvalidValueError(f"{where}: expected a table; given {_short(data)}")
        return {str(key): from_plain(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    return _scalar(hint, data, where)


def _scalar(hint: Any, data: Any, where: str) -> Any:
    if hint is Any:
        return data
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if hint is int and isinstance(data, float) and data.is_integer():
        return int(data)
    if hint in (int, float, str, bool) and (not isinstance(data, hint) or (hint is int and isinstance(data, bool))):
        raise InvalidValueError(f"{where}: expected {hint.__name__}; given {_short(data)}")
    return data


def _first_that_fits(kinds: list[Any], data: Any, where: str) -> Any:
    for kind in kinds:  # exact kinds first, so that 3 stays an int in `int | float`
        if isinstance(kind, type) and type(data) is kind:
            return data
    for i, kind in enumerate(kinds):
        try:
            return from_plain(kind, data, where)
        except InvalidValueError:
            if i == len(kinds) - 1:
                raise
    raise InvalidValueError(f"{where}: nothing fits {_short(data)}")


def _dataclass(cls: type[Any], data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise InvalidValueError(f"{where}: expected a table; given {_short(data)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("plain", True)}
    unknown = set(data) - set(fields)
    if unknown:
        raise InvalidValueError(f"{where}: unknown field {sorted(unknown)[0]!r}; it has {', '.join(fields)}")
    missing = [name for name, f in fields.items() if name not in data and f.default is dataclasses.MISSING
               and f.default_factory is dataclasses.MISSING]
    if missing:
        raise InvalidValueError(f"{where}: field {missing[0]!r} is missing")
    return cls(**{name: from_plain(hints[name], item, f"{where}.{name}") for name, item in data.items()})


def _short(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 40 else text[:37] + "..."
