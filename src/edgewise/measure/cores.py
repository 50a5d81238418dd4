"""How many threads get a core of their own."""

from __future__ import annotations

import os
from pathlib import Path

from edgewise.core.values import dataclass

__all__ = ["Cores", "cgroup_files", "usable_cores"]


@dataclass(frozen=True)
class Cores:
    """logical: processors this process may run on; physical: distinct cores among them; quota: of the cgroup."""

    logical: int
    physical: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Threads that each get a core of their own: at least one."""
        return max(1, min(self.physical, int(self.quota) if self.quota is not None else self.physical))


def usable_cores(root: Path = Path("/")) -> Cores:
    """Cores of this process: its affinity, hyper-threads counted once, and its cgroup's quota (v1 or v2)."""
    allowed = os.sched_getaffinity(0)
    siblings = set()
    for cpu in allowed:
        path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        siblings.add(path.read_text().strip() if path.exists() else str(cpu))
    return Cores(len(allowed), len(siblings), _cpu_quota(root))


def cgroup_files(root: Path, name: str, controller: str) -> list[Path]:
    """The file of that name in this process's cgroup and those above it, v2 and v1; the inner ones first."""
    found = []
    listing = root / "proc/self/cgroup"
    lines = listing.read_text().splitlines() if listing.exists() else []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        here = base / path.lstrip("/")
        for directory in (here, *here.parents):
            if directory == base.parent:
                break
            found.append(directory / name)
    return [path for path in found if path.is_file()]


def _cpu_quota(root: Path) -> float | None:
    quotas = []
    for path in cgroup_files(root, "cpu.max", "cpu"):
        limit, period = path.read_text().split()
        if limit != "max":
            quotas.append(int(limit) / int(period))
    for path in cgroup_files(root, "cpu.cfs_quota_us", "cpu"):
        limit = path.read_text().strip()
        if int(limit) > 0:
            quotas.append(int(limit) / int((path.parent / "cpu.cfs_period_us").read_text()))
    return min(quotas, default=None)
