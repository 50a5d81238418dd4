"""Time, memory, energy and quality of any callable; what the machine can do; statistics of interleaved runs."""

from __future__ import annotations

from edgewise.core.front_door import front_door

__all__, __getattr__ = front_door(__name__, {
    "energy": "Energy EnergyMeter",
    "events": "Event EventLog",
    "cores": "usable_cores",
    "machine": "probe",
    "memory": "ChildUse MemoryUse memory_use run_child",
    "power": "PowerTrace TurnEnergy energy_of_turns",
    "quality": "Divergence Perplexity divergence kl_divergence perplexity",
    "repeat": "Comparison Sample compare rounds time_call",
    "thermal": "Thermal thermal_state",
})
