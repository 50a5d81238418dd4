"""One recipe per published system: its claims, tried at several scales, and what became of them.

A recipe is a file <slug>.py with RECIPE in it, found by that; there is no list to edit.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["coverage_report", "recipe_of", "reproduce", "slugs"]

_HOME = {"recipe_of": "runner", "reproduce": "runner", "slugs": "runner", "coverage_report": "coverage"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
