"""One recipe per published system: its claims, tried at several scales, and what became of them.

A recipe is a file <slug>.py with RECIPE in it, found by that; there is no list to edit.
"""

from __future__ import annotations

from edgewise.core.front_door import front_door

__all__, __getattr__ = front_door(__name__, {
    "coverage": "coverage_report",
    "runner": "recipe_of reproduce slugs",
})
