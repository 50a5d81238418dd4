"""The main job: number formats, KV format and context under a Budget, with a Pareto report."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["FitResult", "fit"]

_HOME = {"FitResult": "search", "fit": "search"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
