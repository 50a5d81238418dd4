"""Joules of a call, where the machine counts them: RAPL counters of processors, or a battery that reports its power.

Neither exists in most virtual machines, and RAPL is often readable by root only; the answer is then None and why.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Energy", "EnergyMeter"]


@dataclass(frozen=True)
class Energy:
    """joules is None when unknown; reason says why. seconds: how long the call took. source: what counted."""

    joules: float | None
    seconds: float
    source: str = ""
    reason: str = ""


class EnergyMeter:
    """Reads the counters below a sysfs root. `source` is "rapl", "battery" or ""; `reason` says what is missing."""

    def __init__(self, sysfs: Path = Path("/sys")) -> None:
        self._packages: list[tuple[Path, int]] = []
        self._battery: Path | None = None
        missing = [self._find_rapl(sysfs / "class/powercap"), self._find_battery(sysfs / "class/power_supply")]
        self.source = "rapl" if self._packages else "battery" if self._battery else ""
        self.reason = "" if self.source else "; ".join(text for text in missing if text)

    def _find_rapl(self, directory: Path) -> str:
        zones = sorted(directory.glob("intel-rapl:*")) if directory.is_dir() else []
        if not zones:
            return f"no RAPL counters in {directory}"
        for zone in zones:
            if zone.name.count(":") != 1:
                continue  # a part of a package (core, uncore, dram): the package counts it already
            try:
                _read(zone / "energy_uj")
                self._packages.append((zone, _read(zone / "max_energy_range_uj")))
            except (OSError, ValueError) as error:
                self._packages.clear()
                return f"RAPL counters are not readable ({type(error).__name__}: {zone / 'energy_uj'})"
        return "" if self._packages else f"no RAPL package in {directory}"

    def _find_battery(self, directory: Path) -> str:
        for supply in sorted(directory.glob("*")) if directory.is_dir() else []:
            try:
                if (supply / "type").read_text().strip() != "Battery":
                    continue
                _battery_watts(supply)
            except (OSError, ValueError):
                continue
            self._battery = supply
            return ""
        return f"no battery that reports its power in {directory}"

    def power_w(self) -> float | None:
        """What the battery delivers now; None without one, or while it charges."""
        return None if self._battery is None else _battery_watts(self._battery)

    def measure(self, call: Callable[[], Any]) -> Energy:
        """Energy of one call: of the whole machine or package, idle power included.

        RAPL counters wrap after minutes to hours; one wrap is counted, more cannot be seen. The battery's power is
        read before and after, so a call should last seconds.
        """
        if not self.source:
            start = time.perf_counter()
            call()
            return Energy(None, time.perf_counter() - start, reason=self.reason)
        before = self._state()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        after = self._state()
        if before is None or after is None:
            return Energy(None, seconds, reason="the battery is not discharging; unplug the charger")
        if self.source == "battery":
            return Energy((before[0] + after[0]) / 2 * seconds, seconds, "battery")
        microjoules = sum((b - a) % (limit + 1) for a, b, (_, limit) in zip(before, after, self._packages, strict=True))
        return Energy(microjoules / 1e6, seconds, "rapl")

    def _state(self) -> list[float] | None:
        if self.source == "rapl":
            return [_read(zone / "energy_uj") for zone, _ in self._packages]
        watts = self.power_w()
        return None if watts is None else [watts]


def _read(path: Path) -> int:
    return int(path.read_text())


def _battery_watts(supply: Path) -> float | None:
    """Watts while discharging, None otherwise. Some batteries report power, some current and voltage."""
    if (supply / "power_now").exists():
        watts = abs(_read(supply / "power_now")) / 1e6
    else:
        watts = abs(_read(supply / "current_now")) * 1e-6 * _read(supply / "voltage_now") * 1e-6
    return watts if (supply / "status").read_text().strip() == "Discharging" else None
