"""What this machine is and reaches: cores, instruction tier, memory, multiply-adds, storage, energy counters.

`probe()` takes a few seconds. Every number is the best of repeated passes, since neighbours only ever slow one down.
"""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgewise.core.device import Device, Tier, Unit
from edgewise.core.errors import notice
from edgewise.core.report import Quantity, Report
from edgewise.measure.cores import Cores, cgroup_files, usable_cores
from edgewise.measure.energy import EnergyMeter

__all__ = ["Cores", "Probe", "memory_limit", "probe", "storage_read_rate", "usable_cores"]

_STORAGE_BYTES = 128 * 2**20
_READ_BYTES = 2**28


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes this process can have: the machine's memory, or its cgroup's limit where that is lower."""
    total = next(int(line.split()[1]) * 1024 for line in (root / "proc/meminfo").read_text().splitlines()
                 if line.startswith("MemTotal:"))
    limits = [total]
    for name in ("memory.max", "memory.limit_in_bytes"):
        for path in cgroup_files(root, name, "memory"):
            text = path.read_text().strip()
            if text != "max":
                limits.append(int(text))
    return min(limits)


def storage_read_rate(directory: Path, nbytes: int = _STORAGE_BYTES) -> tuple[float | None, str]:
    """Bytes per second of reading a fresh file past the page cache, 4 MiB at a time; or None and the reason."""
    chunk = min(4 * 2**20, nbytes)
    path = directory / f".edgewise-probe-{os.getpid()}"
    flags = getattr(os, "O_DIRECT", None)
    if flags is None:
        return None, "this system has no O_DIRECT"
    try:
        with mmap.mmap(-1, chunk) as buffer:  # a map of its own is aligned to pages, as O_DIRECT asks
            buffer.write(os.urandom(chunk))
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                for _ in range(nbytes // chunk):
                    os.write(descriptor, buffer)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            descriptor = os.open(path, os.O_RDONLY | flags)
            try:
                start, done = time.perf_counter(), 0
                while (count := os.readv(descriptor, [buffer])) > 0:
                    done += count
                seconds = time.perf_counter() - start
            finally:
                os.close(descriptor)
        return done / seconds, ""
    except OSError as error:
        return None, f"{directory}: {error.strerror} (reading past the page cache)"
    finally:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Probe:
    """What was found: as a Device, whose numbers say how they were measured, and as a Report."""

    device: Device
    report: Report


def probe(*, seconds: float = 0.3, repeats: int = 5, directory: Path | None = None,
          progress: Callable[[str], None] = lambda step: None) -> Probe:
    """Measure this machine. seconds: of each multiply loop. directory: whose storage is read, by default the current.

    progress is told what comes next.
    """
    from edgewise.native import probe as native  # compiled; importing this room does not need it

    cores = usable_cores()
    threads, tier = cores.usable, native.tier_in_use()
    memory = memory_limit()
    if cores.quota is not None and cores.quota < cores.physical:
        notice("info", f"the cgroup allows {cores.quota:g} of {cores.physical} cores; measured with {threads} threads",
               where="device")
    quantities = [
        Quantity("processor", native.processor_name() or platform.machine()),
        Quantity("instruction tier", tier),
        Quantity("cores", threads),
        Quantity("memory", memory, "B"),
    ]
    rates: dict[str, float] = {}
    counts = sorted({1, threads})
    nbytes = min(_READ_BYTES, memory // 8)
    for count in counts:
        progress(f"memory bandwidth, {_threads(count)}")
        values = native.read_rates(nbytes, count, repeats=repeats)
        rates[f"read, {count}"] = max(values)
        quantities.append(Quantity(f"memory read, {_threads(count)}", max(values), "B/s", (min(values), max(values))))
    for name, loop in (("int8", native.int8_rate), ("fp32", native.fp32_rate)):
        for count in counts:
            progress(f"{name} multiply-adds, {_threads(count)}")
            values = [loop(count, seconds / repeats) for _ in range(repeats)]
            rates[f"{name}, {count}"] = max(values)
            quantities.append(Quantity(f"{name} peak, {_threads(count)}", max(values), "op/s",
                                       (min(values), max(values))))
    progress("storage")
    directory = directory or Path.cwd()
    storage, reason = storage_read_rate(directory)
    if storage is None:
        notice("info", f"storage read rate unknown: {reason}", where="device")
    quantities.append(Quantity("storage read", storage, "B/s"))
    energy = EnergyMeter()
    quantities.append(Quantity("energy counter", energy.source or None))
    if not energy.source:
        notice("info", f"energy unknown: {energy.reason}", where="device")
    device = _device(quantities[0].value, tier, threads, memory, rates, storage, directory)
    return Probe(device, Report("This machine", tuple(quantities), environment=_environment()))


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _device(processor: object, tier: str, threads: int, memory: int, rates: dict[str, float], storage: float | None,
            directory: Path) -> Device:
    place = os.statvfs(directory)
    how = f"measured by edgewise device with {_threads(threads)}"
    return Device(
        name=platform.node() or "this-machine",
        description=str(processor),
        tiers=(Tier("ram", memory, round(rates[f"read, {threads}"])),
               Tier("storage", max(1, place.f_bavail * place.f_frsize), None if storage is None else round(storage))),
        units=(Unit("cpu", {name: round(rates[f"{name}, {threads}"]) for name in ("int8", "fp32")}, cores=threads,
                    instructions=tier),),
        sources={
            "tiers.ram.capacity_bytes": "MemTotal of /proc/meminfo, or the cgroup's limit where lower",
            "tiers.ram.read_bytes_per_s": f"{how}: streaming loads, best of repeated passes",
            "tiers.storage.capacity_bytes": "free space of the file system (statvfs)",
            "tiers.storage.read_bytes_per_s": "measured by edgewise device: O_DIRECT, 4 MiB at a time",
            "units.cpu": f"{how}: register-resident multiply-adds, two operations each, best of repeated passes",
            "units.cpu.cores": "affinity, hyper-threads counted once, within the cgroup quota",
        },
    )


def _environment() -> dict[str, str]:
    from edgewise import __version__

    return {"edgewise": __version__, "python": platform.python_version(), "system": platform.system(),
            "kernel": platform.release(), "machine": platform.machine()}
