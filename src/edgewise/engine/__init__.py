"""Run language models and encoders natively, from a Checkpoint to tokens."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["Generation", "GenerationOptions", "LanguageModel", "Token", "load", "model_of"]

_HOME = {
    "Generation": "generate", "GenerationOptions": "generate", "Token": "generate", "LanguageModel": "model",
    "load": "loading", "model_of": "loading",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
