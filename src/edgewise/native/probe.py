"""What the processor is and reaches. Rates are of this moment: neighbours and clocks move them."""

from __future__ import annotations

from typing import cast

from edgewise.native import _core  # type: ignore[attr-defined]

__all__ = ["best_tier", "fp32_rate", "int8_rate", "processor_name", "read_rates", "tier_in_use", "tiers"]


def tiers() -> list[str]:
    """Every instruction tier that this processor and build can run, the plainest first."""
    return cast("list[str]", _core.tiers())


def best_tier() -> str:
    """The last of `tiers()`."""
    return cast("str", _core.best_tier())


def tier_in_use() -> str:
    """The tier that kernels are chosen by: the best one, or what EDGEWISE_ISA says. ValueError for a wrong name."""
    return cast("str", _core.tier_in_use())


def processor_name() -> str:
    """The processor's own name, "" where it has none."""
    return cast("str", _core.cpu_model_name())


def read_rates(nbytes: int, threads: int, *, repeats: int = 5, tier: str | None = None) -> list[float]:
    """Bytes per second of each of `repeats` passes over nbytes of memory, split over the threads."""
    return cast("list[float]", _core.probe_read(nbytes, threads, repeats, tier))


def int8_rate(threads: int, seconds: float, *, tier: str | None = None) -> float:
    """int8 operations per second, two per multiply-add, of registers only, over about `seconds`."""
    return cast("float", _core.probe_int8(threads, seconds, tier))


def fp32_rate(threads: int, seconds: float, *, tier: str | None = None) -> float:
    """fp32 operations per second, two per multiply-add, of registers only, over about `seconds`."""
    return cast("float", _core.probe_fp32(threads, seconds, tier))
