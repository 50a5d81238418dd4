"""Weights of 2, 3 and 4 bits, and with two of every four dropped: speed, beside llama.cpp's nearest types, and quality.

    python benchmarks/lowbit.py speed --model smollm2 --out docs/results/lowbit-smollm2.json
    python benchmarks/lowbit.py speed --model random:1b --peer-python PEER/bin/python --out docs/results/lowbit.json
    python benchmarks/lowbit.py quality --peer-python PEER/bin/python --out docs/results/lowbit-quality.json
    python benchmarks/lowbit.py quality --model small --windows 32 --peer-python PEER/bin/python --out OUT.json

PEER as in llm.py. Speed: all engines and formats are timed in rounds, each round in another random order; ratios are
within rounds. Codes are random: speed does not depend on them. llama.cpp makes its files with its own quantiser from an
F16 file, every matrix in the one type. Quality: a float reference (allocation.py says which) is quantised by GPTQ here,
by llama.cpp's quantiser (as its file types mix tensors) there; one engine, edgewise, scores both. K-quants need rows of
256 m values: SmolLM2's have 576, and its files of 2 and 3 bits fall back to 4 bits and more; those of `small` do not.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from allocation import reference_of
from llm import Test, Worker, peer_environment
from random_llama import SHAPES, random_file, random_llama
from workers import HERE, commit, publish

from edgewise.core.activation import StaticActivation, activations_to_config
from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import collect_notices
from edgewise.core.numbers import FP16, QuantFormat
from edgewise.core.report import Quantity, Report, Table
from edgewise.core.storage import Dense, LazyTensors, QuantizedTensor, Sparse, Stored
from edgewise.data.texts import text
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import load, model_of
from edgewise.engine.model import LanguageModel
from edgewise.formats.cache import cache_root
from edgewise.formats.ggml_blocks import encode
from edgewise.formats.gguf import write_gguf
from edgewise.formats.sources import open_checkpoint
from edgewise.measure.machine import probe, usable_cores
from edgewise.measure.quality import divergence, perplexity
from edgewise.measure.repeat import Sample
from edgewise.native import _core

OURS = ("int4/g32", "int4/g64/fp16/min", "int3/g64/fp16/min", "int2/g64/fp16/min", "int2/g128", "int8/g32",
        "2:4 int8/g64", "2:4 int4/g64", "2:4 int2/g64", "int4/axis", "static int4/axis", "int8/axis",
        "static int8/axis")
"""Groups of a sparse weight count kept values. static: all activations on fixed grids, attention in integers."""
BASE = OURS[0]
PEERS = ("Q4_0", "Q4_K_S", "Q3_K_S", "Q2_K")
QUALITY = (("int4/g32", "Q4_0"), ("int3/g64/fp16/min", "Q3_K_S"), ("int2/g64/fp16/min", "Q2_K"))
"""Ours and the file type of llama.cpp that is nearest to it."""
TESTS = (Test("pp256", "prefill", 256), Test("tg32", "decode", 32))


def random_weight(shape: tuple[int, ...], name: str, seed: int) -> Stored:
    """Random codes in a format; "2:4 int4/g64" keeps two of every four inputs."""
    rng = np.random.default_rng(seed)
    sparse, form = name.startswith("2:4 "), QuantFormat.parse(name.removeprefix("2:4 ").removeprefix("static "))
    rows, cols = shape[0], shape[1] // 2 if sparse else shape[1]
    low, high = form.element.code_range
    tile = rng.integers(low, high + 1, 65_521, np.int8 if form.element.signed else np.uint8)  # over and over: a prime
    codes = np.resize(tile, (rows, cols))
    scales = np.full((rows, form.granularity.groups(cols)), np.float16(1 / (high * math.sqrt(cols))), np.float32)
    minima = np.full(scales.shape, np.float16(-0.5 / math.sqrt(cols)), np.float32) if form.zero == "min" else None
    values = QuantizedTensor(codes, scales, form, minima=minima)
    if not sparse:
        return values
    first = np.resize(rng.integers(0, 2, 65_521, np.uint8), (rows, cols // 2, 1))
    return Sparse("n_m", np.concatenate([first, first + 2], axis=2).reshape(rows, cols), values, (shape[0], shape[1]),
                  n_m=(2, 4))


def in_format(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The checkpoint with random codes for the matrices of its layers; its embedding in Q8_0."""
    made: dict[str, Callable[[], Stored]] = {}
    for seed, (tensor, stored) in enumerate(checkpoint.tensors.items()):
        if ".layers." in tensor and len(stored.shape) == 2:
            shape = stored.shape
            made[tensor] = lambda shape=shape, seed=seed: random_weight(shape, name, seed)
        elif len(stored.shape) == 2 and not hasattr(stored, "codec"):
            made[tensor] = lambda stored=stored: encode(stored.dense(), "Q8_0")
        else:
            made[tensor] = lambda stored=stored: stored
    config = dict(checkpoint.config)
    if name.startswith("static "):
        config["quantization_config"] = activations_to_config({}, every_site(config["num_hidden_layers"]))
    return replace(checkpoint, config=config, tensors=LazyTensors(made), files=())


def every_site(layers: int) -> dict[str, StaticActivation]:
    """Grids wide enough for random weights, of the widths that MobileQuant gives them."""
    eight, sixteen = StaticActivation.from_range(-8, 8, 8), StaticActivation.from_range(-64, 64, 16)
    one = {8: StaticActivation.from_range(0, 1, 8), 16: StaticActivation.from_range(0, 1, 16)}
    parts = {f"{name}_proj.input": eight for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
                                                      "mlp.gate", "mlp.up", "mlp.down")}
    parts |= {name.replace("input", "output"): eight for name in parts}
    parts |= {"input_layernorm.input": sixteen, "post_attention_layernorm.input": sixteen, "self_attn.query": eight,
              "self_attn.key": eight, "self_attn.softmax_in": sixteen, "self_attn.softmax_out": one[16],
              "self_attn.o_proj.output": sixteen, "mlp.down_proj.output": sixteen, "mlp.sigmoid": one[8],
              "mlp.act": eight}
    return {f"model.layers.{i}.{name}": grid for i in range(layers) for name, grid in parts.items()}


def matrix_bits(model: LanguageModel) -> float:
    """Bits per weight of the layers' matrices as packed."""
    inside = [matrix for name, matrix in model.packed.matrices.items() if ".layers." in name]
    return 8 * sum(m.nbytes for m in inside) / sum(m.rows * m.cols for m in inside)


def own_seconds(model: LanguageModel, test: Test, tokens: np.ndarray[Any, Any]) -> float:
    session = model.session
    session.truncate(0, 0)
    if test.what == "prefill":
        started = time.perf_counter()
        session.prefill(0, tokens[:test.count])
        return time.perf_counter() - started
    session.prefill(0, tokens[:1])
    sampler = _core.Sampler()
    session.generate(0, sampler, 1, [])
    started = time.perf_counter()
    session.generate(0, sampler, test.count, [])
    return time.perf_counter() - started


def peer_file(python: str, source: Path, kind: str, pure: bool) -> tuple[Path, str]:
    """A file of llama.cpp's own making, in the cache, and what its quantiser fell back on."""
    made = source.with_name(f"{source.stem}.{'pure-' if pure else ''}{kind}.gguf")
    notes = made.with_suffix(".log")
    if not made.exists() or not notes.exists():
        done = subprocess.run([python, str(HERE / "worker_llama_quantize.py"), str(source), f"{made}.part", kind,
                               *(["pure"] if pure else [])], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(done.stderr[-2000:])
        notes.write_text(done.stdout + done.stderr)
        os.replace(f"{made}.part", made)
    found = re.search(r"(\d+) of (\d+) tensor\(s\) required fallback", notes.read_text())
    return made, f"{found[1]} of {found[2]} tensors fell back" if found else ""


def speed(options: argparse.Namespace) -> Report:
    """Every format and peer, round by round."""
    threads, context = options.threads, 640
    base = random_llama(SHAPES[options.model.removeprefix("random:")]) if options.model.startswith("random:") \
        else open_checkpoint(options.model)
    names = options.formats.split(",") if options.formats else list(OURS)
    if BASE not in names:
        names.insert(0, BASE)
    with collect_notices() as notices:
        models = {}
        for name in names:
            models[name] = model_of(in_format(base, name), threads=threads, context=context, batch=512)
            print(name, round(matrix_bits(models[name]), 3), flush=True)
    bits = {name: matrix_bits(model) for name, model in models.items()}
    tokens = np.random.default_rng(0).integers(300, 30_000, 512).astype(np.int32)
    runs: dict[str, Callable[[Test], float]] = {
        name: (lambda test, model=model: own_seconds(model, test, tokens)) for name, model in models.items()}
    workers: list[Worker] = []
    environment: dict[str, Any] = {}
    if options.peer_python and options.model.startswith("random:"):
        whole = random_file(options.model.removeprefix("random:"), "F16")
        for kind in options.peers.split(","):
            path, _ = peer_file(options.peer_python, whole, kind, pure=True)
            each = [Worker(options.peer_python, "worker_llama_cpp.py",
                           {"model": str(path), "threads": threads, "flash_attn": flash, "context": context})
                    for flash in ((False, True) if options.rounds > 3 else (False,))]
            workers += each
            best = {test.name: min(each, key=lambda worker, test=test: worker.seconds(test)) for test in TESTS}
            print(kind, flush=True)
            name = f"llama.cpp {kind}"
            runs[name] = lambda test, best=best: best[test.name].seconds(test)
            bits[name] = layer_bits(path)
        environment = peer_environment(workers[0].about)
    samples: dict[tuple[str, str], list[float]] = {(name, test.name): [] for name in runs for test in TESTS}
    order = random.Random(0)
    try:
        for turn in range(options.rounds + 1):
            for name in order.sample(list(runs), len(runs)):
                for test in TESTS:
                    seconds = runs[name](test)
                    if turn > 0:
                        samples[name, test.name].append(test.count / seconds)
    finally:
        for worker in workers:
            worker.close()
    rows, quantities = [], []
    for name in runs:
        cells: list[Any] = []
        for test in TESTS:
            own, reference = samples[name, test.name], samples[BASE, test.name]
            ratios = Sample(tuple(a / b for a, b in zip(own, reference, strict=True)))
            low, high = ratios.interval or (min(ratios.values), max(ratios.values))
            cells += [round(statistics.median(own), 1), round(ratios.median, 3), f"{low:.2f} to {high:.2f}"]
            quantities += [Quantity(f"{name}: {test.name}", statistics.median(own), "token/s"),
                           Quantity(f"{name}: {test.name} over {BASE}", ratios.median, "", (low, high))]
        quantities.append(Quantity(f"{name}: bits per weight", bits[name]))
        rows.append((name, round(bits[name], 3), *cells))
    columns = ("weights", "bits per weight", *(part for test in TESTS for part in (
        test.name, f"{test.name} over {BASE}", "interval")))
    machine = probe()
    return Report(
        f"Low bits on {options.model}", tuple(quantities),
        (Table(f"Tokens per second, {threads} threads", columns, tuple(rows)),),
        environment={**machine.report.environment, **environment, "model": options.model, "rounds": options.rounds,
                     "commit": commit(), "tier": models[BASE].tier,
                     "command": command_of(options)}).with_notices(notices)


def layer_bits(path: Path) -> float:
    """Bits per weight of the layers' matrices in a GGUF file."""
    inside = [stored for name, stored in open_any(path).items() if ".layers." in name and len(stored[0]) == 2]
    return 8 * sum(nbytes for _, nbytes in inside) / sum(math.prod(shape) for shape, _ in inside)


def open_any(path: Path) -> Mapping[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes of every tensor."""
    checkpoint = open_checkpoint(str(path))
    return {name: (stored.shape, stored.nbytes) for name, stored in checkpoint.tensors.items()}


def quality(options: argparse.Namespace) -> Report:
    """Perplexity and divergence of both engines' weights from the same float reference."""
    from edgewise.fit import quantize

    reference = reference_of(options.model)
    length = min(512, plan_of(reference).context)
    folder = cache_root() / "benchmarks" / "lowbit" / options.model.replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "reference.F16.gguf"
    if not whole.exists():
        write_gguf(replace(reference, tensors={
            name: Dense(stored.dense().astype(np.float16), FP16) if len(stored.shape) == 2 else stored
            for name, stored in reference.tensors.items()}), whole, "F16")
    sources: dict[str, tuple[str, str]] = {}
    for form, kind in QUALITY:
        made = folder / f"gptq-{form.replace('/', '-')}"
        if not (made / "config.json").exists():
            shutil.rmtree(made, ignore_errors=True)
            quantize(str(whole), "gptq", form, out=made, check=False, resume=True)
        path, fallbacks = peer_file(options.peer_python, whole, kind, pure=False)
        sources |= {f"GPTQ {form}": (str(made), ""), f"llama.cpp {kind}": (str(path), fallbacks)}
    exact = load(str(whole), activations="float32", threads=options.threads, context=length, kv="fp32", cache=False)
    ids = np.asarray(exact.encode(text(options.text).content, add_special=False), np.int32)
    plain = perplexity(exact.forward, ids, window=length, limit=options.windows).value
    rows = [("F16 reference", 16.0, round(plain, 3), 0.0, 1.0, "")]
    quantities = []
    for name, (source, note) in sources.items():
        model = load(source, threads=options.threads, context=length, kv="fp32", cache=False)
        score = perplexity(model.forward, ids, window=length, limit=options.windows)
        apart = divergence(exact.forward, model.forward, ids, window=length, limit=options.windows)
        bits = matrix_bits(model) if name.startswith("GPTQ") else layer_bits(Path(source))
        rows.append((name, round(bits, 3), round(score.value, 3), float(f"{apart.kl:.4g}"), round(apart.agreement, 4),
                     note))
        quantities += [score.quantity(f"{name}: perplexity"), Quantity(f"{name}: KL", apart.kl, "nat"),
                       Quantity(f"{name}: bits per weight", bits)]
        print(rows[-1], flush=True)
    return Report(
        f"Low bits on {options.model}: perplexity and divergence", tuple(quantities),
        (Table(f"{options.windows} windows of {length} tokens", ("weights", "bits per weight", "perplexity", "KL, nat",
                                                           "same first choice", "notes"), tuple(rows)),),
        environment={"model": options.model, "commit": commit(), "windows": options.windows,
                     "command": command_of(options)})


def command_of(options: argparse.Namespace) -> str:
    """What was typed, the peer's interpreter by the name that this file gives it."""
    words = ["PEER/bin/python" if word == options.peer_python else word for word in sys.argv[1:]]
    return " ".join(["python benchmarks/lowbit.py", *words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("speed", "quality"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--formats", default="", help="for speed; by default all")
    parser.add_argument("--peer-python", default="")
    parser.add_argument("--peers", default=",".join(PEERS), help="file types of llama.cpp, for speed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--text", default="lee_background", help="for quality, as data.texts.text names it")
    parser.add_argument("--threads", type=int, default=usable_cores().usable)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    publish(speed(options) if options.part == "speed" else quality(options), options.out)


if __name__ == "__main__":
    main()
