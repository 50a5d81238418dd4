"""Make a checkpoint smaller in closed form, without a gradient: from a Checkpoint and statistics to a Checkpoint."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {"Block": "walk", "Group": "walk", "StatsSource": "walk", "blocks_of": "walk", "walk": "walk"}
__all__ = ["Block", "Group", "StatsSource", "blocks_of", "walk"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
