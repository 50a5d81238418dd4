"""Run language models and encoders natively, from a Checkpoint to tokens."""

from __future__ import annotations

from edgewise.core.front_door import front_door

__all__, __getattr__ = front_door(__name__, {
    "generate": "Generation GenerationOptions Token",
    "loading": "load model_of",
    "model": "LanguageModel",
})
