"""One file per model family. Each turns a Checkpoint into a Plan: `plan(checkpoint) -> Plan`.

A family's file says which architectures it reads in `ARCHS`, and is found by that; there is no list to edit.
Files whose name starts with an underscore hold what families share.
"""

from __future__ import annotations

import pkgutil
from functools import lru_cache
from importlib import import_module
from types import ModuleType

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import UnsupportedError
from edgewise.engine.plan import Plan

__all__ = ["known_archs", "plan_of"]


@lru_cache(maxsize=1)
def _families() -> tuple[str, ...]:
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def _family(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")


@lru_cache(maxsize=64)
def _family_of(arch: str) -> str | None:
    """The file that reads `arch`. One named like the architecture is tried first, so that the others stay unread."""
    own = arch.replace("-", "_")
    for name in sorted(_families(), key=lambda name: name != own):
        if arch in _family(name).ARCHS:
            return name
    return None


def known_archs() -> tuple[str, ...]:
    """Every architecture that a family here reads, sorted."""
    return tuple(sorted(arch for name in _families() for arch in _family(name).ARCHS))


def plan_of(checkpoint: Checkpoint) -> Plan:
    """The Plan of a checkpoint, by its architecture.

    Raises UnsupportedError for an unknown architecture or an unknown value in its configuration, and FormatError for a
    tensor that is missing or has another shape than the configuration says.
    """
    name = _family_of(checkpoint.arch)
    if name is None:
        raise UnsupportedError(
            f"{checkpoint.source or 'the model'}: architecture {checkpoint.arch!r} is not one that the engine runs; "
            f"it runs {', '.join(known_archs())}")
    plan: Plan = _family(name).plan(checkpoint)
    return plan
