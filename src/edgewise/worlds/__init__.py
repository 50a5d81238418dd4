"""Physical systems with a known answer, to learn from and to be measured against."""

from __future__ import annotations

from edgewise.core.front_door import front_door

__all__, __getattr__ = front_door(__name__, {
    "odometry": "Drift Drive compose drift drive windows",
})
