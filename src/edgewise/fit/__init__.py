"""The main job: number formats, KV format and context under a Budget, with a Pareto report."""

from __future__ import annotations

from edgewise.core.front_door import front_door

__all__, __getattr__ = front_door(__name__, {
    "composition": "compose", "dispatch": "quantize", "methods": "METHODS method_of", "search": "FitResult fit"})
