"""From the start of a process to its first token: edgewise beside llama-cpp-python on the same GGUF file and prompt.

    python benchmarks/start.py --peer-python PEER/bin/python [--files keep,Q4_0,Q8_0] [--pairs 15] [--out OUT.json]

PEER: see llm.py. Each run is a new process that imports its engine, loads the file, reads one user message through the
model's chat template and samples one token; the clock runs from before the process is started until its answer
arrives. Runs come in pairs, in random order, and the median of the ratios within pairs is the result. Settings:

    warm        the model file, and what edgewise packed of it earlier, lie in the page cache
    cold        both have been dropped from the page cache before each run (posix_fadvise DONTNEED)
    first ever  cold, and edgewise's cache directory is empty: it hashes, packs and writes the weights

Both engines are byte-compiled first, as they are when pip installs them: from a source tree, an interpreter that is
told to write no bytecode would compile edgewise again in every run.
"""

from __future__ import annotations

import argparse
import compileall
import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from files import model_file
from llm import block_type
from workers import HERE, commit, publish

import edgewise
from edgewise.core.report import Quantity, Report, Table
from edgewise.formats.cache import cache_root, file_sha256
from edgewise.measure.cores import usable_cores
from edgewise.measure.repeat import compare

SETTINGS = ("warm", "cold", "first ever")
COLUMNS = ("file", "setting", "edgewise", "llama.cpp", "ratio", "ratio low", "ratio high")
UNITS = ("", "", "s", "s", "", "", "")
PROMPT = "Write a short note about how leaves turn sunlight into sugar."


def start(python: str, script: str, settings: dict[str, Any],
          environment: dict[str, str]) -> tuple[float, dict[str, Any]]:
    """Seconds until the process has its first token, and what it says of it."""
    started = time.perf_counter()
    process = subprocess.Popen([python, str(HERE / script), json.dumps(settings)], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('{"token"'):
            seconds = time.perf_counter() - started
            process.stdout.close()
            process.wait()
            return seconds, dict(json.loads(line))
    raise SystemExit(f"{script} ended with status {process.wait()} and without a token")


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(path: Path) -> float:
    """The share of a file that lies in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as region:
        view = np.frombuffer(region, np.uint8)
        pages = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view)), ctypes.c_void_p(pages.ctypes.data))
        del view
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        return float((pages & 1).mean())


def packed_files() -> list[Path]:
    return sorted((cache_root() / "packed").glob("*.bin"))


def measured(path: Path, setting: str, options: argparse.Namespace) -> tuple[tuple[Any, ...], list[Quantity]]:
    """Pairs of one file in one setting: a row of the table, and the quantities behind it."""
    settings = {"model": str(path), "threads": options.threads, "context": 2048, "prompt": PROMPT}
    said: dict[str, dict[str, Any]] = {}
    left: list[float] = []

    def prepare() -> None:
        if setting != "warm":
            for file in (path, *packed_files()):
                drop(file)
            left.append(resident(path))

    def edgewise() -> float:
        with ExitStack() as stack:
            environment = dict(os.environ)
            if setting == "first ever":
                environment["XDG_CACHE_HOME"] = stack.enter_context(tempfile.TemporaryDirectory(dir=cache_root()))
            prepare()
            seconds, said["edgewise"] = start(sys.executable, "start_edgewise.py", settings, environment)
            return seconds

    def peer(flash: bool) -> float:
        prepare()
        seconds, said["peer"] = start(options.peer_python, "start_llama_cpp.py", {**settings, "flash_attn": flash},
                                      dict(os.environ))
        return seconds

    edgewise()  # what is packed once lies there for all
    flash = min((False, True), key=lambda on: min(peer(on) for _ in range(3)))
    measure: Callable[[Callable[[], Any]], float] = lambda run: run()  # noqa: E731  # a run times itself
    result = compare(edgewise, lambda: peer(flash), pairs=options.pairs, warmup=1, measure=measure)
    low, high = result.interval or (min(result.ratios), max(result.ratios))
    name = f"{block_type(path)}, {setting}:"
    row = (block_type(path), setting, round(result.first.median, 3), round(result.second.median, 3),
           round(result.ratio, 3), round(low, 3), round(high, 3))
    quantities = [result.first.quantity(f"{name} edgewise"), result.second.quantity(f"{name} peer"),
                  Quantity(f"{name} ratio", result.ratio, "", (low, high)),
                  Quantity(f"{name} prompt tokens", said["edgewise"]["prompt_tokens"]),
                  Quantity(f"{name} peer's prompt tokens", said["peer"]["prompt_tokens"])]
    if left:
        quantities.append(Quantity(f"{name} most of the model file still in the page cache before a run", max(left)))
    return row, quantities


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a GGUF file, or a source that is one")
    parser.add_argument("--files", default="keep", help="block types that the model is converted to first; keep takes "
                        "the file as it is")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=usable_cores().usable)
    parser.add_argument("--settings", default=",".join(SETTINGS), help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    compileall.compile_dir(Path(edgewise.__file__).parent, quiet=1)
    compiled = "import compileall, os, llama_cpp; compileall.compile_dir(os.path.dirname(llama_cpp.__file__), quiet=1)"
    subprocess.run([options.peer_python, "-c", compiled], check=True)
    rows: list[tuple[Any, ...]] = []
    quantities: list[Quantity] = []
    files = [model_file(options.model, kind) for kind in options.files.split(",")]
    for path in files:
        for setting in options.settings.split(","):
            row, found = measured(path, setting, options)
            rows.append(row)
            quantities += found
            print(row, flush=True)
    version = subprocess.run([options.peer_python, "-c", "import llama_cpp; print(llama_cpp.__version__)"],
                             capture_output=True, text=True, check=True).stdout.strip()
    report = Report(
        "From process start to first token: edgewise and llama-cpp-python", tuple(quantities),
        (Table("Seconds, medians of paired runs; a ratio below 1 is edgewise ahead", COLUMNS, tuple(rows), UNITS),),
        environment={"commit": commit(), "peer": f"llama-cpp-python {version}, built from its source package",
                     "threads": options.threads, "context": 2048, "prompt": PROMPT, "pairs": options.pairs,
                     "files": {path.name: file_sha256(path) for path in files},
                     "peer's flash attention": "the better of on and off",
                     "bytecode": "of both engines compiled beforehand, as pip does",
                     "settings": {"warm": "everything in the page cache",
                                  "cold": "model file and packed weights dropped by posix_fadvise DONTNEED",
                                  "first ever": "cold, and edgewise with an empty cache directory"},
                     "command": f"python benchmarks/start.py --model {options.model} --files {options.files} "
                                f"--pairs {options.pairs} --threads {options.threads}"})
    publish(report, options.out)


if __name__ == "__main__":
    main()
