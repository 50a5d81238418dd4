"""Products of two thin matrices beside the dense weight of the same format, and what a low-rank correction costs.

    python benchmarks/lowrank.py --model random:1b --out docs/results/lowrank-1b.json
    python benchmarks/lowrank.py --model smollm2 --formats int4/g32 --out docs/results/lowrank-smollm2.json

All are timed in rounds, each round in another random order; ratios are within rounds. Codes are random: speed does not
depend on them. "0.5 of the numbers": every linear of the layers as two factors with half of its numbers, the rank a
multiple of 32. "multiplied out": what a factored weight ran as before its two factors did, dense 16-bit floats.
"+ rank 8": the dense weight and a correction (LoRC) with factors in half precision. GB/s: of packed weights, at one
pass over them for each decoded token; roof: over what the machine reads.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lowbit import in_format, random_weight
from random_llama import SHAPES, random_llama
from rsparse import decode, prefill, ratio
from workers import commit, publish

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import collect_notices
from edgewise.core.numbers import FP16
from edgewise.core.report import Quantity, Report, Table
from edgewise.core.storage import Dense, Factored, LazyTensors, Stored, Sum
from edgewise.engine.loading import model_of
from edgewise.formats.sources import open_checkpoint
from edgewise.measure.cores import usable_cores
from edgewise.measure.machine import probe


def changed(checkpoint: Checkpoint, change: Callable[[Stored, int], Stored]) -> Checkpoint:
    """change: of a layer's matrix and its number."""
    made: dict[str, Callable[[], Stored]] = {}
    for seed, name in enumerate(checkpoint.tensors):
        if ".layers." in name and len(checkpoint.tensors[name].shape) == 2:
            made[name] = lambda name=name, seed=seed: change(checkpoint.tensors[name], seed)
        else:
            made[name] = lambda name=name: checkpoint.tensors[name]
    return replace(checkpoint, tensors=LazyTensors(made), files=())


def halves(shape: tuple[int, int], seed: int) -> Dense:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) / shape[1] ** 0.5
    return Dense(values.astype(np.float16), FP16)


def factored(form: str, share: float) -> Callable[[Stored, int], Stored]:
    def change(weight: Stored, seed: int) -> Stored:
        out, inputs = weight.shape
        rank = max(32, round(share * out * inputs / (out + inputs) / 32) * 32)
        return Factored(random_weight((out, rank), form, 2 * seed), random_weight((rank, inputs), form, 2 * seed + 1))

    return change


def corrected(rank: int) -> Callable[[Stored, int], Stored]:
    def change(weight: Stored, seed: int) -> Stored:
        out, inputs = weight.shape
        return Sum((weight, Factored(halves((out, rank), 2 * seed), halves((rank, inputs), 2 * seed + 1))))

    return change


def speed(options: argparse.Namespace) -> Report:
    base = random_llama(SHAPES[options.model.removeprefix("random:")]) if options.model.startswith("random:") \
        else open_checkpoint(options.model)
    ids = np.random.default_rng(0).integers(300, int(base.config["vocab_size"]), 1024).astype(np.int32)
    machine = probe()
    roof = machine.device.tier("ram").read_bytes_per_s
    rows: list[tuple[Any, ...]] = []
    quantities: list[Quantity] = []
    for form in options.formats.split(","):
        dense = in_format(base, form)
        arms = {"dense": dense}
        arms |= {f"{share:g} of the numbers": changed(dense, factored(form, share)) for share in options.shares}
        arms |= {f"dense + rank {rank}": changed(dense, corrected(rank)) for rank in options.ranks}
        if options.multiplied_out:
            arms["multiplied out"] = changed(dense, lambda weight, seed: halves(weight.shape, seed))
        with collect_notices():
            models = {name: model_of(each, threads=options.threads, context=640, batch=256, cache=False)
                      for name, each in arms.items()}
        results: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
        order = random.Random(0)
        for turn in range(options.rounds + 1):
            for name in order.sample(list(models), len(models)):
                found = (decode(models[name].session, ids, options.tokens, time.perf_counter),
                         prefill(models[name].session, ids, 256, time.perf_counter))
                if turn:
                    for kept, value in zip(results[name], found, strict=True):
                        kept.append(value)
        for name, (decoded, read) in results.items():
            nbytes = models[name].packed.nbytes
            cells: list[Any] = []
            for what, own, other in (("tg", decoded, results["dense"][0]), ("pp256", read, results["dense"][1])):
                quantity, (middle, low, high) = ratio(f"{form}, {name}: {what} over dense", own, other)
                cells += [round(statistics.median(own), 1), round(middle, 3), f"{low:.2f} to {high:.2f}"]
                quantities.append(quantity)
            moved = statistics.median(decoded) * nbytes
            quantities += [Quantity(f"{form}, {name}: packed weights", nbytes, "B"),
                           Quantity(f"{form}, {name}: weights read", moved, "B/s")]
            rows.append((form, name, round(nbytes / 1e6, 1), *cells, round(moved / 1e9, 1),
                         round(moved / roof, 2) if roof else None))
            print(rows[-1], flush=True)
        models.clear()
    columns = ("weights", "linears", "packed, MB", f"tg{options.tokens}", "over dense", "interval", "pp256",
               "over dense ", "interval ", "GB/s", "of the roof")
    return Report(
        f"Low rank on {options.model}", tuple(quantities),
        (Table(f"Tokens per second, {options.threads} threads, {options.rounds} rounds", columns, tuple(rows)),),
        environment={**machine.report.environment, "model": options.model, "rounds": options.rounds, "commit": commit(),
                     "command": "python benchmarks/lowrank.py " + " ".join(sys.argv[1:])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:1b")
    parser.add_argument("--formats", default="int4/g32,int8/g32")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="of the dense numbers")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32], help="of corrections")
    parser.add_argument("--multiplied-out", action="store_true", help="time the product in 16-bit floats too")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=usable_cores().usable)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    publish(speed(options), options.out)


if __name__ == "__main__":
    main()
