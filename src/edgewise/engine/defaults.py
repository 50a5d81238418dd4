"""How a model asks to be sampled: the keys of its generation_config.json that have a meaning here."""

from __future__ import annotations

from typing import Any

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import InvalidValueError, notice
from edgewise.engine.generate import GenerationOptions

__all__ = ["generation_defaults"]

_SAMPLED = ("temperature", "top_k", "top_p", "min_p")


def generation_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields of GenerationOptions that the model's generation_config sets; empty where it sets none.

    As in transformers, `do_sample: false` means greedy whatever else is there, and `do_sample: true` without a
    temperature means 1. Without that key, a temperature speaks for itself. A value that is out of range is ignored
    with a notice.
    """
    given = checkpoint.metadata.get("generation") or {}
    samples = given.get("do_sample", "temperature" in given)
    found: dict[str, Any] = {}
    if samples:
        found = {name: given[name] for name in _SAMPLED if given.get(name) is not None}
        found.setdefault("temperature", 1.0)
    if given.get("repetition_penalty") not in (None, 1, 1.0):
        found["repetition_penalty"] = given["repetition_penalty"]
    return {name: value for name, value in found.items() if _allowed(name, value, checkpoint.source)}


def _allowed(name: str, value: Any, source: str) -> bool:
    try:
        if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else (int, float)):
            raise InvalidValueError(f"{name} is a number; given {str(value)[:60]!r}")
        GenerationOptions().with_changes(**{name: value})
    except InvalidValueError as error:
        notice("ignored", f"generation_config: {error}", where=source)
        return False
    return True
