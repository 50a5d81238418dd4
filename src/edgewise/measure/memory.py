"""Memory of this process and of a child process, anonymous and file pages apart. Linux."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgewise.core.errors import EdgewiseError, InvalidValueError

__all__ = ["ChildUse", "MemoryUse", "memory_use", "run_child"]


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of physical memory. resident = anonymous + file + shared; file pages can be dropped and read again."""

    resident_bytes: int
    peak_bytes: int
    anonymous_bytes: int
    file_bytes: int
    shared_bytes: int
    proportional_bytes: int | None = None


def memory_use(pid: int | None = None, *, proc: Path = Path("/proc"), proportional: bool = False) -> MemoryUse:
    """Memory of a process, by default this one. proportional: also its share of pages that several processes map."""
    directory = proc / ("self" if pid is None else str(pid))
    try:
        fields = _kib_fields((directory / "status").read_text())
        share = _kib_fields((directory / "smaps_rollup").read_text())["Pss"] if proportional else None
        return MemoryUse(fields["VmRSS"], fields["VmHWM"], fields["RssAnon"], fields["RssFile"], fields["RssShmem"],
                         share)
    except FileNotFoundError as error:
        raise EdgewiseError(f"{error.filename}: not there; the process has ended, or this is not Linux") from None
    except KeyError as error:
        raise EdgewiseError(f"{directory}: no field {error}; the process has ended, or the kernel is too old") from None


def _kib_fields(text: str) -> dict[str, int]:
    fields = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            fields[name] = int(rest.split()[0]) * 1024
    return fields


@dataclass(frozen=True)
class ChildUse:
    """A command that has ended. peak_bytes: the most resident memory of it or of any child it waited for."""

    returncode: int
    peak_bytes: int
    wall_s: float
    user_s: float
    system_s: float
    stdout: str
    stderr: str


# A new process inherits the peak of the one it is started from, so a command started from here would report at least
# our own peak. A bare interpreter in between keeps that below 12 MB.
_LAUNCHER = """
import json, os, sys, time
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, use = os.wait4(pid, 0)
wall = time.perf_counter() - start
with os.fdopen(int(sys.argv[1]), "w") as out:
    json.dump([os.waitstatus_to_exitcode(status), use.ru_maxrss * 1024, wall, use.ru_utime, use.ru_stime], out)
"""


def run_child(command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None,
              stdin: str = "", timeout_s: float | None = None) -> ChildUse:
    """Run a command to its end and say what it used. A peak below 12 MB is not resolved.

    returncode is negative for a signal. Raises EdgewiseError when the command cannot be started, and
    subprocess.TimeoutExpired.
    """
    if not command:
        raise InvalidValueError("run_child expects a command of at least one word; given none")
    read_end, write_end = os.pipe()
    try:
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(write_end), *command]
        # Fork and exec is left to the launcher: os.posix_spawnp finds the program on the PATH it is given.
        done = subprocess.run(launcher, env=None if env is None else dict(env), cwd=cwd, input=stdin, text=True,
                              capture_output=True, pass_fds=[write_end], timeout=timeout_s, check=False)
        os.close(write_end)
        write_end = -1
        with os.fdopen(read_end) as answer:
            read_end = -1
            text = answer.read()
    finally:
        for end in (read_end, write_end):
            if end >= 0:
                os.close(end)
    if not text:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}"
        raise EdgewiseError(f"cannot run {command[0]!r}: {reason}")
    code, peak, wall, user, system = json.loads(text)
    return ChildUse(code, peak, wall, user, system, done.stdout, done.stderr)
