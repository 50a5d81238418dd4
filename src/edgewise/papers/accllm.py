"""AccLLM on SmolLM2-135M: two of four weights, few bits, a cache in four bits, Lambda-shaped attention, recovery.

Liang et al., arXiv:2505.03745. The paper compresses Llama-2-7B and measures an FPGA; here the algorithm runs on a model
of 135 million parameters, and every number is measured in the engine: kept weights by the kernel for two of four, the
cache in groups of four bits, the window in its ring. Seeds are calibration samples and stretches of the text.
Recovery trains, which a model of that size does not allow in minutes: it is measured on a small Llama trained on the
offline text (train/small_llama.py). The accelerator is not part of this recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.prune.semi_structured import places_of
from edgewise.compress.quantize.w2a8kv4 import AccLlm, accllm, mask_of, quantize_kept
from edgewise.compress.walk import Group, walk
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import collect_notices
from edgewise.core.numbers import QuantFormat
from edgewise.core.recipe import Claim, Recipe
from edgewise.core.report import Quantity, Report, Table
from edgewise.core.stats import InputStats
from edgewise.core.storage import Sparse, Stored, rows_of
from edgewise.data.texts import text
from edgewise.data.tokenizer import tokenizer_of
from edgewise.engine.calibrate import EngineStats
from edgewise.engine.loading import model_of
from edgewise.engine.score import log_probs
from edgewise.formats.sources import open_checkpoint

__all__ = ["RECIPE"]

Ids = NDArray[np.int32]
Tensors = dict[str, dict[str, Stored]]
PRUNED = ("magnitude", "wanda", "sparsegpt")


def run(settings: Mapping[str, Any], seed: int, ablate: bool) -> Report:
    """One seed: the table of weights, activations and cache, long streams, and recovery."""
    source = _model(settings["model"], 0)
    rng = np.random.default_rng(seed)
    held_out = _ids(source, settings["held_out"])
    length, windows = settings["length"], settings["windows"]
    start = int(rng.integers(0, len(held_out) - length * windows))
    parts = held_out[start:start + length * windows].reshape(windows, length)
    made, errors = _variants(source, settings, rng)
    rows: dict[str, tuple[float, float]] = {"dense": (_perplexity(source, parts), _bits(source))}
    for name in list(made):
        variant = _with(source, made.pop(name), name)
        rows[name] = (_perplexity(variant, parts), _bits(variant))
        if name == "W2 GPTQ":
            broken = _broken(variant)
            rows["W2 GPTQ, A8, KV4"] = (_perplexity(variant, parts, kv="int4"), rows[name][1])
    dense = rows["dense"][1]
    rows["float inputs"] = (_perplexity(source, parts, activations="float32"), dense)
    rows["A8"] = rows["dense"]
    rows["KV16"] = (_perplexity(source, parts, kv="fp16"), dense)
    rows["KV4"] = (_perplexity(source, parts, kv="int4"), dense)
    perplexity = {name: row[0] for name, row in rows.items()}
    metrics: dict[str, float | None] = {
        "SparseGPT perplexity over magnitude, 2:4": perplexity["2:4 sparsegpt"] / perplexity["2:4 magnitude"],
        "Wanda perplexity over magnitude, 2:4": perplexity["2:4 wanda"] / perplexity["2:4 magnitude"],
        "masked GPTQ perplexity over rounding, W3": perplexity["W3 GPTQ"] / perplexity["W3 RTN"],
        "masked GPTQ perplexity over rounding, W2": perplexity["W2 GPTQ"] / perplexity["W2 RTN"],
        "rise of perplexity by A8": perplexity["A8"] / perplexity["float inputs"] - 1,
        "rise of perplexity by KV4": perplexity["KV4"] / perplexity["KV16"] - 1,
        "error of the linears by SparseGPT over magnitude": errors["2:4 sparsegpt"] / errors["2:4 magnitude"],
        "error of the linears by masked GPTQ over rounding, W2": errors["W2 GPTQ"] / errors["W2 RTN"],
        "fours that keep other than two": broken,
        "bytes of the linears at W2 over W4, both 2:4": rows["W2 GPTQ"][1] / rows["W4 GPTQ"][1],
    }
    streams, found = _streams(source, held_out, settings, rng, ablate)
    metrics |= found
    recovery, found = _recovery(settings, seed)
    metrics |= found
    return Report("accllm", tuple(Quantity(name, value) for name, value in metrics.items()), (
        Table("Weights, activations, cache", ("what", "perplexity", "bits per linear weight"),
              tuple((name, *row) for name, row in rows.items()), ("", "", "bit")), streams, recovery),
        environment={"held out": settings["held_out"], "calibrated on": settings["text"]})


# ---- weights ------------------------------------------------------------------------------------------------------

def _model(what: Any, seed: int) -> Checkpoint:
    if isinstance(what, str):
        return open_checkpoint(what)
    from edgewise.train.small_llama import SmallLlama, small_llama

    return small_llama(SmallLlama(**what, seed=seed))


def _ids(source: Checkpoint, name: str) -> Ids:
    return np.asarray(tokenizer_of(source).encode(text(name).content, add_special=False), np.int32)


def _variants(source: Checkpoint, settings: Mapping[str, Any],
              rng: np.random.Generator) -> tuple[Tensors, dict[str, float]]:
    """The linears of every variant by name, from one walk that sees the dense model's inputs. Pruned weights alone are
    kept in eight bits, as the model's own file has them. Second: |(W - W') X^T|^2 / |W X^T|^2, over all groups.
    """
    ids = _ids(source, settings["text"])
    count, length = settings["calibration_windows"], settings["calibration_length"]
    starts = rng.integers(0, len(ids) - length, count)
    stats = EngineStats(source, [ids[start:start + length] for start in starts], gram=True, threads=1)
    eight = QuantFormat.parse(settings["eight"])
    made: Tensors = {}
    errors: dict[str, float] = {}

    def change(group: Group, tensors: Mapping[str, Stored], seen: InputStats | None) -> dict[str, Stored]:
        assert seen is not None
        assert seen.gram is not None
        gram = seen.gram.astype(np.float32)
        weights = [np.asarray(tensors[name].dense(), np.float32) for name in group.names]
        ends = np.cumsum([0, *map(len, weights)])
        whole = np.concatenate(weights)
        size = float(np.vdot(whole @ gram, whole))

        def keep(variant: str, stored: Sparse) -> None:
            gap = whole - stored.dense()
            errors[variant] = errors.get(variant, 0.0) + float(np.vdot(gap @ gram, gap)) / size
            for name, first, last in zip(group.names, ends[:-1], ends[1:], strict=True):
                made.setdefault(variant, {})[name] = rows_of(stored, slice(int(first), int(last)))

        for score in PRUNED:
            pruned, mask = mask_of(whole, seen.gram, AccLlm(score=score))  # type: ignore[arg-type]
            keep(f"2:4 {score}", quantize_kept(pruned, mask, eight, None, AccLlm(search=False)))
        for bits in settings["bits"]:
            fmt = QuantFormat.parse(f"int{bits}/{settings['group']}/fp16/min")
            keep(f"W{bits} RTN", quantize_kept(pruned, mask, fmt))  # of the last mask, SparseGPT's
            keep(f"W{bits} GPTQ", quantize_kept(whole, mask, fmt, seen.gram))
        return {}

    walk(source, change, stats, step=Step("accllm", {}, ""))
    return made, errors


def _with(source: Checkpoint, tensors: Mapping[str, Stored], name: str) -> Checkpoint:
    return source.with_tensors({**{key: source.tensors[key] for key in source.tensors}, **tensors},
                               Step("accllm", {"variant": name}, ""))


def _perplexity(checkpoint: Checkpoint, parts: Ids, **options: Any) -> float:
    with collect_notices():
        model = model_of(checkpoint, threads=1, context=parts.shape[1], cache=False, **options)
        return math.exp(-float(np.mean([log_probs(model, ids).mean() for ids in parts])))


def _linears(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.tensors if name.endswith("_proj.weight")]


def _bits(checkpoint: Checkpoint) -> float:
    """Per weight of the dense linears."""
    names = _linears(checkpoint)
    return (8 * sum(checkpoint.tensors[name].nbytes for name in names)
            / sum(math.prod(checkpoint.tensors[name].shape) for name in names))


def _broken(checkpoint: Checkpoint) -> float:
    """Fours of inputs with more than two weights, or places that are not two of four."""
    count = 0
    for name in _linears(checkpoint):
        stored = checkpoint.tensors[name]
        assert isinstance(stored, Sparse)
        dense = stored.dense()
        count += int((np.count_nonzero(dense.reshape(len(dense), -1, 4), axis=2) > 2).sum())
        mask = np.ones((len(dense), dense.shape[1] // 4, 4), bool)
        np.put_along_axis(mask, stored.index.reshape(len(dense), -1, 2).astype(np.int64), False, axis=2)
        count += int((places_of(mask.reshape(dense.shape)) != stored.index).sum())
    return float(count)


# ---- attention ----------------------------------------------------------------------------------------------------

def _streams(source: Checkpoint, ids: Ids, settings: Mapping[str, Any], rng: np.random.Generator,
             ablate: bool) -> tuple[Table, dict[str, float | None]]:
    """A long text in one sequence: all of it seen, sinks and a window, a window alone."""
    near, far, sinks, window = (settings["stream"][key] for key in ("near", "far", "sinks", "window"))
    start = int(rng.integers(0, len(ids) - far - near))
    stream = ids[start:start + far + near]
    sizes = set()

    def losses(tokens: Ids, attention: str) -> NDArray[np.float64]:
        with collect_notices():
            context = None if attention != "full" else len(tokens)
            model = model_of(source, threads=1, context=context, attention=attention, cache=False)
            found = -log_probs(model, tokens)
        if attention != "full":
            sizes.add(model.memory.kv_bytes)
        return found

    shaped = f"sink={sinks},window={window}"
    inside = losses(stream[:near], "full").mean()
    long = losses(stream, shaped)
    beyond = losses(stream[far:], "full").mean()  # the same tokens, from an empty context
    losses(stream[:window], shaped)
    rows: list[tuple[str, float, float]] = [
        ("all", math.exp(inside), math.exp(beyond)),
        (shaped, math.exp(long[:near - 1].mean()), math.exp(long[far:].mean()))]
    found: dict[str, float | None] = {
        "perplexity of sinks and window over all, within the context": rows[1][1] / rows[0][1],
        "perplexity of sinks and window beyond, over all from anew": rows[1][2] / rows[0][2],
        "cache bytes of a long text over those of a short": float(max(sizes) / min(sizes))}
    if ablate:
        alone = losses(stream[:near], f"sink=0,window={sinks + window}")
        rows.append(("window alone", math.exp(alone.mean()), math.nan))
        found["perplexity of a window without sinks over that with"] = rows[2][1] / rows[1][1]
    table = Table(f"{far + near} tokens in one sequence", ("attention", f"perplexity of the first {near}",
                                                           f"of {near} after {far}"),
                  tuple((name, a, None if math.isnan(b) else b) for name, a, b in rows))
    return table, found


# ---- recovery -----------------------------------------------------------------------------------------------------

def _recovery(settings: Mapping[str, Any], seed: int) -> tuple[Table, dict[str, float | None]]:
    """A small Llama at two bits, as compressed and after training with the mask held, in the engine."""
    from edgewise.train.sparse_recovery import Recovery, recover

    chosen = settings["recovery"]
    teacher = _model(chosen["model"], seed)
    ids, held_out = _ids(teacher, chosen["model"]["text"]), _ids(teacher, settings["held_out"])
    length = chosen["length"]
    parts = held_out[:chosen["windows"] * length].reshape(-1, length)
    rng = np.random.default_rng(seed)
    starts: Sequence[int] = rng.integers(0, len(ids) - length, chosen["calibration_windows"]).tolist()
    stats = EngineStats(teacher, [ids[start:start + length] for start in starts], gram=True, sequential=True, threads=1)
    fmt = QuantFormat.parse(f"int2/{chosen['group']}/fp16/min")
    student = walk(teacher, accllm(fmt, AccLlm()), stats, step=Step("accllm", {}, ""))
    better = recover(student, teacher, ids.astype(np.int64), Recovery(
        steps=chosen["steps"], batch=chosen["batch"], length=length, learning_rate=chosen["learning_rate"], seed=seed))
    rows = {name: _perplexity(each, parts) for name, each in (
        ("dense", teacher), ("2:4 W2", student), ("2:4 W2, recovered", better))}
    dense, before, after = (math.log(value) for value in rows.values())
    moved = sum(int((student.tensors[name].index != better.tensors[name].index).sum())  # type: ignore[attr-defined]
                for name in _linears(student))
    return Table("Recovery of a small Llama", ("model", "perplexity"), tuple(rows.items())), {
        "share of the log-perplexity gap at W2 that recovery removes": (before - after) / (before - dense),
        "places that recovery moved": float(moved)}


def _claims() -> tuple[Claim, ...]:
    card = "card: small-scale check"
    return (
        Claim("SparseGPT keeps better than magnitude at 2:4", card, "SparseGPT perplexity over magnitude, 2:4", 0.7,
              "at-most"),
        Claim("Wanda keeps better than magnitude at 2:4", "inferred", "Wanda perplexity over magnitude, 2:4", 1.0,
              "at-most"),
        Claim("and its linears give half of the error", "inferred",
              "error of the linears by SparseGPT over magnitude", 0.5, "at-most"),
        Claim("GPTQ's order with the mask frozen beats rounding at 3 bits", card,
              "masked GPTQ perplexity over rounding, W3", 0.5, "at-most",
              why_not="One sample of the calibration text gives 0.508: perplexities of rounded weights are in the "
                      "thousands and swing with it. GPTQ is ahead with every sample."),
        Claim("and at 2 bits", "inferred", "masked GPTQ perplexity over rounding, W2", 0.5, "at-most"),
        Claim("whose error of the linears it lowers", "inferred",
              "error of the linears by masked GPTQ over rounding, W2", 1.0, "at-most"),
        Claim("Activations in 8 bits cost less than 1 %", card, "rise of perplexity by A8", 0.01, "at-most"),
        Claim("Keys and values in 4 bits cost less than 5 %", card, "rise of perplexity by KV4", 0.05, "at-most"),
        Claim("The mask is kept everywhere", card, "fours that keep other than two", 0.0),
        Claim("Two bits for four, places kept: 2.5 for 3.5 bits a weight", "arithmetic",
              "bytes of the linears at W2 over W4, both 2:4", 2.5 / 3.5, "equal", 1e-6),
        Claim("Sinks and a window come within 10 % of full attention inside the context", card,
              "perplexity of sinks and window over all, within the context", 1.1, "at-most"),
        Claim("and beyond it go on as a text that begins anew", card,
              "perplexity of sinks and window beyond, over all from anew", 1.1, "at-most",
              why_not="The text repeats whole articles some thousand tokens apart, which full attention reads off: in "
                      "one stretch of 512 tokens it has a perplexity of 3 and the window one of 25. In the seven other "
                      "stretches of that seed the two are within 6 %, and the window goes on as it would from anew."),
        Claim("The cache does not grow with the text", "abstract", "cache bytes of a long text over those of a short",
              1.0),
        Claim("Recovery removes 30 % of the gap at 2 bits", card,
              "share of the log-perplexity gap at W2 that recovery removes", 0.3, "at-least"),
        Claim("and moves no place", card, "places that recovery moved", 0.0),
        Claim("A window without sinks more than doubles the perplexity", card,
              "perplexity of a window without sinks over that with", 2.0, "at-least", ablation=True,
              why_not="It comes to 1.88 to 1.97 times: to a model of 135 million parameters the first tokens matter a "
                      "little less than to one of seven billion."),
    )


_TINY = {"hidden": 32, "layers": 2, "width": 64, "vocab": 320, "context": 64, "steps": 12, "batch": 8,
         "learning_rate": 1e-2, "text": "pydoc"}
_SMALL = {"hidden": 128, "layers": 4, "width": 256, "vocab": 2048, "context": 128, "steps": 600, "batch": 16,
          "learning_rate": 3e-3, "text": "wikipedia_pages/training"}
RECIPE = Recipe(
    title="AccLLM",
    paper="arXiv:2505.03745",
    claims=_claims(),
    scales={
        "smoke": {"model": _TINY, "held_out": "pydoc", "text": "pydoc", "length": 64, "windows": 8,
                  "calibration_windows": 8, "calibration_length": 64, "bits": [4, 3, 2], "group": "g32",
                  "eight": "int8/g32/fp16",
                  "stream": {"near": 128, "far": 384, "sinks": 4, "window": 60},
                  "recovery": {"model": _TINY, "length": 32, "windows": 16, "calibration_windows": 16, "group": "g32",
                               "steps": 30, "batch": 4, "learning_rate": 3e-3}},
        "small": {"model": "smollm2", "held_out": "lee_background", "text": "wikipedia_pages/calibration",
                  "length": 512, "windows": 8, "calibration_windows": 8, "calibration_length": 512,
                  "bits": [4, 3, 2], "group": "g64", "eight": "int8/g64/fp16",
                  "stream": {"near": 4096, "far": 8192, "sinks": 4, "window": 508},
                  "recovery": {"model": _SMALL, "length": 64, "windows": 64, "calibration_windows": 64, "group": "g64",
                               "steps": 300, "batch": 8, "learning_rate": 1e-3},
                  "seeds": 3},
        "paper": {"model": "smollm2", "held_out": "lee_background", "text": "wikipedia_pages/calibration",
                  "length": 2048, "windows": 32, "calibration_windows": 128, "calibration_length": 2048,
                  "bits": [4, 3, 2], "group": "g64", "eight": "int8/g64/fp16",
                  "stream": {"near": 8192, "far": 32768, "sinks": 4, "window": 2044},
                  "recovery": {"model": _SMALL, "length": 128, "windows": 256, "calibration_windows": 256,
                               "group": "g64", "steps": 20_000, "batch": 16, "learning_rate": 1e-3},
                  "seeds": 3},
    },
    sources={"model": "inferred", "held_out": "inferred", "text": "inferred", "length": "inferred",
             "windows": "inferred", "calibration_windows": "inferred", "calibration_length": "inferred",
             "bits": "abstract", "group": "inferred", "eight": "inferred", "stream": "inferred",
             "recovery": "inferred"},
    run=run,
)
