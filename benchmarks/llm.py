"""Speed of edgewise beside llama-cpp-python on the same GGUF file, in one interleaved run.

    python benchmarks/llm.py --peer-python PEER/bin/python [--model FILE] [--pairs 15] [--out docs/results/NAME.json]

PEER is an environment with llama-cpp-python built from its source package on this machine
(`pip install --no-binary llama-cpp-python llama-cpp-python`). Each engine runs in a process of its own, and only one of
them works at a time. The peer first shows which of its own settings is its best for each test (threads, flash
attention); then both run in pairs, in random order, and the median of the ratios within pairs is the result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewise.core.errors import collect_notices
from edgewise.core.report import Quantity, Report, Table
from edgewise.formats.cache import file_sha256, write_aside
from edgewise.formats.sources import resolve
from edgewise.measure.machine import probe, usable_cores
from edgewise.measure.repeat import Comparison, compare
from edgewise.report import render

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Test:
    """count tokens are read (prefill) or generated (decode) after `depth` tokens of context."""

    name: str
    what: str
    count: int
    depth: int = 0


TESTS = {test.name: test for test in (
    Test("pp512", "prefill", 512), Test("tg128", "decode", 128),
    Test("pp2048", "prefill", 2048), Test("tg64@4096", "decode", 64, 4096), Test("pp512@4096", "prefill", 512, 4096))}


class Worker:
    """A process that times one engine. seconds(test) asks for one run."""

    def __init__(self, python: str, script: str, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True)
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"{self.settings}: the worker ended with status {self._process.wait()}")

    def seconds(self, test: Test) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"what": test.what, "count": test.count, "depth": test.depth}) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def best_of(workers: list[Worker], test: Test, runs: int) -> Worker:
    """The peer's best setting for a test: least median of a few runs, one run of each in turn."""
    seconds: dict[int, list[float]] = {i: [] for i in range(len(workers))}
    for _ in range(runs):
        for i in random.Random(0).sample(range(len(workers)), len(workers)):
            seconds[i].append(workers[i].seconds(test))
    return workers[min(seconds, key=lambda i: statistics.median(seconds[i]))]


def pair(ours: Worker, peer: Worker, test: Test, pairs: int) -> Comparison:
    """Seconds of the peer over ours: above 1 when edgewise is faster."""
    measure: Callable[[Callable[[], Any]], float] = lambda run: run()  # noqa: E731  # a worker times itself
    return compare(lambda: peer.seconds(test), lambda: ours.seconds(test), pairs=pairs, warmup=1, measure=measure)


def commit() -> str:
    found = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a GGUF file, or a source that is one")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=usable_cores().usable)
    parser.add_argument("--tests", default="pp512,tg128", help=f"of {', '.join(TESTS)}")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tests = [TESTS[name] for name in options.tests.split(",")]
    path = resolve(options.model)
    context = max(test.depth + test.count for test in tests) + 64
    if "OPENBLAS_NUM_THREADS" not in os.environ:
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's own threads have no work here

    with collect_notices() as notices:
        machine = probe()
    ours = Worker(sys.executable, "worker_edgewise.py",
                  {"model": str(path), "threads": options.threads, "context": context})
    settings = itertools.product(sorted({1, options.threads}), (False, True))
    peers = [Worker(options.peer_python, "worker_llama_cpp.py",
                    {"model": str(path), "threads": threads, "flash_attn": flash, "context": context})
             for threads, flash in settings]
    bandwidth = machine.report[f"memory read, {options.threads} thread{'s' if options.threads > 1 else ''}"]
    rows, quantities = [], list(machine.report.quantities)
    try:
        for test in tests:
            peer = best_of(peers, test, 3)
            result = pair(ours, peer, test, options.pairs)
            speed = [test.count / sample.median for sample in (result.second, result.first)]
            low, high = result.interval or (min(result.ratios), max(result.ratios))
            flash = "on" if peer.settings["flash_attn"] else "off"
            rows.append((test.name, round(speed[0], 1), round(speed[1], 1), round(result.ratio, 3), round(low, 3),
                         round(high, 3), f"{peer.settings['threads']} threads, flash attention {flash}"))
            quantities += [Quantity(f"{test.name} edgewise", speed[0], "token/s"),
                           Quantity(f"{test.name} peer", speed[1], "token/s"),
                           Quantity(f"{test.name} ratio", result.ratio, "", (low, high))]
            if test.what == "decode" and not test.depth and isinstance(bandwidth, (int, float)):
                share = speed[0] * path.stat().st_size / bandwidth
                quantities.append(Quantity(f"{test.name} share of read bandwidth", share))
            print(rows[-1], flush=True)
    finally:
        for worker in (ours, *peers):
            worker.close()
    columns = ("test", "edgewise", "llama.cpp", "ratio", "ratio low", "ratio high", "llama.cpp at its best")
    report = Report(
        f"{path.name}: edgewise and llama-cpp-python",
        tuple(quantities),
        (Table("Tokens per second, medians of paired runs", columns, tuple(rows),
               ("", "token/s", "token/s", *[""] * 4)),),
        environment={
            **machine.report.environment, "model": path.name, "model sha256": file_sha256(path), "commit": commit(),
            "command": " ".join(["python", "benchmarks/llm.py", f"--model {options.model}", f"--pairs {options.pairs}",
                                 f"--tests {options.tests}"]),
            "peer": f"llama-cpp-python {peers[0].about['version']}, built from its source package, "
                    "n_batch 512, n_ubatch 512",
            "edgewise": ours.about, "pairs": options.pairs},
        notices=tuple(notices))
    print(render(report, "markdown"))
    if options.out:
        with write_aside(options.out) as file:
            file.write((json.dumps(report.to_json(), indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
