"""MoDeGPT on SmolLM2-135M: pairs of matrices decomposed module by module, beside cuts and per-matrix decompositions.

Lin et al., arXiv:2408.09632. The paper compresses models of 7 to 70 billion parameters on one GPU and reports
perplexity, zero-shot tasks and throughput; here the model has 135 million, every number is measured in the engine on
two processor cores, and bounds for a model of that size are the card's. Arms are equal in the share of the layers'
weights that goes: single weight matrices as the product of two (plain, and whitened by the inputs), heads and neurons
cut by norm, chosen at random, MoDeGPT with equal shares and with allocated ones. All read the same calibration text.
Seeds are its windows, stretches of the held-out text, and random choices.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.lowrank.decompose import svd, whitened
from edgewise.compress.lowrank.modegpt import ModeGpt
from edgewise.compress.lowrank.modegpt_walk import shrink
from edgewise.compress.prune.units import Units
from edgewise.compress.walk import Block, Group, blocks_of
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import collect_notices
from edgewise.core.numbers import FP16
from edgewise.core.recipe import Claim, Recipe
from edgewise.core.report import Quantity, Report, Table
from edgewise.core.stats import InputStats
from edgewise.core.storage import Dense, Factored, Stored
from edgewise.data.texts import text
from edgewise.data.tokenizer import tokenizer_of
from edgewise.engine.calibrate import EngineStats
from edgewise.engine.loading import model_of
from edgewise.engine.score import log_probs
from edgewise.fit.dispatch import Calibration
from edgewise.fit.pruners import units_by_norm
from edgewise.formats.sources import open_checkpoint
from edgewise.measure.repeat import compare

__all__ = ["RECIPE"]

Ids = NDArray[np.int32]
SWITCHES: dict[str, dict[str, Any]] = {
    "neurons not read out": {"reconstruct": False}, "random neurons": {"neurons": "random"},
    "values by weights alone": {"whiten": False}, "first dimensions of keys": {"dimensions": "first"},
    "rotary pairs torn": {"pairs": False}}


class Once:
    """Statistics of one pass over the calibration text, for every arm. Gram matrices lie in files without names."""

    def __init__(self, checkpoint: Checkpoint, windows: Ids, threads: int = 1) -> None:
        source = EngineStats(checkpoint, list(windows), gram=True, threads=threads)
        self._states = [np.array(source.hidden)]
        self._stats: dict[str, InputStats] = {}
        for block in blocks_of(checkpoint):
            for group in block.groups:
                found = source.stats(block, group, {})
                if found is None or found.gram is None:
                    continue
                with tempfile.TemporaryFile() as file:
                    kept = np.memmap(file, np.float64, "w+", shape=found.gram.shape)
                kept[:] = found.gram
                self._stats[group.names[0]] = replace(found, gram=kept)
            source.leave(block, {})
            self._states.append(np.array(source.hidden))
        self._at = 0

    def source(self, gram: bool) -> Once:
        """From the first block again."""
        self._at = 0
        return self

    def stats(self, block: Block, group: Group, tensors: Mapping[str, Stored]) -> InputStats | None:
        return self._stats.get(group.names[0])

    def leave(self, block: Block, tensors: Mapping[str, Stored]) -> None:
        self._at = block.index + 1

    @property
    def hidden(self) -> Any:
        return self._states[self._at]


def run(settings: Mapping[str, Any], seed: int, ablate: bool) -> Report:
    """One seed: every arm at every share, what single modules lose, the time it took, and the speed it gave."""
    source = _model(settings["model"])
    rng = np.random.default_rng(seed)
    ids, held_out = _ids(source, settings["text"]), _ids(source, settings["held_out"])
    length, count = settings["length"], settings["calibration_windows"]
    starts = rng.integers(0, len(ids) - length, count)
    windows = np.stack([ids[start:start + length] for start in starts])
    start = int(rng.integers(0, len(held_out) - length * settings["windows"]))
    parts = held_out[start:start + length * settings["windows"]].reshape(-1, length)
    base = ModeGpt(smoothing=settings["smoothing"], multiple=settings["multiple"],
                   head_multiple=settings["head_multiple"], seed=seed)
    began = time.perf_counter()
    once = Once(source, windows)
    gathered = time.perf_counter() - began
    dense = _perplexity(source, parts)
    rows: list[tuple[str, float, float, float]] = [("dense", 0.0, dense, 1.0)]
    ratio: dict[tuple[str, float], float] = {}
    metrics: dict[str, float | None] = {}

    def add(name: str, share: float, made: Checkpoint) -> Checkpoint:
        value = _perplexity(made, parts)
        ratio[name, share] = value / dense
        rows.append((name, _removed(source, made), value, value / dense))
        return made

    main = settings["share"]
    for share in settings["shares"]:
        began = time.perf_counter()
        made, _ = shrink(source, replace(base, sparsity=share), once.source)
        if share == max(settings["shares"]):
            metrics["minutes to compress the most, one thread"] = (time.perf_counter() - began + gathered) / 60
            fastest = made
        add("MoDeGPT", share, made)
    uniform, cuts = shrink(source, replace(base, sparsity=main, allocation="uniform"), once.source)
    add("MoDeGPT, equal shares", main, uniform)
    for share in settings["shares"]:
        add("each matrix by SVD", share, _each(source, share, once, white=False))
    add("each matrix by whitened SVD", main, _each(source, main, once, white=True))
    sample = Calibration(windows, parts, settings["text"], "")
    add("heads and neurons by norm", main, units_by_norm(source, sample, Units(sparsity=main), threads=1))
    metrics |= {f"perplexity over dense, {share:.0%} of the weights gone": ratio["MoDeGPT", share]
                for share in settings["shares"]}
    ours = ratio["MoDeGPT", main] - 1
    for name in ("each matrix by SVD", "each matrix by whitened SVD", "heads and neurons by norm"):
        metrics[f"loss of MoDeGPT over {name}"] = ours / (ratio[name, main] - 1)
    metrics["loss of allocated over equal shares"] = ours / (ratio["MoDeGPT, equal shares", main] - 1)
    same, _ = shrink(source, replace(base, sparsity=0.0), once.source)
    metrics["perplexity over dense, nothing gone"] = _perplexity(same, parts) / dense
    metrics["decoded tokens per second over dense, the most gone"] = _speed(source, fastest, settings)
    if ablate:
        for name, switch in SWITCHES.items():
            made, other = shrink(source, replace(base, sparsity=main, allocation="uniform", **switch), once.source)
            add(name, main, made)
            metrics[f"loss over the whole method, {name}"] = (ratio[name, main] - 1) / (
                ratio["MoDeGPT, equal shares", main] - 1)
            if name == "values by weights alone":
                metrics["error of values by weights alone over whitened"] = float(np.median(
                    [b.value_error / a.value_error for a, b in zip(cuts, other, strict=True)]))
    return Report("modegpt", tuple(Quantity(name, value) for name, value in metrics.items()), (
        Table("Arms", ("what", "share removed", "perplexity", "over dense"), tuple(rows)),
        Table("Layers, equal shares", ("layer", "feed-forward error", "value error"), tuple(
            (str(index), cut.feed_forward_error, cut.value_error) for index, cut in enumerate(cuts)))),
        environment={"held out": settings["held_out"], "calibrated on": settings["text"]})


def _model(what: Any) -> Checkpoint:
    if isinstance(what, str):
        return open_checkpoint(what)
    from edgewise.train.small_llama import SmallLlama, small_llama

    return small_llama(SmallLlama(**what))


def _ids(source: Checkpoint, name: str) -> Ids:
    return np.asarray(tokenizer_of(source).encode(text(name).content, add_special=False), np.int32)


def _perplexity(checkpoint: Checkpoint, parts: Ids) -> float:
    with collect_notices():
        model = model_of(checkpoint, threads=1, context=parts.shape[1], cache=False)
        return math.exp(-float(np.mean([log_probs(model, ids).mean() for ids in parts])))


def _linears(checkpoint: Checkpoint) -> list[str]:
    return [name for block in blocks_of(checkpoint) for group in block.groups for name in group.names]


def _numbers(stored: Stored) -> int:
    pair = (stored.left, stored.right) if isinstance(stored, Factored) else (stored,)
    return sum(math.prod(each.shape) for each in pair)


def _removed(source: Checkpoint, made: Checkpoint) -> float:
    before, after = (sum(_numbers(each.tensors[name]) for name in _linears(each)) for each in (source, made))
    return 1 - after / before


def _each(source: Checkpoint, share: float, once: Once, *, white: bool) -> Checkpoint:
    """Every linear as the product of two with 1 - share of its numbers, in half precision, as it runs in the engine."""
    made: dict[str, Stored] = {}
    for block in blocks_of(source):
        for group in block.groups:
            stats = once.stats(block, group, {})
            assert stats is not None
            for name in group.names:
                weight = source.tensors[name].dense()
                rank = max(1, int((1 - share) * weight.size / sum(weight.shape)))
                pair = whitened(weight, stats.gram, rank) if white and stats.gram is not None else svd(weight, rank)
                made[name] = Factored(*(Dense(side.astype(np.float16), FP16) for side in (pair.left, pair.right)))
    return source.with_tensors({name: made.get(name, source.tensors[name]) for name in source.tensors},
                               Step("svd", {"share": share, "whitened": white}, ""))


def _speed(source: Checkpoint, made: Checkpoint, settings: Mapping[str, Any]) -> float:
    """Pairs of decoded stretches, one thread, both with their linears in half precision."""
    chosen = settings["speed"]
    with collect_notices():
        models = [model_of(each, format="fp16", threads=1, context=chosen["tokens"] + 16, cache=False)
                  for each in (source, made)]

    def decode(model: Any) -> Callable[[], Any]:
        def call() -> None:
            model.reset()
            for token in range(5, 5 + chosen["tokens"]):
                model.session.forward(np.int32([token]), np.int32([0]))

        return call

    found = compare(decode(models[0]), decode(models[1]), pairs=chosen["pairs"])
    return float(found.ratio)


def _claims(shares: tuple[float, ...]) -> tuple[Claim, ...]:
    card = "card: small-scale check"
    low, middle, high = (f"perplexity over dense, {share:.0%} of the weights gone" for share in shares)
    return (
        Claim("At 10 % the perplexity rises by no more than 35 %", card, low, 1.35, "at-most"),
        Claim("At 20 % it no more than doubles", card, middle, 2.0, "at-most"),
        Claim("More gone is worse, not a collapse: at 30 % below five times", "inferred", high, 5.0, "at-most"),
        Claim("It loses less than half of what a decomposition of each matrix by itself loses", card,
              "loss of MoDeGPT over each matrix by SVD", 0.5, "at-most"),
        Claim("and less than one that sees the inputs", "inferred",
              "loss of MoDeGPT over each matrix by whitened SVD", 1.0, "at-most"),
        Claim("It loses less than half of what cutting heads and neurons by norm does", card,
              "loss of MoDeGPT over heads and neurons by norm", 0.5, "at-most"),
        Claim("Shares by influence lose no more than equal ones", "section 3.3",
              "loss of allocated over equal shares", 1.0, "at-most"),
        Claim("Where nothing goes, nothing changes", "arithmetic", "perplexity over dense, nothing gone", 1.0, "equal",
              1e-3),
        Claim("Minutes, not hours, and no backward pass", "abstract", "minutes to compress the most, one thread", 10.0,
              "at-most"),
        Claim("The smaller model decodes faster", "abstract", "decoded tokens per second over dense, the most gone",
              1.05, "at-least"),
        Claim("Without reading out what neurons said, more is lost", card,
              "loss over the whole method, neurons not read out", 1.0, "order", ablation=True),
        Claim("Values decomposed by weights alone err 1.3 times as much", card,
              "error of values by weights alone over whitened", 1.3, "at-least", ablation=True),
        Claim("Random neurons, read out as well, lose more", card, "loss over the whole method, random neurons", 1.0,
              "order", ablation=True),
        Claim("The first dimensions of keys lose more than those with the largest norms", card,
              "loss over the whole method, first dimensions of keys", 1.0, "order", ablation=True),
        Claim("Torn rotary pairs lose more than twice as much", card,
              "loss over the whole method, rotary pairs torn", 2.0, "at-least", ablation=True),
    )


_SHARES = (0.1, 0.2, 0.3)
_TINY = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "width": 128, "vocab": 320, "context": 64, "steps": 200,
         "batch": 8, "learning_rate": 1e-2, "text": "pydoc"}
_ALIKE = {"smoothing": 0.1, "shares": list(_SHARES), "share": 0.2}
RECIPE = Recipe(
    title="MoDeGPT",
    paper="arXiv:2408.09632",
    claims=_claims(_SHARES),
    scales={
        "smoke": {"model": _TINY, "held_out": "pydoc", "text": "pydoc", "length": 64, "windows": 16,
                  "calibration_windows": 24, "multiple": 8, "head_multiple": 2,
                  "speed": {"tokens": 16, "pairs": 3}, **_ALIKE},
        "small": {"model": "smollm2", "held_out": "lee_background", "text": "wikipedia_pages/calibration",
                  "length": 512, "windows": 8, "calibration_windows": 64, "multiple": 32, "head_multiple": 4,
                  "speed": {"tokens": 64, "pairs": 15}, "seeds": 3, **_ALIKE},
        "paper": {"model": "smollm2", "held_out": "lee_background", "text": "wikipedia_pages/calibration",
                  "length": 2048, "windows": 16, "calibration_windows": 128, "multiple": 32, "head_multiple": 4,
                  "speed": {"tokens": 128, "pairs": 15}, "seeds": 3, **_ALIKE},
    },
    sources={"model": "inferred", "held_out": "inferred", "text": "paper", "length": "paper", "windows": "inferred",
             "calibration_windows": "paper", "multiple": "inferred", "head_multiple": "inferred",
             "smoothing": "code", "shares": "paper", "share": "inferred", "speed": "inferred"},
    run=run,
)
