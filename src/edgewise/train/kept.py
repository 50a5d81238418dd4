"""Training that goes on after a kill: the state of a run, written aside every so many seconds.

    kept = Kept(folder, settings, [model, optimiser, schedule])
    for step in range(kept.load(), steps): ...; kept.save(step + 1)

What is kept belongs to its settings: of other settings it is left alone, and said.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edgewise.core.errors import notice
from edgewise.formats.cache import write_aside

__all__ = ["Kept"]


class Kept:
    """parts: whatever has state_dict and load_state_dict. folder None keeps nothing."""

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], parts: Sequence[Any], *,
                 every_s: float = 20.0) -> None:
        self._path = None if folder is None else folder / "training.pt"
        self._settings, self._parts, self._every_s = dict(settings), list(parts), every_s
        self._last = time.monotonic()

    def load(self) -> int:
        """Put back what was kept; the steps that it had done, 0 if there is nothing of these settings."""
        if self._path is None or not self._path.exists():
            return 0
        try:
            held = torch.load(self._path, weights_only=True)  # tensors and plain values: no code is run
            if held["settings"] != self._settings:
                notice("ignored", "what was kept here belongs to other settings; training starts anew",
                       where=str(self._path))
                return 0
            for part, values in zip(self._parts, held["parts"], strict=True):
                part.load_state_dict(values)
            done = int(held["done"])
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError) as error:
            notice("ignored", f"what was kept here cannot be read ({type(error).__name__}); training starts anew",
                   where=str(self._path))
            return 0
        notice("info", f"training goes on after {done} steps", where=str(self._path))
        return done

    def save(self, done: int, *, last: bool = False) -> None:
        """Keep the state if it is time to, or the last."""
        if self._path is None or not (last or time.monotonic() - self._last >= self._every_s):
            return
        content = io.BytesIO()
        torch.save({"settings": self._settings, "done": done, "parts": [part.state_dict() for part in self._parts]},
                   content)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with write_aside(self._path) as file:
            file.write(content.getbuffer())
        self._last = time.monotonic()
