"""Speed of an encoder in edgewise beside torch, ONNX Runtime and OpenVINO, in one interleaved run.

    python benchmarks/encoders.py [--model minilm] [--tokens 128] [--batches 1,8] [--pairs 21] [--out FILE.json]

Needs what the extras torch and encoders bring. Each runtime works in a process of its own, and only one of them at a
time. ONNX Runtime first shows which of its graphs is its fastest for each batch
(see encoder_graphs.py); OpenVINO reads the export, in float32 and as it chooses by itself. Then all run in rounds, in
random order, and the median of the ratios within rounds is the result. A run is the median of several calls after one
that is not counted. Texts are real; embeddings are compared with torch's by their cosine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from workers import HERE, Process, commit, publish

from edgewise.core.errors import collect_notices
from edgewise.core.report import Quantity, Report, Table
from edgewise.data.texts import text
from edgewise.data.tokenizer import tokenizer_of
from edgewise.formats.cache import file_sha256
from edgewise.formats.sources import open_checkpoint, resolve
from edgewise.measure.machine import probe, usable_cores
from edgewise.measure.repeat import Comparison, rounds

FORMATS = {"fp32": "fp32", "bf16": "bf16", "int8": "int8/g32/fp16"}
"""Short names of the formats that edgewise runs in."""
CALLS = {1: 7, 8: 2}
"""Calls of one run, by batch; other batches take three."""
WANTED = (("fp32", "onnxruntime fp32", 1.05), ("fp32", "openvino fp32", 0.95), ("bf16", "openvino default", 1.0),
          ("int8", "onnxruntime int8", 1.4))
"""edgewise's format, the peer it is held against, and how many times as fast it is required to be."""


class Worker(Process):
    """A process that runs one runtime."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(sys.executable, "worker_encoder.py", settings, OMP_NUM_THREADS=str(settings["threads"]),
                         OPENBLAS_NUM_THREADS="1")

    def seconds(self, batch: int) -> float:
        return float(self.ask(what="time", batch=batch, calls=CALLS.get(batch, 3))["seconds"])

    def embeddings(self, batch: int) -> Any:
        return np.array(self.ask(what="embeddings", batch=batch)["embeddings"])


@contextmanager
def working(settings: Mapping[str, Any]) -> Iterator[Worker]:
    worker = Worker(settings)
    try:
        yield worker
    finally:
        worker.close()


def fastest(workers: Mapping[str, Worker], batch: int, runs: int = 3) -> str:
    """The one of least median, one run of each in turn."""
    calls = {name: partial(worker.seconds, batch) for name, worker in workers.items()}
    found = rounds(calls, warmup=1, repeats=runs, measure=lambda run: run())
    return min(found, key=lambda name: found[name].median)


def cosine(found: Any, expected: Any) -> float:
    """The least of any text."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(axis=1) / lengths).min())


def texts_of(model: str, count: int, tokens: int) -> tuple[Any, str]:
    """(count, tokens) ids of news articles, whole ones one after the other, each row with its special tokens."""
    tokenizer, source = tokenizer_of(open_checkpoint(model)), text("lee_background")
    articles = source.content.splitlines()
    per_row = len(articles) // count
    rows = [tokenizer.encode(" ".join(articles[i * per_row:(i + 1) * per_row])) for i in range(count)]
    return np.array([[*row[:tokens - 1], row[-1]] for row in rows], np.int64), source.sha256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="a folder with a BERT encoder, or a source that is one")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--threads", type=int, default=usable_cores().usable)
    parser.add_argument("--pairs", type=int, default=21, help="rounds that count")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    batches = [int(part) for part in options.batches.split(",")]
    with collect_notices() as notices:
        machine = probe()
        model = str(resolve(options.model))
        ids, text_sha256 = texts_of(model, max(batches), options.tokens)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_workers:
        np.save(Path(folder) / "ids.npy", ids)
        made = subprocess.run([sys.executable, str(HERE / "encoder_graphs.py"), model, folder], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        graphs = json.loads(made.stdout.splitlines()[-1])
        common = {"model": model, "threads": options.threads, "tokens": options.tokens, "batches": batches,
                  "ids": str(Path(folder) / "ids.npy")}

        def worker(runtime: str, graph: str | None = None, **settings: Any) -> Worker:
            path = {} if graph is None else {"graph": str(Path(folder) / f"{graph}.onnx")}
            return open_workers.enter_context(working({**common, "runtime": runtime, **path, **settings}))

        fixed = {f"edgewise {name}": worker("edgewise", format=form) for name, form in FORMATS.items()}
        fixed["torch"] = worker("torch")
        fixed["openvino fp32"] = worker("openvino", "export", config={"INFERENCE_PRECISION_HINT": "f32"})
        fixed["openvino default"] = worker("openvino", "export", config={})
        choices = {f"onnxruntime {kind}": {graph: worker("onnxruntime", graph) for graph in graphs[of]}
                   for kind, of in (("fp32", "float"), ("int8", "int8"))}

        rows: list[tuple[Any, ...]] = []
        ratios: list[tuple[Any, ...]] = []
        quantities = list(machine.report.quantities)
        for batch in batches:
            chosen = {name: fastest(workers, batch) for name, workers in choices.items()}
            workers = {**fixed, **{name: choices[name][graph] for name, graph in chosen.items()}}
            exact = workers["torch"].embeddings(batch)
            found = rounds({name: partial(one.seconds, batch) for name, one in workers.items()}, warmup=1,
                           repeats=options.pairs, measure=lambda run: run())
            for name, sample in found.items():
                low, high = sample.interval or (min(sample.values), max(sample.values))
                milliseconds = (round(seconds * 1e3, 3) for seconds in (sample.median, low, high))
                rows.append((batch, name, chosen.get(name, ""), *milliseconds,
                             round(cosine(workers[name].embeddings(batch), exact), 6)))
                print(rows[-1], flush=True)
            wanted = {(ours, peer): least for ours, peer, least in WANTED}
            for ours in FORMATS:
                for peer in (name for name in workers if not name.startswith("edgewise")):
                    result = Comparison(found[peer], found[f"edgewise {ours}"])
                    low, high = result.interval or (min(result.ratios), max(result.ratios))
                    least = wanted.get((ours, peer))
                    if least is None and peer != "torch":
                        continue
                    ratios.append((batch, f"edgewise {ours}", peer, round(result.ratio, 3), round(low, 3),
                                   round(high, 3), "" if least is None else least))
                    quantities.append(Quantity(f"batch {batch}, {ours} over {peer}", result.ratio, "", (low, high)))
                    print(ratios[-1], flush=True)
        versions = {name: one.about for name, one in fixed.items()}
        versions["onnxruntime"] = next(iter(choices["onnxruntime fp32"].values())).about
    report = Report(
        f"{options.model}, {options.tokens} tokens, {options.threads} threads: edgewise, torch, ONNX Runtime, OpenVINO",
        tuple(quantities), (
            Table("Medians of interleaved rounds; cosine of embeddings to torch's, the least of any text",
                  ("batch", "runtime", "graph", "median", "low", "high", "cosine"), tuple(rows),
                  ("", "", "", "ms", "ms", "ms", "")),
            Table("Times as fast, within rounds", ("batch", "edgewise", "peer", "ratio", "low", "high", "required"),
                  tuple(ratios))),
        environment={
            **machine.report.environment, "model sha256": file_sha256(Path(model) / "model.safetensors"),
            "commit": commit(), "threads": options.threads, "text": "lee_background", "text sha256": text_sha256,
            "command": f"python benchmarks/encoders.py --model {options.model} --tokens {options.tokens} "
                       f"--batches {options.batches} --pairs {options.pairs}",
            "formats": FORMATS, "versions": versions, "pairs": options.pairs,
            "calls of a run": {batch: CALLS.get(batch, 3) for batch in batches}},
        notices=tuple(notices))
    publish(report, options.out)


if __name__ == "__main__":
    main()
