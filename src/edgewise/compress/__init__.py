"""Make a checkpoint smaller in closed form, without a gradient: from a Checkpoint and statistics to a Checkpoint."""

from __future__ import annotations

from edgewise.core.front_door import front_door

__all__, __getattr__ = front_door(__name__, {"walk": "Block Group StatsSource blocks_of walk"})
