"""What edgewise exports, loaded by others: the same text through both, and how far their predictions are apart.

    python benchmarks/interchange.py --peer-python PEER/bin/python [--model smollm2] [--out OUT.json]

PEER: an environment with llama-cpp-python (see llm.py); transformers and compressed-tensors are of this one.
GGUF files are read by llama.cpp, folders in the layout of compressed-tensors by transformers. Each reads the first
windows of the evaluation text; edgewise reads its own export once with its inputs rounded to 8 bits, as it runs, and
once with float32 inputs, which shows what the formats alone change: nothing, up to float rounding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from workers import Process, commit, publish

import edgewise
from edgewise.core.report import Quantity, Report, Table
from edgewise.data.texts import text
from edgewise.data.tokenizer import tokenizer_of
from edgewise.fit.convert import convert
from edgewise.formats.sources import open_checkpoint
from edgewise.measure.quality import divergence, perplexity

GGUF = ("F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
COMPRESSED = ("int4/g32/fp16", "int4/g64/bf16", "int8/axis/fp16", "e4m3/axis/fp16")
COLUMNS = ("export", "size", "read by", "KL float32", "KL", "same choice", "perplexity", "theirs")
UNITS = ("", "B", "", "nats", "nats", "", "", "")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*"))


class Peer:
    """A model in a process of its own: ids (n,) -> logits (n, vocab)."""

    def __init__(self, python: str, engine: str, model: Path, place: Path, context: int) -> None:
        self._rows = place / "logits.npy"
        self._process = Process(python, "worker_logits.py", {
            "engine": engine, "model": str(model), "out": str(self._rows), "context": context})
        self.about = str(self._process.about["about"])

    def __call__(self, ids: Any) -> Any:
        self._process.ask(ids=[int(i) for i in ids])
        return np.load(self._rows)

    def close(self) -> None:
        self._process.close()


def ours(path: Path, activations: str, context: int) -> Callable[[Any], Any]:
    exact = {"activations": "float32", "kv": "fp32"} if activations == "float32" else {}
    model = edgewise.load(path, context=context, **exact)
    return lambda ids: model.forward(np.asarray(ids, np.int32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    checkpoint = open_checkpoint(options.model)
    sample = text("lee_background")
    ids = np.asarray(tokenizer_of(checkpoint).encode(sample.content[:20_000]), np.int64)
    rows, about = [], {}
    exports = [(name, "llama.cpp") for name in GGUF] + [(name, "transformers") for name in COMPRESSED]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, reader in exports:
            path = place / ("model.gguf" if reader == "llama.cpp" else "model")
            if reader == "llama.cpp":
                convert(options.model, path, name, embedding="F16", overwrite=True)
            else:
                convert(options.model, path, name, embedding="F16", layout="compressed-tensors", overwrite=True)
            peer = Peer(options.peer_python if reader == "llama.cpp" else sys.executable, reader, path, place,
                        options.window)
            about[reader] = peer.about
            part: dict[str, Any] = {"window": options.window, "limit": options.windows}
            exact, running = (ours(path, kind, options.window) for kind in ("float32", "int8"))
            apart = divergence(peer, exact, ids, **part)
            rows.append((name, size_of(path), reader, apart.kl, divergence(peer, running, ids, **part).kl,
                         apart.agreement, perplexity(exact, ids, **part).value, perplexity(peer, ids, **part).value))
            peer.close()
            print(rows[-1], file=sys.stderr)
    report = Report(
        "Exports, read by others",
        (Quantity("model", options.model), Quantity("text", sample.sha256), Quantity("positions", options.windows *
                                                                                    (options.window - 1))),
        (Table("Exports", COLUMNS, tuple(rows), UNITS),),
        environment={"commit": commit(), "windows": options.windows, "window": options.window, **about})
    publish(report, options.out)


if __name__ == "__main__":
    main()
