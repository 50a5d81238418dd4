"""Memory of this process and of children, against memory of a known size."""

from __future__ import annotations

import mmap
import os
import sys

import pytest

from edgewise.core.errors import EdgewiseError, InvalidValueError
from edgewise.measure.memory import memory_use, run_child

MB = 10**6


def test_anonymous_memory_grows_by_what_is_touched():
    before = memory_use()
    # Pages of a mapping of its own: an allocator may hand out again what an earlier test has touched.
    with mmap.mmap(-1, 64 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for start in range(0, 64 * MB, mmap.PAGESIZE):
            block[start] = 1
        after = memory_use()
    assert 60 * MB < after.anonymous_bytes - before.anonymous_bytes < 70 * MB
    assert after.peak_bytes >= after.resident_bytes


def test_file_pages_are_counted_apart(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"x" * (32 * MB))
    before = memory_use()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert sum(data[i] for i in range(0, len(data), 4096)) > 0
        after = memory_use(proportional=True)
    assert 30 * MB < after.file_bytes + after.shared_bytes - before.file_bytes - before.shared_bytes < 34 * MB
    assert after.anonymous_bytes - before.anonymous_bytes < 8 * MB
    assert 0 < after.proportional_bytes <= after.resident_bytes + 8 * MB


def test_peak_of_a_child_is_its_own_and_not_ours():
    ballast = bytearray(os.urandom(1) * (200 * MB))
    small = run_child([sys.executable, "-S", "-c", "print('hello')"])
    large = run_child([sys.executable, "-S", "-c", "x = bytearray(b'1' * 60_000_000); print(len(x))"])
    assert (small.returncode, small.stdout) == (0, "hello\n")
    assert small.peak_bytes < 40 * MB < 60 * MB < large.peak_bytes < 200 * MB
    assert len(ballast) == 200 * MB


def test_a_child_gets_its_input_and_its_place(tmp_path):
    code = "import os, sys; print(sys.stdin.read() + os.getcwd() + os.environ['X']); sys.exit(3)"
    done = run_child([sys.executable, "-c", code], stdin="in:", cwd=tmp_path, env={**os.environ, "X": "!"})
    assert (done.returncode, done.stdout) == (3, f"in:{tmp_path}!\n")
    assert done.wall_s > 0


def test_a_killed_child_has_a_negative_status():
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]).returncode == -9


def test_refusals(tmp_path):
    with pytest.raises(EdgewiseError, match="cannot run '/no/such/program'"):
        run_child(["/no/such/program"])
    with pytest.raises(InvalidValueError):
        run_child([])
    with pytest.raises(EdgewiseError, match="has ended"):
        memory_use(7, proc=tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "7/status").write_text("Name:\tx\nVmRSS:\t 12 kB\n")
    with pytest.raises(EdgewiseError, match="no field"):
        memory_use(7, proc=tmp_path)
