"""Decoding with some of the inputs beside the fastest dense kernel of the same format.

    python benchmarks/rsparse.py --model smollm2 --out docs/results/rsparse-smollm2.json
    python benchmarks/rsparse.py --model random:1b --out docs/results/rsparse-1b.json

Dense and sparse are timed in rounds, each round in another random order; ratios are within rounds. Weights of the
layers are quantised by rounding to nearest (of a random model: random codes); thresholds are quantiles of what each
linear reads while the sparse model itself decodes, so that the share left unread is the one asked for; reported is
the share that the engine counted while it was timed. Prompts are timed too: weights lie input by input, once, and are
put back into rows slab by slab.

--clock processor counts the processor time of one thread, which other processes on the machine distort least.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lowbit import in_format
from numpy.typing import NDArray
from random_llama import SHAPES, random_llama
from workers import commit, publish

from edgewise.compress.quantize.rtn import quantize_layer
from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import collect_notices
from edgewise.core.numbers import QuantFormat
from edgewise.core.report import Quantity, Report, Table
from edgewise.core.storage import InputSparse, LazyTensors, Stored
from edgewise.data.texts import text
from edgewise.data.tokenizer import tokenizer_of
from edgewise.engine.archs import plan_of
from edgewise.engine.build import build_model, linears_of
from edgewise.engine.loading import default_kv, model_of, recipes_of
from edgewise.engine.model import read_share
from edgewise.engine.packing import pack_all
from edgewise.engine.plan import Linear, for_context, plan_with
from edgewise.engine.sparse import shapes_in
from edgewise.formats.sources import open_checkpoint
from edgewise.measure.cores import usable_cores
from edgewise.measure.machine import probe
from edgewise.measure.repeat import Sample
from edgewise.native import _core

FORMATS = ("int4/g32", "int4/g32/fp16/min", "int4/g64", "int8/g32")
SITES = {"attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "output": ("self_attn.o_proj",),
         "feed_forward": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)}
PROMPT, CALIBRATED, CONTEXT = 32, 48, 640
"""Tokens before what is decoded, and decoded tokens that thresholds are taken from."""


def rounded(checkpoint: Checkpoint, form: str) -> Checkpoint:
    """Real weights in a format; random ones get random codes."""
    if checkpoint.source.startswith("random"):
        return in_format(checkpoint, form)
    fmt = QuantFormat.parse(form)
    made = {name: quantize_layer(stored.dense(), fmt) for name, stored in checkpoint.tensors.items()
            if ".layers." in name and len(stored.shape) == 2 and stored.shape[1] % max(fmt.granularity.group, 1) == 0}
    return replace(checkpoint, files=(), tensors=LazyTensors({
        name: (lambda name=name: made[name] if name in made else checkpoint.tensors[name])
        for name in checkpoint.tensors}))


class Sparse:
    """A model whose thresholds change without its weights being packed anew."""

    def __init__(self, checkpoint: Checkpoint, layers: int, threads: int) -> None:
        zeros = {f"model.layers.{i}.{name}.weight" for i in range(layers) for names in SITES.values() for name in names}

        def stored(name: str) -> Stored:
            weight = checkpoint.tensors[name]
            return InputSparse(weight, np.zeros(weight.shape[1], np.float32)) if name in zeros else weight

        self.plan = for_context(plan_of(replace(checkpoint, tensors=LazyTensors({
            name: (lambda name=name: stored(name)) for name in checkpoint.tensors}))), CONTEXT)
        recipes, names = recipes_of(self.plan)
        self.packed, self.threads = pack_all(recipes, key=None), threads
        self.keys = {linear.key: names[id(linear.weight)] for linear in linears_of(self.plan)}
        self.shapes = [shapes_in(layer) for layer in self.plan.layers]

    def session(self, thresholds: Mapping[str, float]) -> Any:
        def changed(linear: Linear) -> Linear:
            weight = linear.weight
            if not isinstance(weight, InputSparse):
                return linear
            limit = np.full(weight.shape[1], thresholds.get(linear.name, 0.0), np.float32)
            return replace(linear, weight=InputSparse(weight.weight, limit))

        plan = plan_with(self.plan, changed)
        names = {id(linear.weight): self.keys[linear.key] for linear in linears_of(plan)}
        return _core.Session(build_model(plan, self.packed, names), default_kv(plan), CONTEXT, 1, self.threads, 256)


def calibrated(model: Sparse, ids: NDArray[np.int32], share: float) -> Any:
    """The session that decodes with a share of every linear's inputs unread, from what it reads once it decodes so:
    a random model has nothing that would pull it back to what a dense pass reads."""
    thresholds: dict[str, float] = {}
    for _ in range(3):
        session = model.session(thresholds)
        session.prefill(0, ids[:PROMPT])
        session.decoding = True
        session.set_capture(True)
        seen: dict[tuple[int, str], list[NDArray[np.float32]]] = {}
        for token in ids[PROMPT:PROMPT + CALIBRATED]:
            session.begin(np.array([token], np.int32), np.zeros(1, np.int32))
            for layer in range(len(model.shapes)):
                session.run_layers(layer, layer + 1)
                for site in SITES:
                    seen.setdefault((layer, site), []).append(np.abs(session.captured(site)))
        for (layer, site), values in seen.items():
            limit = float(np.quantile(np.concatenate(values), share))
            thresholds |= {f"model.layers.{layer}.{name}.weight": limit for name in SITES[site]}
    return model.session(thresholds)


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
Clock = Callable[[], float]


def decode(session: Any, ids: NDArray[np.int32], tokens: int, clock: Clock) -> float:
    """Tokens per second. The same tokens are fed to all: what a model would choose itself is no matter of speed."""
    session.truncate(0, 0)
    session.prefill(0, ids[:PROMPT])
    session.decoding = True
    session.forget_counts()
    row, slot = np.zeros(1, np.int32), np.zeros(1, np.int32)
    part = ids[PROMPT:PROMPT + tokens]
    started = clock()
    for i in range(tokens):
        session.forward(part[i:i + 1], slot)
        session.logits(row)
    seconds = clock() - started
    session.decoding = False
    return tokens / seconds


def prefill(session: Any, ids: NDArray[np.int32], tokens: int, clock: Clock) -> float:
    session.truncate(0, 0)
    started = clock()
    session.prefill(0, ids[:tokens])
    return tokens / (clock() - started)


def ratio(name: str, ours: list[float], base: list[float]) -> tuple[Quantity, tuple[float, float, float]]:
    sample = Sample(tuple(a / b for a, b in zip(ours, base, strict=True)))
    low, high = sample.interval or (min(sample.values), max(sample.values))
    return Quantity(name, sample.median, "", (low, high)), (sample.median, low, high)


def speed(options: argparse.Namespace) -> Report:
    base = random_llama(SHAPES[options.model.removeprefix("random:")]) if options.model.startswith("random:") \
        else open_checkpoint(options.model)
    layers, clock = int(base.config["num_hidden_layers"]), CLOCKS[options.clock]
    if options.clock == "processor":
        options.threads = 1
    if "tokenizer" in base.metadata:
        ids = np.asarray(tokenizer_of(base).encode(text("lee_background").content[:8000], add_special=False), np.int32)
    else:
        ids = np.random.default_rng(0).integers(300, 30_000, 1024).astype(np.int32)
    rows: list[tuple[Any, ...]] = []
    quantities: list[Quantity] = []
    for form in options.formats.split(","):
        checkpoint = rounded(base, form)
        with collect_notices():
            dense_model = model_of(checkpoint, threads=options.threads, context=CONTEXT, batch=256, cache=False)
            sparse = Sparse(checkpoint, layers, options.threads)
            models = {"dense": dense_model.session}
            for share in options.shares:
                models[f"{share:g}"] = calibrated(sparse, ids, share)
        results: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
        order = random.Random(0)
        for turn in range(options.rounds + 1):
            for name in order.sample(list(models), len(models)):
                found = decode(models[name], ids, options.tokens, clock), prefill(models[name], ids, 256, clock)
                if turn:
                    for kept, value in zip(results[name], found, strict=True):
                        kept.append(value)
        dense = results["dense"]
        for name, (decoded, read) in results.items():
            decode(models[name], ids, 32, clock)
            left = 1.0 if name == "dense" else read_share(models[name], sparse.shapes)
            packed = (dense_model if name == "dense" else sparse).packed.nbytes
            cells: list[Any] = []
            for what, own, other in (("tg", decoded, dense[0]), ("pp256", read, dense[1])):
                quantity, (middle, low, high) = ratio(f"{form}, {name}: {what} over dense", own, other)
                cells += [round(statistics.median(own), 1), round(middle, 3), f"{low:.2f} to {high:.2f}"]
                quantities.append(quantity)
            quantities.append(Quantity(f"{form}, {name}: share of the weights read", left, "share"))
            quantities.append(Quantity(f"{form}, {name}: packed weights", packed, "B"))
            rows.append((form, "dense" if name == "dense" else f"{name} unread", round(left, 3),
                         round(packed / 1e6, 1), *cells))
            print(rows[-1], flush=True)
        models.clear()
    columns = ("weights", "inputs", "share read", "packed, MB", f"tg{options.tokens}", "over dense", "interval",
               "pp256", "over dense ", "interval ")
    return Report(
        f"Input sparsity on {options.model}", tuple(quantities),
        (Table(f"Tokens per second of {options.clock} time, {options.threads} threads, {options.rounds} rounds",
               columns, tuple(rows)),),
        environment={**probe().report.environment, "model": options.model, "rounds": options.rounds, "commit": commit(),
                     "command": "python benchmarks/rsparse.py " + " ".join(sys.argv[1:])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5], help="of every linear's inputs, left unread")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=usable_cores().usable)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    publish(speed(options), options.out)


if __name__ == "__main__":
    main()
