"""Our models in torch: a folder or Checkpoint as the class that transformers has for it, rounded where it says so."""

from __future__ import annotations

from typing import Any

from edgewise.core.errors import require
from edgewise.core.front_door import front_door

__all__, _opened = front_door(__name__, {"loader": "checkpoint_of load", "static": "install layers_of"})


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("torch", "transformers"):
            require(module, extra="torch", purpose=f"edgewise.models.{name}")
    return _opened(name)
