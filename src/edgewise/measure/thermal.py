"""Temperature and clock of the processor, where the system tells: thermal zones and cpufreq below sysfs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Thermal", "thermal_state"]


@dataclass(frozen=True)
class Thermal:
    """celsius: the hottest zone. clock_share: current over highest clock, the slowest core's. throttled: how often the
    processor says it slowed itself since the system started. None: not told, and reason says what is missing."""

    celsius: float | None
    clock_share: float | None
    throttled: int | None
    reason: str = ""


def thermal_state(sysfs: Path = Path("/sys")) -> Thermal:
    """What can be read now."""
    zones = [milli / 1000 for path in sorted((sysfs / "class/thermal").glob("thermal_zone*/temp"))
             if (milli := _number(path)) is not None]
    shares = []
    for directory in sorted((sysfs / "devices/system/cpu").glob("cpu[0-9]*/cpufreq")):
        now, most = _number(directory / "scaling_cur_freq"), _number(directory / "cpuinfo_max_freq")
        if now is not None and most:
            shares.append(now / most)
    counts = [count for path in (sysfs / "devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/package_throttle_count")
              if (count := _number(path)) is not None]
    missing = [name for name, found in (("thermal zone", zones), ("cpufreq", shares), ("throttle count", counts))
               if not found]
    return Thermal(max(zones, default=None), min(shares, default=None), max(counts, default=None),
                   f"no readable {', no '.join(missing)} below {sysfs}" if missing else "")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
