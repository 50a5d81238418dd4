"""edgewise makes a model fit a device, adapts it there, runs it there, and proves it.

    from edgewise import load

    model = load("smollm2")
    for piece in model.stream("What is a leaf?"):
        print(piece, end="")

Importing this package imports nothing else: each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

_HOME = {"load": "edgewise.engine"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'edgewise' has no attribute {name!r}")
