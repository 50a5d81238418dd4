"""MLX-Transformers: checkpoints loaded directly into a second runtime, and what inference takes in each.

"Benchmarking On-Device Machine Learning on Apple Silicon with MLX", 2025, arXiv:2510.18921; its repository
ToluClassics/mlx-transformers. Parameter names of the re-implementation are those of the checkpoint, so that loading
is one to one; outputs agree with torch to 1e-4; latency is timed with forced evaluation over batch and length.

Here edgewise is the second runtime, and MLX's CPU build one of those beside it. Unified memory cannot be shown on this
machine: the claims about Apple silicon are listed and not checkable. Lengths are tokens, equal for every runtime.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import MissingExtraError, collect_notices, notice, require
from edgewise.core.numbers import QuantFormat
from edgewise.core.recipe import Claim, Recipe
from edgewise.core.report import Quantity, Report, Table
from edgewise.engine.archs import plan_of
from edgewise.engine.build import linears_of
from edgewise.engine.loading import model_of, requantised
from edgewise.engine.plan import Plan
from edgewise.formats.sources import open_checkpoint
from edgewise.measure.machine import usable_cores
from edgewise.measure.repeat import rounds, time_call
from edgewise.papers.encoder_backends import Backend, backends, edgewise_backend, mlx_backend

__all__ = ["RECIPE"]

FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
TEXTS = ("A leaf.", "The river rose in the night and was gone by noon.", "Interest rates fell.", "Why is the sky blue?",
         "She wrote the letter twice, once in anger and once in ink, and sent neither of them to the bank.")


def run(settings: Mapping[str, Any], seed: int, ablate: bool) -> Report:
    """One seed: parity of the families on random weights and of the real model, then the grid."""
    torch = require("torch", extra="torch", purpose="the parity of mlx-transformers")
    threads = usable_cores().usable
    torch.set_num_threads(threads)
    metrics: dict[str, float | None] = {}
    worst, unknown, broken = 0.0, 0, []
    with tempfile.TemporaryDirectory() as directory:
        for family in FAMILIES:
            checkpoint, model, ignored = _random(family, Path(directory) / family, seed, settings)
            ids, mask = _padded(checkpoint, settings["sentences"], settings["tokens"], seed)
            plan, expected = plan_of(checkpoint), _torch_states(model, ids, mask)
            worst = max(worst, _miss(edgewise_backend(plan, threads)(ids, mask), expected, mask))
            unknown += ignored + len(_strange_names(plan, model))
            if ablate:
                broken.append(_miss(edgewise_backend(plan, threads, padding=True)(ids, mask), expected, mask))
            if ablate and family == "roberta":
                moved = edgewise_backend(replace(plan, position_offset=0), threads)(ids, mask)
                metrics["difference without the position offset"] = _miss(moved, expected, mask)
    metrics["largest difference, random weights"] = worst
    metrics["parameters without their own name"] = float(unknown)
    if ablate:
        metrics["difference without the mask"] = min(broken)
    if settings["model"] == "random":
        checkpoint, model, _ = _random("bert", None, seed, settings)
    else:
        checkpoint = open_checkpoint(settings["model"])
        model = _torch_twin(checkpoint)
        metrics.update(_real(checkpoint, model, threads, ablate))
    table = _grid(plan_of(checkpoint), model, threads, settings, seed, metrics, ablate)
    metrics["M2 Max over A10 latency, batch 1"] = None
    notice("info", "the claims about Apple silicon and an A10 need those machines", where="mlx-transformers")
    return Report("mlx-transformers", tuple(Quantity(name, value) for name, value in metrics.items()), (table,),
                  environment={"threads": threads})


# ---- parity -------------------------------------------------------------------------------------------------------

def _random(family: str, folder: Path | None, seed: int, settings: Mapping[str, Any]) -> tuple[Checkpoint, Any, int]:
    """A model of random weights as transformers saves it and as we open it; how many of its tensors we cannot place."""
    transformers = require("transformers", extra="torch", purpose="random encoders")
    require("torch", extra="torch", purpose="random encoders").manual_seed(seed)
    transformers.utils.logging.disable_progress_bar()
    kind = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300, hidden_size=settings["hidden"], num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=4 * settings["hidden"], max_position_embeddings=settings["tokens"] + 8,
        type_vocab_size=2 if family == "bert" else 1, layer_norm_eps=1e-12 if family == "bert" else 1e-5,
        pad_token_id=0 if family == "bert" else 1, initializer_range=0.2)
    model = getattr(transformers, f"{kind}Model")(config, add_pooling_layer=False).eval()
    with tempfile.TemporaryDirectory() as spare:
        where = folder or Path(spare) / family
        model.save_pretrained(where)
        with collect_notices() as notices:
            checkpoint = open_checkpoint(str(where))
            plan_of(checkpoint)
        if folder is None:
            checkpoint = replace(checkpoint, tensors=dict(checkpoint.tensors.items()))
    return checkpoint, model, sum(item.kind == "ignored" for item in notices)


def _strange_names(plan: Plan, model: Any) -> list[str]:
    """Linears of the plan whose name torch does not know."""
    known = set(model.state_dict())
    return [linear.name for linear in linears_of(plan) if linear.name not in known]


def _torch_twin(checkpoint: Checkpoint) -> Any:
    """The transformers model with the checkpoint's tensors, name by name."""
    torch = require("torch", extra="torch", purpose="the torch side of a checkpoint")
    transformers = require("transformers", extra="torch", purpose="the torch side of a checkpoint")
    config = transformers.BertConfig(**{k: v for k, v in checkpoint.config.items() if k != "model_type"})
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    tensors = {name.removeprefix("bert."): torch.from_numpy(np.array(stored.dense(), np.float32))
               for name, stored in checkpoint.tensors.items() if "pooler" not in name and "position_ids" not in name}
    model.load_state_dict(tensors)
    return model


def _padded(checkpoint: Checkpoint, sentences: int, longest: int, seed: int) -> tuple[Any, Any]:
    """Random ids of mixed length, padded on the right, and the mask."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(max(2, longest // 4), longest + 1, sentences)
    lengths[0] = longest
    mask = np.arange(longest)[None, :] < lengths[:, None]
    ids = rng.integers(4, int(checkpoint.config["vocab_size"]), (sentences, longest))
    return np.where(mask, ids, int(checkpoint.config.get("pad_token_id", 0))), mask


def _torch_states(model: Any, ids: Any, mask: Any) -> Any:
    torch = require("torch", extra="torch", purpose="parity")
    with torch.inference_mode():
        return model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64))
                     ).last_hidden_state.numpy()


def _miss(ours: Any, theirs: Any, mask: Any) -> float:
    """Largest absolute difference where there is text."""
    return float(np.abs(ours - theirs)[mask].max())


def _real(checkpoint: Checkpoint, model: Any, threads: int, ablate: bool) -> dict[str, float | None]:
    """Parity of a real checkpoint on sentences, its quantised forms, and tanh GELU as ablation."""
    found: dict[str, float | None] = {}
    with collect_notices():
        ours = model_of(checkpoint, threads=threads)
    rows = [ours.encode(text) for text in (*TEXTS, *(f"{a} {b}" for a, b in itertools.pairwise(TEXTS)),
                                           *(f"{a} {a} {a}" for a in TEXTS), *(text.upper() for text in TEXTS),
                                           TEXTS[4] * 5)]
    longest = max(map(len, rows))
    mask = np.array([[i < len(row) for i in range(longest)] for row in rows])
    ids = np.array([row + [0] * (longest - len(row)) for row in rows], np.int64)
    plan, expected = plan_of(checkpoint), _torch_states(model, ids, mask)
    found["largest difference, real weights"] = _miss(edgewise_backend(plan, threads)(ids, mask), expected, mask)
    exact = _pooled(expected, mask)
    for bits in (8, 4):
        with collect_notices() as notices:
            coarse = requantised(plan, QuantFormat.parse(f"int{bits}/g64/fp32/min"))
            backend = edgewise_backend(coarse, threads)
        for text in {item.message for item in notices if item.kind == "fallback"}:
            notice("fallback", text, where="every linear of the layers")
        cosines = (_pooled(backend(ids, mask), mask) * exact).sum(axis=1)
        found[f"least cosine at {bits} bits"] = float(cosines.min())
        linears = [linear.weight for linear in linears_of(coarse) if ".layer." in linear.name]
        found[f"size of the linears at {bits} bits"] = (sum(weight.nbytes for weight in linears)
                                                        / sum(4 * math.prod(weight.shape) for weight in linears))
    if ablate:
        other = replace(plan, layers=tuple(
            replace(layer, feed_forward=replace(layer.feed_forward, function="gelu_tanh")) for layer in plan.layers))
        found["difference with tanh GELU"] = _miss(edgewise_backend(other, threads)(ids, mask), expected, mask)
        found["difference without the mask, real weights"] = _miss(
            edgewise_backend(plan, threads, padding=True)(ids, mask), expected, mask)
    return found


def _pooled(states: Any, mask: Any) -> Any:
    """Sentence embeddings of unit length, (sentences, hidden)."""
    mean = (states * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


# ---- latency ------------------------------------------------------------------------------------------------------

def _grid(plan: Plan, model: Any, threads: int, settings: Mapping[str, Any], seed: int,
          metrics: dict[str, float | None], ablate: bool) -> Table:
    """Seconds over batch and length, the backends taking turns; metrics of the harness are added."""
    from edgewise.native import probe

    runners, rng = backends(plan, model, threads), np.random.default_rng(seed)
    peak = max(probe.fp32_rate(threads, 0.1) for _ in range(3))
    rows: list[tuple[Any, ...]] = []
    medians: dict[tuple[str, int, int], float] = {}
    spreads: list[float] = []
    agreement = 0.0
    cold: dict[str, float] = {}
    rate: dict[str, float] = {}
    for batch, length in itertools.product(settings["batches"], settings["lengths"]):
        ids, flops = rng.integers(4, plan.vocab, (batch, length)), _flops(plan, batch, length)
        mask = np.ones((batch, length), bool)
        for name in [name for name in runners if name not in ("edgewise", "torch")  # which the claims compare
                     and flops / rate.get(name, math.inf) > settings["most_s"]]:
            notice("info", f"{name} is left out from {batch} x {length} tokens on: a run would take more than "
                   f"{settings['most_s']} s", where="latency")
            del runners[name]
        calls = {name: _call(runner, ids, mask) for name, runner in runners.items()}
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            cold.setdefault(name, time.perf_counter() - started)
        states = {name: runner(ids, mask) for name, runner in runners.items()}
        agreement = max(agreement, *(_miss(s, states["torch"], mask) for s in states.values()))
        for name, sample in rounds(calls, warmup=0, repeats=settings["repeats"], seed=seed, measure=_quiet).items():
            medians[name, batch, length] = sample.median
            rate[name] = max(rate.get(name, 0.0), flops / sample.median)
            spread = statistics.stdev(sample.values) / statistics.mean(sample.values)
            spreads.append(spread)
            rows.append((name, batch, length, sample.median * 1e3, sample.median * 1e3 / batch,
                         flops / sample.median / 1e9, spread))
    metrics["largest difference between runtimes"] = agreement
    metrics["rate over peak, fastest cell"] = max(rate.values()) / peak
    if settings["model"] != "random":
        small, large = min(settings["batches"]), max(settings["batches"])
        longest = max(settings["lengths"])
        metrics["median coefficient of variation"] = statistics.median(spreads)
        metrics["growth exponent of latency with tokens"] = statistics.median(
            [_exponent(medians, name) for name in runners])
        metrics["saving per sequence by batching, torch"] = 1 - (
            medians["torch", large, min(settings["lengths"])] / large
            / medians["torch", small, min(settings["lengths"])] * small)
        metrics["edgewise over torch latency, batch 1"] = (medians["edgewise", small, longest]
                                                           / medians["torch", small, longest])
    if ablate:
        metrics.update(_ablated(plan, settings, threads, peak, medians, cold, seed))
    columns = ("runtime", "batch", "tokens", "ms", "ms per sequence", "GFLOP/s", "variation")
    return Table("Latency", columns, tuple(rows))


def _quiet(call: Callable[[], Any]) -> float:
    """Seconds of a call, once the threads of the runtime before have stopped spinning for more work."""
    time.sleep(0.01)
    return time_call(call)


def _call(runner: Backend, ids: Any, mask: Any) -> Any:
    return lambda: runner(ids, mask)


def _flops(plan: Plan, batch: int, length: int) -> float:
    """L (24 B S h^2 + 4 B S^2 h) where the feed-forward is 4 h wide; counted from the plan."""
    total = 0
    for layer in plan.layers:
        attention = layer.attention
        inner = attention.heads * attention.head_dim
        macs = 4 * inner * plan.hidden * length + 2 * length * length * inner
        for part in layer.feed_forwards:
            macs += 2 * part.up.weight.shape[0] * plan.hidden * length
        total += 2 * macs
    return float(batch * total)


def _exponent(medians: Mapping[tuple[str, int, int], float], name: str) -> float:
    """Slope of log latency over log tokens, over every cell of a runtime."""
    cells = [(math.log(batch * length), math.log(seconds)) for (runtime, batch, length), seconds in medians.items()
             if runtime == name]
    return float(np.polyfit(*map(np.asarray, zip(*cells, strict=True)), 1)[0])


def _ablated(plan: Plan, settings: Mapping[str, Any], threads: int, peak: float,
             medians: Mapping[tuple[str, int, int], float], cold: Mapping[str, float], seed: int,
             ) -> dict[str, float | None]:
    """The timer without forced evaluation, and with the cold run kept."""
    first = {name: seconds / medians[name, settings["batches"][0], settings["lengths"][0]] - 1
             for name, seconds in cold.items()}
    found: dict[str, float | None] = {"cold run over the median, less 1": statistics.median(first.values()),
                                      "forced over unforced time, MLX": None}
    try:
        lazy = mlx_backend(plan, threads, forced=False)
    except MissingExtraError as error:
        notice("info", f"without MLX there is no lazy runtime to time without forcing it: {error}", where="backends")
        return found
    rng = np.random.default_rng(seed)
    batch, length = max(cell[1:] for cell in medians if cell[0] == "mlx")  # the largest that it was timed on
    ids, mask = rng.integers(4, plan.vocab, (batch, length)), np.ones((batch, length), bool)
    seconds = rounds({"lazy": _call(lazy, ids, mask)}, repeats=settings["repeats"], seed=seed)["lazy"].median
    found["forced over unforced time, MLX"] = medians["mlx", batch, length] / seconds
    found["rate over peak, unforced"] = _flops(plan, batch, length) / seconds / peak
    return found


RECIPE = Recipe(
    title="MLX-Transformers",
    paper="arXiv:2510.18921",
    claims=(
        Claim("Checkpoints of BERT, RoBERTa and XLM-RoBERTa load directly and agree with torch", "repository, tests",
              "largest difference, random weights", 1e-4, "at-most"),
        Claim("Parameter names of the second runtime are those of the checkpoint", "repository, models/base.py",
              "parameters without their own name", 0.0),
        Claim("A real checkpoint agrees with torch", "repository, tests/test_bert.py",
              "largest difference, real weights", 1e-4, "at-most"),
        Claim("Every runtime computes the same", "repository, tests", "largest difference between runtimes", 1e-3,
              "at-most"),
        Claim("Timed rates are possible: below the machine's peak", "card: harness", "rate over peak, fastest cell",
              1.0, "at-most"),
        Claim("Repeats agree within 10 %", "card: harness", "median coefficient of variation", 0.1, "at-most",
              why_not="The machine is a virtual one with neighbours: runs of the same texts differ by a quarter, "
                      "whichever the runtime. There are six repeats, and medians are compared."),
        Claim("Latency grows in proportion to batch times length", "card: small-scale check",
              "growth exponent of latency with tokens", 1.0, "equal", 0.25,
              why_not="Short texts do not fill a call: torch computes 50 tokens at about half of the rate of 200, so "
                      "that its time grows by a power of a half, and edgewise's by one of 0.87."),
        Claim("Cost per sequence falls with the batch", "card: small-scale check",
              "saving per sequence by batching, torch", 0.0, "order"),
        Claim("8 bits in groups of 64 keep embeddings", "card: small-scale check", "least cosine at 8 bits", 0.999,
              "at-least"),
        Claim("4 bits in groups of 64 keep embeddings roughly", "card: small-scale check", "least cosine at 4 bits",
              0.97, "at-least",
              why_not="All sentences lie between 0.960 and 0.973, 0.968 in the mean, whatever their length: it is the "
                      "format's rounding to the nearest and no outlier. The bound is the card's own guess."),
        Claim("8 bits take 0.28 of float32", "card: small-scale check", "size of the linears at 8 bits", 0.28, "equal",
              0.01),
        Claim("4 bits take 0.16 of float32", "card: small-scale check", "size of the linears at 4 bits", 0.16, "equal",
              0.01),
        Claim("On Apple silicon batch 1 takes less than on an A10", "second-hand note: 4.92 ms against 35.37 ms",
              "M2 Max over A10 latency, batch 1", 4.92 / 35.37, "equal", 0.05),
        Claim("Without the attention mask, padding leaks", "ablation", "difference without the mask", 1e-2, "at-least",
              ablation=True),
        Claim("Without RoBERTa's position offset, nothing agrees", "ablation", "difference without the position offset",
              1e-2, "at-least", ablation=True),
        Claim("tanh GELU for exact GELU is noticed", "ablation", "difference with tanh GELU", 1e-4, "at-least",
              ablation=True),
        Claim("Timing a lazy runtime without forcing it is ten times too fast", "ablation",
              "forced over unforced time, MLX", 10.0, "at-least", ablation=True),
        Claim("A timer that keeps the cold run is inflated", "ablation", "cold run over the median, less 1", 0.0,
              "order", ablation=True,
              why_not="The first run is no slower here than a later one: weights were touched when they were "
                      "packed, and a quarter of variation between repeats hides what is left."),
    ),
    scales={
        "smoke": {"model": "random", "hidden": 32, "sentences": 6, "tokens": 24, "batches": [1, 4],
                  "lengths": [8, 24], "repeats": 3, "most_s": 2.0},
        "small": {"model": "minilm", "hidden": 64, "sentences": 20, "tokens": 64, "batches": [1, 8],
                  "lengths": [50, 100, 200], "repeats": 6, "most_s": 2.0, "seeds": 3},
        "paper": {"model": "minilm", "hidden": 64, "sentences": 20, "tokens": 64, "batches": [1, 16, 32],
                  "lengths": [50, 100, 200, 500], "repeats": 10, "most_s": 60.0, "seeds": 5},
    },
    sources={"model": "inferred", "hidden": "inferred", "sentences": "inferred", "tokens": "inferred",
             "batches": "paper", "lengths": "paper", "repeats": "code", "most_s": "inferred"},
    run=run,
)
