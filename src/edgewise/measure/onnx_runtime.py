"""Seconds and memory of ONNX files in ONNX Runtime's CPU provider."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import EdgewiseError, require
from edgewise.measure.memory import run_child
from edgewise.measure.repeat import Sample, rounds

__all__ = ["onnx_peak_bytes", "onnx_runner", "onnx_seconds"]

# What the runtime itself takes is there before the peak is set back.
_CHILD = """
import json, sys
import numpy
import onnxruntime
def field(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = field("VmRSS")
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
pictures = numpy.zeros(json.loads(sys.argv[2]), numpy.float32)
for _ in range(3):
    session.run(None, {session.get_inputs()[0].name: pictures})
print(field("VmHWM") - before)
"""


def onnx_runner(path: str | Path, *, threads: int = 1) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """The file as a function of its one input, (batch, ...) -> (batch, ...)."""
    runtime = require("onnxruntime", extra="onnx", purpose="running an ONNX file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session: Any = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda values: np.asarray(session.run(None, {name: values})[0], np.float32)


def onnx_seconds(paths: Mapping[str, str | Path], example: NDArray[np.float32], *, threads: int = 1,
                 repeats: int = 15, calls: int = 1) -> dict[str, Sample]:
    """Seconds of `calls` runs of each file on the same input, interleaved round by round."""
    runners = {name: onnx_runner(path, threads=threads) for name, path in paths.items()}

    def several(run: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Callable[[], None]:
        def call() -> None:
            for _ in range(calls):
                run(example)
        return call

    return rounds({name: several(run) for name, run in runners.items()}, warmup=2, repeats=repeats)


def onnx_peak_bytes(path: str | Path, shape: tuple[int, ...]) -> int:
    """The most memory that opening and running the file takes on top of the runtime, in a process of its own. Linux."""
    require("onnxruntime", extra="onnx", purpose="running an ONNX file")
    done = run_child([sys.executable, "-I", "-c", _CHILD, str(path), json.dumps(list(shape))])
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise EdgewiseError(f"{path}: ONNX Runtime did not run it: {last[0]}")
    return int(done.stdout)
