"""Time, memory, energy and quality of any callable; what the machine can do; statistics of interleaved runs."""

from edgewise.measure.energy import Energy, EnergyMeter
from edgewise.measure.events import Event, EventLog
from edgewise.measure.machine import probe, usable_cores
from edgewise.measure.memory import ChildUse, MemoryUse, memory_use, run_child
from edgewise.measure.power import PowerTrace, TurnEnergy, energy_of_turns
from edgewise.measure.quality import Divergence, Perplexity, divergence, kl_divergence, perplexity
from edgewise.measure.repeat import Comparison, Sample, compare, repeat, rounds, time_call
from edgewise.measure.thermal import Thermal, thermal_state

__all__ = [
    "ChildUse",
    "Comparison",
    "Divergence",
    "Energy",
    "EnergyMeter",
    "Event",
    "EventLog",
    "MemoryUse",
    "Perplexity",
    "PowerTrace",
    "Sample",
    "Thermal",
    "TurnEnergy",
    "compare",
    "divergence",
    "energy_of_turns",
    "kl_divergence",
    "memory_use",
    "perplexity",
    "probe",
    "repeat",
    "rounds",
    "run_child",
    "thermal_state",
    "time_call",
    "usable_cores",
]
