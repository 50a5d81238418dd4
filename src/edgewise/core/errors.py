"""Errors and notices: what went wrong, and what was done differently from what was asked.

    EdgewiseError
    ├── SourceError          a model or text that cannot be found, fetched or verified
    ├── FormatError          a file that is not what it says it is
    ├── UnsupportedError     something well formed that edgewise does not implement
    ├── InvalidValueError    an argument outside what is allowed (also a ValueError)
    ├── BudgetError          a budget that cannot be met
    ├── ContextOverflowError more tokens than the context holds
    ├── MissingExtraError    an optional dependency that is not installed
    └── StrictError          a notice, where the caller asked for strictness

Every message says what was given, what was expected, where, and what to do.
A `Notice` records a fallback, truncation, clamp or ignored field. Nothing of that kind happens silently:
`notice(...)` hands it to the innermost `collect_notices()`, or to Python's warnings when nobody collects.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from edgewise.core.values import dataclass

__all__ = [
    "BudgetError",
    "ContextOverflowError",
    "EdgewiseError",
    "EdgewiseWarning",
    "FormatError",
    "InvalidValueError",
    "MissingExtraError",
    "Notice",
    "NoticeKind",
    "SourceError",
    "StrictError",
    "UnsupportedError",
    "collect_notices",
    "notice",
    "require",
]


class EdgewiseError(Exception):
    """Base of every error that edgewise raises on purpose. `exit_code` is the status of the command line."""

    exit_code = 1


class SourceError(EdgewiseError):
    """A model, text or wheel that cannot be found, fetched or verified."""

    exit_code = 3


class FormatError(EdgewiseError):
    """A file that is not what it says it is. Names the file, and the tensor and byte offset where known."""

    exit_code = 4

    def __init__(self, message: str, *, path: str | Path | None = None, tensor: str | None = None,
                 offset: int | None = None) -> None:
        self.message = message
        self.path = None if path is None else str(path)
        self.tensor = tensor
        self.offset = offset
        where = [] if path is None else [str(path)]
        if tensor is not None:
            where.append(f"tensor {tensor!r}")
        if offset is not None:
            where.append(f"byte {offset}")
        super().__init__(f"{', '.join(where)}: {message}" if where else message)


class UnsupportedError(EdgewiseError):
    """Well formed, but not something edgewise implements (an architecture, an operator, a number format)."""

    exit_code = 5


class InvalidValueError(EdgewiseError, ValueError):
    """An argument outside what is allowed."""

    exit_code = 2


class BudgetError(EdgewiseError):
    """A budget (memory, storage, time) that cannot be met; the message gives the smallest one that can."""

    exit_code = 6


class ContextOverflowError(EdgewiseError):
    """More tokens than the context holds, and no policy was chosen that says what to drop."""

    exit_code = 7


class MissingExtraError(EdgewiseError, ImportError):
    """An optional dependency that is not installed; the message names the command that installs it."""

    exit_code = 8


class StrictError(EdgewiseError):
    """A notice that strict mode turned into an error."""

    exit_code = 9


class EdgewiseWarning(UserWarning):
    """A notice nobody collected."""


NoticeKind = Literal["fallback", "truncation", "clamp", "ignored", "degraded", "info"]


@dataclass(frozen=True)
class Notice:
    """One thing that was done differently from what was asked.

    kind: fallback (another way was taken), truncation (input or output was cut), clamp (a value was moved into its
    range), ignored (a field had no effect), degraded (slower or less protected than usual), info (worth knowing).
    """

    kind: NoticeKind
    message: str
    where: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Notice:
        return cls(**data)

    def __str__(self) -> str:
        return f"{self.kind}: {self.where + ': ' if self.where else ''}{self.message}"


@dataclass
class _Collector:
    notices: list[Notice]
    strict: bool


_collector: ContextVar[_Collector | None] = ContextVar("edgewise_notices", default=None)


@contextmanager
def collect_notices(*, strict: bool = False) -> Iterator[list[Notice]]:
    """Gather the notices given inside the block. strict: the first notice that is not `info` raises StrictError."""
    collector = _Collector([], strict)
    token = _collector.set(collector)
    try:
        yield collector.notices
    finally:
        _collector.reset(token)


def notice(kind: NoticeKind, message: str, *, where: str = "") -> Notice:
    """Record that something was done differently from what was asked."""
    item = Notice(kind, message, where)
    collector = _collector.get()
    if collector is None:
        if kind != "info":
            warnings.warn(str(item), EdgewiseWarning, stacklevel=2)
        return item
    if collector.strict and kind != "info":
        raise StrictError(f"{item} (strict mode turns notices into errors)")
    if item not in collector.notices:
        collector.notices.append(item)
    return item


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import an optional module, or say which command installs it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the package {module.split('.')[0]!r}, which is not installed; "
            f"install it with: pip install 'edgewise[{extra}]'"
        ) from error
