"""Time, memory, energy and quality of any callable; what the machine can do; statistics of interleaved runs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "energy": "Energy EnergyMeter",
    "events": "Event EventLog",
    "cores": "usable_cores",
    "machine": "probe",
    "memory": "ChildUse MemoryUse memory_use run_child",
    "power": "PowerTrace TurnEnergy energy_of_turns",
    "quality": "Divergence Perplexity divergence kl_divergence perplexity",
    "repeat": "Comparison Sample compare rounds time_call",
    "thermal": "Thermal thermal_state",
}
"""Public names by module. A module is imported when one of its names is first used: a start pays for what it uses."""
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
