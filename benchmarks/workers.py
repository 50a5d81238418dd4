"""What the comparisons share: processes that run one engine each, and reports written where they were asked for."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgewise.core.report import Report
from edgewise.formats.cache import write_aside
from edgewise.papers.runner import without_paths
from edgewise.report import render

__all__ = ["HERE", "Process", "commit", "publish"]

HERE = Path(__file__).parent


class Process:
    """A script beside this file that answers a JSON line with one; its first line is what it says of itself."""

    def __init__(self, python: str, script: str, settings: Mapping[str, Any], **environment: str) -> None:
        self.settings = settings
        self._process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env={**os.environ, **environment})
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"{dict(self.settings)}: the worker ended with status {self._process.wait()}")

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def commit() -> str:
    """Of edgewise's own repository; "dirty" when what runs differs from it, results apart."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(HERE.parent), *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs")
    return git("describe", "--always") + ("-dirty" if changed else "")


def publish(report: Report, out: Path | None) -> None:
    """Print a report, and write it as JSON where a place is given; neither names a directory of this machine."""
    report = without_paths(report)
    print(render(report, "markdown"))
    if out:
        with write_aside(out) as file:
            file.write((json.dumps(report.to_json(), indent=1) + "\n").encode())
