"""The front door of a room: its public names, each imported from its module when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["front_door"]


def front_door(package: str, names: Mapping[str, str]) -> tuple[list[str], Callable[[str], Any]]:
    """`__all__` and `__getattr__` of a package: a start pays for the modules whose names it uses, and for no others.

        __all__, __getattr__ = front_door(__name__, {"checkpoint": "Checkpoint Step"})

    names: module of the package -> the public names in it, with spaces between them.
    """
    home = {name: module for module, together in names.items() for name in together.split()}

    def opened(name: str) -> Any:
        if name in home:
            return getattr(import_module(f"{package}.{home[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return sorted(home), opened
