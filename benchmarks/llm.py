"""Speed of edgewise beside llama-cpp-python on the same GGUF files, interleaved.

    python benchmarks/llm.py --peer-python PEER/bin/python [--model FILE] [--pairs 15] [--out docs/results/llm]
    python benchmarks/llm.py --peer-python PEER/bin/python --files keep,Q4_0,Q8_0 --threads 1,2 --out docs/results/llm
    python benchmarks/llm.py --peer-python PEER/bin/python --model random:1b --out docs/results/llm-1b

PEER is an environment with llama-cpp-python built from its source package on this machine
(`pip install --no-binary llama-cpp-python llama-cpp-python`). Each engine runs in a process of its own, and only one of
them works at a time. The peer first shows which of its own settings is its best for each test (up to as many threads
as edgewise has, flash attention on and off); then both run in pairs, in random order, and the median of the ratios
within pairs is the result. Each file has a report of its own, OUT-<block type>.json.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files import model_file
from workers import Process, commit, publish

from edgewise.core.errors import collect_notices
from edgewise.core.report import Quantity, Report, Table
from edgewise.formats.cache import file_sha256
from edgewise.measure.machine import Probe, probe, usable_cores
from edgewise.measure.repeat import Comparison, compare
from edgewise.native.probe import read_rates

COLUMNS = ("threads", "test", "edgewise", "llama.cpp", "ratio", "ratio low", "ratio high", "llama.cpp at its best")
UNITS = ("", "", "token/s", "token/s", "", "", "", "")


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


class Worker(Process):
    """A process that times one engine. seconds(test) asks for one run."""

    def seconds(self, test: Test) -> float:
        return float(self.ask(what=test.what, count=test.count, depth=test.depth)["seconds"])


def best_of(workers: list[Worker], test: Test, runs: int) -> Worker:
    """The peer's best setting for a test: least median of a few runs, one run of each in turn.

    A setting whose first run takes half as long again as the best first run is not asked again.
    """
    seconds = [[worker.seconds(test)] for worker in workers]
    limit = 1.5 * min(first for (first,) in seconds)
    left = [i for i, (first,) in enumerate(seconds) if first <= limit]
    order = random.Random(0)
    for _ in range(runs - 1 if len(left) > 1 else 0):
        for i in order.sample(left, len(left)):
            seconds[i].append(workers[i].seconds(test))
    return workers[min(left, key=lambda i: statistics.median(seconds[i]))]


def pair(ours: Worker, peer: Worker, test: Test, pairs: int, before: Callable[[], object]) -> Comparison:
    """Seconds of the peer over ours: above 1 when edgewise is faster. before: called before each of our runs."""
    measure: Callable[[Callable[[], Any]], float] = lambda run: run()  # noqa: E731  # a worker times itself

    def own() -> float:
        before()
        return ours.seconds(test)

    return compare(lambda: peer.seconds(test), own, pairs=pairs, warmup=1, measure=measure)


def peer_environment(about: dict[str, Any]) -> dict[str, Any]:
    """What a report says of the other engine."""
    return {"peer": f"llama-cpp-python {about['version']}, built from its source package, n_batch 512, n_ubatch 512",
            "peer's ggml": about["ggml"], "peer's features": about["features"]}


def block_type(path: Path) -> str:
    """The type in a GGUF file's name, else its stem."""
    found = re.search(r"(?:^|[.-])(I?Q\d\w*|MXFP4|BF16|F16|F32)$", path.stem, re.IGNORECASE)
    return found[1].lower() if found else path.stem


def run(path: Path, counts: list[int], tests: list[Test], options: argparse.Namespace, machine: Probe) -> Report:
    """One file: every test at every thread count, edgewise beside the peer at its best."""
    context = max(test.depth + test.count for test in tests) + 64
    model = str(path)
    ours = {n: Worker(sys.executable, "worker_edgewise.py", {"model": model, "threads": n, "context": context})
            for n in counts}
    peers = [Worker(options.peer_python, "worker_llama_cpp.py",
                    {"model": model, "threads": n, "flash_attn": flash, "context": context})
             for n, flash in itertools.product(sorted({1, *counts}), (False, True))]
    rows, quantities = [], list(machine.report.quantities)
    try:
        for n, test in itertools.product(counts, tests):
            peer = best_of([worker for worker in peers if worker.settings["threads"] <= n], test, 3)
            # Neighbours move what memory gives within seconds, so it is probed beside every run.
            decode, roof = test.what == "decode" and not test.depth, []
            result = pair(ours[n], peer, test, options.pairs,
                          (lambda n=n, roof=roof: roof.append(max(read_rates(2**28, n, repeats=3)))) if decode
                          else (lambda: None))
            speed = [test.count / sample.median for sample in (result.second, result.first)]
            low, high = result.interval or (min(result.ratios), max(result.ratios))
            flash = "on" if peer.settings["flash_attn"] else "off"
            rows.append((n, test.name, round(speed[0], 1), round(speed[1], 1), round(result.ratio, 3), round(low, 3),
                         round(high, 3), f"{threads_of(peer.settings['threads'])}, flash attention {flash}"))
            name = test.name if len(counts) == 1 else f"{test.name}, {threads_of(n)}:"
            quantities += [Quantity(f"{name} edgewise", speed[0], "token/s"),
                           Quantity(f"{name} peer", speed[1], "token/s"),
                           Quantity(f"{name} ratio", result.ratio, "", (low, high))]
            if decode:
                bandwidth = statistics.median(roof)
                quantities += [Quantity(f"{name} memory read beside it", bandwidth, "B/s"),
                               Quantity(f"{name} share of read bandwidth", speed[0] * path.stat().st_size / bandwidth)]
            print(path.name, rows[-1], flush=True)
    finally:
        for worker in (*ours.values(), *peers):
            worker.close()
    command = ["python", "benchmarks/llm.py", f"--model {options.model}", f"--files {options.files}",
               f"--threads {options.threads}", f"--pairs {options.pairs}", f"--tests {options.tests}"]
    return Report(
        f"{path.name}: edgewise and llama-cpp-python",
        tuple(quantities), (Table("Tokens per second, medians of paired runs", COLUMNS, tuple(rows), UNITS),),
        environment={
            **machine.report.environment, "model": path.name, "model sha256": file_sha256(path), "commit": commit(),
            "command": " ".join(command), **peer_environment(peers[0].about), "edgewise": ours[counts[0]].about,
            "pairs": options.pairs})


def threads_of(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a GGUF file, a source that is one, or random:1b")
    parser.add_argument("--files", default="keep", help="block types that the model is converted to first; keep takes "
                        "the file as it is")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", default=str(usable_cores().usable), help="one or more counts, such as 1,2")
    parser.add_argument("--tests", default="pp512,tg128", help=f"of {', '.join(TESTS)}")
    parser.add_argument("--out", type=Path, help="start of the names of the reports")
    options = parser.parse_args()
    tests = [TESTS[name] for name in options.tests.split(",")]
    counts = [int(count) for count in str(options.threads).split(",")]
    files = [model_file(options.model, kind) for kind in options.files.split(",")]
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's own threads have no work here

    with collect_notices() as notices:
        machine = probe()
    for path in files:
        report = run(path, counts, tests, options, machine).with_notices(notices)
        publish(report, options.out and options.out.with_name(f"{options.out.name}-{block_type(path)}.json"))


if __name__ == "__main__":
    main()
