"""At equal bytes: what `fit` makes of a float model beside what llama.cpp's quantiser makes of the same F16 file.

    python benchmarks/allocation.py --model smollm2 --peer-python PATH --out docs/results/allocation.json
    python benchmarks/allocation.py --model small --peer-python PATH --out docs/results/allocation.json

    smollm2  SmolLM2-135M-Instruct off the grid that its wheel holds (compress.reference): rows of 576 values, which
             K-quants cannot hold, so that llama.cpp falls back to other types
    small    a Llama trained on the offline text (train.small_llama): rows of 256 and 768, which they can

Q4_0 and Q4_1 are uniform (`pure`), embedding included; Q3_K_M and Q4_K_M are mixtures of llama.cpp's choice. `fit` gets
the bytes of all tensors of the other's file as its budget, calibrates on Wikipedia pages, and never sees the text that
is measured on, the first windows of lee_background. Every file runs in this engine on the same inputs, a file as it
runs (8-bit inputs) and on float inputs, which leaves what the weights alone cost. KL(float reference || file) in nats,
with its standard error over positions; the difference is of paired positions. A row that is there already is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from workers import commit, publish

from edgewise.compress.reference import off_the_grid
from edgewise.core.budget import Budget
from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import collect_notices
from edgewise.core.report import Quantity, Report, Table
from edgewise.data.texts import text
from edgewise.data.tokenizer import tokenizer_of
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import model_of
from edgewise.fit import fit
from edgewise.fit.candidates import items_of
from edgewise.fit.search import other_bytes
from edgewise.fit.sensitivity import kl_rows
from edgewise.formats.gguf import read_gguf, write_gguf
from edgewise.formats.sources import open_checkpoint
from edgewise.measure.machine import usable_cores

Float32 = NDArray[np.float32]
TYPES = {"Q4_0": (2, True), "Q4_1": (3, True), "Q3_K_M": (12, False), "Q4_K_M": (15, False)}
"""llama.cpp's file types: their number, and whether every matrix takes the type itself."""
CALIBRATION, EVALUATION = "wikipedia_pages/calibration", "lee_background"
POSITIONS = 3072
COLUMNS = ("model", "beside", "bytes of the peer", "bytes of fit", "bits of fit", "KL of the peer", "KL of fit",
           "difference", "its 95 % interval, low", "high", "KL of the peer, float inputs", "KL of fit, float inputs",
           "perplexity of the source", "of the peer", "of fit", "method", "predicted KL", "fit took, s")
_QUANTISE = """
import ctypes, json, sys, llama_cpp
source, target, number, pure = json.loads(sys.argv[1])
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype, settings.pure, settings.nthread = number, pure, 2
status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings))
print(json.dumps([status, llama_cpp.__version__]))
"""


def reference_of(name: str) -> Checkpoint:
    """The float model."""
    if name == "smollm2":
        return off_the_grid(open_checkpoint("smollm2"))
    from edgewise.train.small_llama import SmallLlama, small_llama

    trained = small_llama(SmallLlama(hidden=256, layers=6, heads=4, kv_heads=2, width=768, context=128, steps=300,
                                     batch=8))
    return off_the_grid(trained, spread=0)  # in half precision, and otherwise as it is


def peer_file(source: Path, kind: str, python: str) -> tuple[Path, str]:
    """What llama.cpp makes of an F16 file, and its version."""
    target = source.with_name(f"{source.stem}-{kind}.gguf")
    number, pure = TYPES[kind]
    done = subprocess.run([python, "-c", _QUANTISE, json.dumps([str(source), str(target), number, pure])],
                          capture_output=True, text=True, check=True)
    status, version = json.loads(done.stdout.strip().splitlines()[-1])
    if status:
        raise SystemExit(f"llama.cpp refused to make {target}: {done.stderr[-500:]}")
    return target, str(version)


def windows_of(checkpoint: Checkpoint) -> NDArray[np.int32]:
    """The first windows of the evaluation text."""
    length = min(512, plan_of(checkpoint).context)
    ids = tokenizer_of(checkpoint).encode(text(EVALUATION).content, add_special=False)
    return np.asarray(ids[:POSITIONS // length * length], np.int32).reshape(-1, length)


def logits_of(checkpoint: Checkpoint, windows: NDArray[np.int32], activations: str | None,
              threads: int) -> list[Float32]:
    model = model_of(checkpoint, threads=threads, context=windows.shape[1], kv="fp32", cache=False,
                     activations=activations)  # type: ignore[arg-type]
    return [model.forward(ids) for ids in windows]


def distances(source: list[Float32], other: list[Float32]) -> NDArray[np.float64]:
    return np.concatenate([kl_rows(a, b) for a, b in zip(source, other, strict=True)])


def perplexity(logits: list[Float32], windows: NDArray[np.int32]) -> float:
    losses = []
    for rows, ids in zip(logits, windows, strict=True):
        top = rows.max(axis=-1)
        total = top + np.log(np.exp(rows - top[:, None]).sum(axis=-1, dtype=np.float64))
        losses.append(total[:-1] - rows[np.arange(len(ids) - 1), ids[1:]])
    return math.exp(float(np.concatenate(losses).mean()))


def row_of(name: str, kind: str, reference: Checkpoint, file: Path, search: str,
           threads: int) -> tuple[Any, ...]:
    """One line of the table."""
    peer = read_gguf(file)
    matrices = sum(item.stored_bytes for item in items_of(plan_of(reference)))
    beside = other_bytes(reference) - (reference.nbytes - matrices)  # tokenizer and the like count for neither
    with collect_notices():
        result = fit(reference, Budget(storage_bytes=peer.nbytes + beside), text_from=CALIBRATION, threads=threads,
                     search=search)  # type: ignore[arg-type]
    made = result.checkpoint
    if made.nbytes > peer.nbytes:
        raise SystemExit(f"{name}, {kind}: fit took {made.nbytes} bytes of {peer.nbytes}")
    windows = windows_of(reference)
    exact = logits_of(reference, windows, None, threads)
    found, perplexities = [], [perplexity(exact, windows)]
    for activations in (None, "float32"):
        for checkpoint in (peer, made):
            logits = logits_of(checkpoint, windows, activations, threads)
            found.append(distances(exact, logits))
            if activations is None:
                perplexities.append(perplexity(logits, windows))
    gap = found[1] - found[0]
    middle, error = float(gap.mean()), float(gap.std() / math.sqrt(len(gap)))
    kls = [float(each.mean()) for each in found]
    parameters = sum(item.parameters for item in items_of(plan_of(reference)))
    predicted = -math.log(float(result.report["quality predicted"]))  # type: ignore[arg-type]
    return (name, kind, peer.nbytes, made.nbytes, round(8 * made.nbytes / parameters, 3), kls[0], kls[1], middle,
            middle - 1.96 * error, middle + 1.96 * error, kls[2], kls[3], *perplexities,
            str(result.report["method"]).partition(":")[0], predicted, round(float(result.report["all_s"]), 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "small"), default="smollm2")
    parser.add_argument("--types", default=",".join(TYPES), help="file types of llama.cpp")
    parser.add_argument("--search", choices=("quick", "full"), default="quick")
    parser.add_argument("--threads", type=int, default=usable_cores().usable)
    parser.add_argument("--peer-python", required=True, help="an interpreter with llama-cpp-python")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    before = Report.from_json(json.loads(options.out.read_text())) if options.out and options.out.exists() else None
    rows = list(before.tables[0].rows) if before is not None else []
    quantities = {q.name: q for q in before.quantities} if before is not None else {}
    reference = reference_of(options.model)
    for kind in options.types.split(","):
        if any(row[:2] == (options.model, kind) for row in rows):
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / f"{options.model}.gguf"
            write_gguf(reference, source, "keep")
            file, version = peer_file(source, kind, options.peer_python)
            rows.append(row_of(options.model, kind, reference, file, options.search, options.threads))
        quantities |= {q.name: q for q in (
            Quantity("llama-cpp-python", version), Quantity("search", options.search),
            Quantity("calibration text", f"{CALIBRATION}, SHA-256 {text(CALIBRATION).sha256}"),
            Quantity("evaluation text", f"{EVALUATION}, SHA-256 {text(EVALUATION).sha256}"),
            Quantity("positions", POSITIONS))}
        order = [(model, each) for model in ("smollm2", "small") for each in TYPES]
        rows.sort(key=lambda row: order.index((row[0], row[1])))
        publish(Report("Allocation at equal bytes", tuple(quantities.values()), (Table(
            "KL to the float reference", COLUMNS, tuple(rows)),), environment={
                "commit": commit(), "processor": platform.processor() or platform.machine(),
                "cores": usable_cores().usable, "python": platform.python_version()}), options.out)


if __name__ == "__main__":
    main()
