"""What the machine is, on made-up trees; what it reaches, for sense only: no time is asserted."""

from __future__ import annotations

import math
import os

import pytest

from edgewise.core.device import Device
from edgewise.core.errors import collect_notices
from edgewise.measure.machine import Cores, memory_limit, probe, storage_read_rate, usable_cores


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A machine of four processors, two per core, 8 GB, in the cgroup /batch/job."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings + "\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:        8000000 kB\nMemFree: 1 kB\n")

    def cgroup(listing, **files):
        (tmp_path / "proc/self/cgroup").write_text(listing)
        for name, text in files.items():
            path = tmp_path / "sys/fs/cgroup" / name.replace("__", "/").replace("DOT", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return cgroup


def test_hyper_threads_count_once(tree):
    cores = usable_cores(tree("0::/\n"))
    assert cores == Cores(4, 2, None)
    assert cores.usable == 2


def test_quota_of_version_2_is_the_tightest_on_the_way_up(tree):
    root = tree("0::/batch/job\n", batch__job__cpuDOTmax="max 100000\n", batch__cpuDOTmax="150000 100000\n")
    assert usable_cores(root) == Cores(4, 2, 1.5)
    assert usable_cores(root).usable == 1


def test_quota_of_version_1(tree):
    root = tree("4:cpu,cpuacct:/job\n", cpu__job__cpuDOTcfs_quota_us="50000", cpu__job__cpuDOTcfs_period_us="100000",
                cpu__cpuDOTcfs_quota_us="-1")
    assert usable_cores(root).quota == 0.5
    assert usable_cores(root).usable == 1


def test_affinity_limits(tree, monkeypatch):
    root = tree("0::/\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2})
    assert usable_cores(root) == Cores(2, 1, None)


@pytest.mark.parametrize(("listing", "files", "expected"), [
    ("0::/job\n", {}, 8_192_000_000),
    ("0::/job\n", {"job__memoryDOTmax": "300000000\n", "memoryDOTmax": "max\n"}, 300_000_000),
    ("5:memory:/job\n", {"memory__job__memoryDOTlimit_in_bytes": "9223372036854771712"}, 8_192_000_000),
    ("5:memory:/job\n", {"memory__job__memoryDOTlimit_in_bytes": "1000000"}, 1_000_000),
])
def test_memory_limit(tree, listing, files, expected):
    assert memory_limit(tree(listing, **files)) == expected


def test_this_machine_has_cores_and_memory():
    assert 1 <= usable_cores().usable <= usable_cores().logical <= os.cpu_count()
    assert memory_limit() > 10**8


def test_storage_rate_is_a_number_or_a_reason(tmp_path):
    rate, reason = storage_read_rate(tmp_path, 2**22)
    assert (rate is None) == bool(reason)
    assert rate is None or rate > 0
    assert list(tmp_path.iterdir()) == []


def test_storage_that_cannot_be_written_is_a_reason(tmp_path):
    rate, reason = storage_read_rate(tmp_path / "nowhere", 2**20)
    assert rate is None
    assert "No such file" in reason


def test_probe_fills_a_device_whose_every_number_has_a_source(tmp_path):
    steps = []
    with collect_notices():
        found = probe(seconds=0.02, repeats=2, directory=tmp_path, progress=steps.append)
    device = found.device
    assert Device.from_json(device.to_json()) == device
    numbers = device.numbers()
    assert {"tiers.ram.read_bytes_per_s", "units.cpu.ops_per_s.int8", "units.cpu.ops_per_s.fp32"} <= set(numbers)
    for path, value in numbers.items():
        assert value > 0
        assert math.isfinite(value)
        assert device.source(path), path
    assert found.report["instruction tier"] == device.unit("cpu").instructions
    assert "storage" in steps
