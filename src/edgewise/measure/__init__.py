"""Time, memory, energy and quality of any callable; what the machine can do; statistics of interleaved runs."""

from edgewise.measure.energy import Energy, EnergyMeter
from edgewise.measure.machine import probe, usable_cores
from edgewise.measure.memory import ChildUse, MemoryUse, memory_use, run_child
from edgewise.measure.quality import Divergence, Perplexity, divergence, kl_divergence, perplexity
from edgewise.measure.repeat import Comparison, Sample, compare, repeat, time_call

__all__ = [
    "ChildUse",
    "Comparison",
    "Divergence",
    "Energy",
    "EnergyMeter",
    "MemoryUse",
    "Perplexity",
    "Sample",
    "compare",
    "divergence",
    "kl_divergence",
    "memory_use",
    "perplexity",
    "probe",
    "repeat",
    "run_child",
    "time_call",
    "usable_cores",
]
