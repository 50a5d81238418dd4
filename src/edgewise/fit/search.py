"""A model made to fit a Budget: measure sensitivities, choose, build, measure what came out, write it.

    from edgewise.fit import fit
    result = fit("smollm2", Budget(memory_bytes=90_000_000), out="small")
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgewise.core.budget import Budget
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import BudgetError, InvalidValueError, collect_notices, notice
from edgewise.core.numbers import QuantFormat
from edgewise.core.report import Report
from edgewise.core.storage import LazyTensors, Stored
from edgewise.data.texts import Text, text
from edgewise.data.tokenizer import tokenizer_of
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import model_of
from edgewise.engine.model import LanguageModel
from edgewise.engine.packing import pack_one, recipe_of
from edgewise.fit.allocate import bound_of, front_of
from edgewise.fit.candidates import LADDER, Candidate, TensorGroup, candidates_of, groups_of, items_of
from edgewise.fit.choose import Choice, Space, choose, context_limit, front_with_kv
from edgewise.fit.refine import by_gptq
from edgewise.fit.result import Measured, pareto_plot, report_of
from edgewise.fit.rounding import with_parts
from edgewise.fit.sensitivity import (
    SOURCE_KV,
    Bench,
    Reference,
    Sample,
    errors_of,
    importance_of,
    kl_rows,
    rates_of,
    sample_of,
)
from edgewise.formats.cache import write_aside
from edgewise.formats.folder_writer import check_target, write_folder
from edgewise.formats.sources import open_checkpoint
from edgewise.measure.machine import usable_cores

__all__ = ["FitResult", "fit"]

Progress = Callable[[str, int, int], None]
Search = Literal["quick", "full"]
METHODS = ("rtn", "gptq")
TOKENS = {"quick": 512, "full": 1024}
"""That sensitivities are measured on."""
CALIBRATED = {"quick": 8192, "full": 24576}
"""That GPTQ is calibrated on."""
BANDS = 5
"""Of layers, which a quick search measures together; a full one measures every weight by itself."""
_LEAST_CALIBRATED = 2048
_TRIES = 6
_NEAR = 0.85
"""Of the divergence that a quality allows: a result that uses less is tried to be made smaller, once."""
KVS = ("int8", "int4")
"""KV formats beside the source's."""
_SPEED_TOKENS = 48


@dataclass(frozen=True)
class FitResult:
    """The fitted model, as a Checkpoint that loads and as a folder where one was asked for, and the Report."""

    checkpoint: Checkpoint
    report: Report
    folder: Path | None = None


def fit(source: str | os.PathLike[str] | Checkpoint, budget: Budget, *, out: str | Path | None = None,
        context: int | None = None, text_from: str | Sequence[int] = "pydoc", search: Search = "quick",
        formats: Sequence[str | QuantFormat] | None = None, methods: Sequence[str] = METHODS,
        threads: int | None = None, overwrite: bool = False, offline: bool | None = None,
        progress: Progress | None = None) -> FitResult:
    """Choose a number format for every weight, the KV format and the context, within a budget.

    budget: memory_bytes, storage_bytes and quality are used; quality alone takes the least memory that reaches it.
    context: positions; by default as many as fit, at least 1024 where possible. out: a folder to write.
    text_from: a text as `edgewise.data.texts.text` names it, or token ids. search: "full" measures every weight by
    itself instead of bands of layers, on twice the text. formats: instead of the ladder. methods: "gptq" is tried on
    what was chosen, and kept where it is closer to the source than rounding ("rtn").
    Raises BudgetError with the smallest budget that can be met, and what `load` raises.
    """
    check_question(budget, context, search, methods)
    if out is not None:
        check_target(out, overwrite=overwrite)
    threads = threads or usable_cores().usable
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(
        os.fspath(source), offline=offline, progress=progress)
    bench = Bench(checkpoint, threads=threads, progress=progress)
    name, digest, ids = ids_of(checkpoint, text_from, offline, progress)
    sample = sample_of(ids, context=context_limit(bench.plan), tokens=TOKENS[search],
                       calibrated=CALIBRATED[search] if "gptq" in methods else 0)

    started = time.perf_counter()
    ladder = [fmt if isinstance(fmt, QuantFormat) else QuantFormat.parse(fmt) for fmt in formats or LADDER]
    items = items_of(bench.plan)
    candidates = [candidates_of(item, ladder, None) for item in items]
    other = other_bytes(checkpoint)
    possible(bench, candidates, threads, other, budget, context)
    importance = importance_of(checkpoint, sample, threads)
    reference = bench.reference(sample.search)
    groups = items if search == "full" else groups_of(bench.plan, bands=BANDS)
    rates = rates_of(bench, reference, groups, importance, progress)
    kls = errors_of(items, candidates, rates, importance, threads, progress)
    kvs = {SOURCE_KV: 0.0, **{kv: bench.kl(reference, kv=kv) for kv in KVS}}
    searched_s = time.perf_counter() - started

    space = Space(bench.plan, [front_of(candidates, kls, by) for by in ("packed", "stored")], kvs, threads, other)
    fitted = Fitted(checkpoint, bench, items, candidates, importance, budget, digest, search, reference, sample,
                     tuple(methods), progress)
    choice, result, before, after = _settle(fitted, space, sample, context, threads)

    folder: Path | None = None
    lineage = result.lineage
    if out is not None:
        folder = write_folder(result, out, overwrite=overwrite, progress=progress)
        after = replace(after, disk_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    report = report_of(
        f"{checkpoint.metadata.get('name') or checkpoint.source}: fitted to {budget!r}", before, after, choice, items,
        candidates, kls, front_with_kv(space, choice.context), text=(name, digest), positions=sample.check.size,
        seconds={"sensitivities": searched_s, "all": time.perf_counter() - started},
        methods=fitted.said.get(choice.allocation.picks, {}),
        bound=bound_of(candidates, kls, choice.allocation.packed_bytes) + kvs[choice.kv],
        exact=all(front.exact for front in space.fronts),
        written=None if folder is None else str(folder), lineage=lineage)
    if broken := budget.check(report):
        raise BudgetError(f"{broken[0]}, though the choice was made for less; ask for a little less")
    if folder is not None:
        beside(folder, report, pareto_plot(report))
    return FitResult(result, report, folder)


def check_question(budget: Budget, context: int | None, search: str, methods: Sequence[str]) -> None:
    """Raises InvalidValueError for what cannot be asked."""
    if not methods or set(methods) - set(METHODS) or "rtn" not in methods:
        raise InvalidValueError(f"methods are rtn, or rtn and gptq; given {', '.join(methods) or 'none'}")
    used = {"memory_bytes", "storage_bytes", "quality"}
    if not budget.limits().keys() & used:
        raise InvalidValueError("fit needs a limit: memory, storage or quality; given none of them")
    if others := budget.limits().keys() - used:
        raise InvalidValueError(f"fit chooses by memory, storage and quality; given also {', '.join(sorted(others))}")
    if context is not None and context < 1:
        raise InvalidValueError(f"a context has at least one position; given {context}")
    if search not in TOKENS:
        raise InvalidValueError(f"search is {' or '.join(TOKENS)}; given {search!r}")


def possible(bench: Bench, candidates: Sequence[Sequence[Candidate]], threads: int, other_bytes: int, budget: Budget,
              context: int | None) -> None:
    """An impossible memory or storage is an error before anything is measured."""
    zeros = [[0.0] * len(choices) for choices in candidates]
    fronts = [front_of(candidates, zeros, by) for by in ("packed", "stored")]
    space = Space(bench.plan, fronts, dict.fromkeys((SOURCE_KV, *KVS), 0.0), threads, other_bytes, measured=False)
    with collect_notices():  # they are given when the choice is made
        choose(space, budget, context)


def ids_of(checkpoint: Checkpoint, text_from: str | Sequence[int], offline: bool | None,
         progress: Progress | None) -> tuple[str, str, NDArray[np.int32]]:
    """(name, SHA-256, token ids) of the text."""
    if not isinstance(text_from, str):
        ids = np.asarray(text_from, np.int32)
        return "token ids", Text.of("", ",".join(map(str, ids))).sha256, ids
    if "tokenizer" not in checkpoint.metadata:
        raise InvalidValueError(f"{checkpoint.source}: the model carries no tokenizer; give token ids as the text")
    known = text(text_from, offline=offline, progress=progress)
    encoded = tokenizer_of(checkpoint).encode(known.content, add_special=False)
    return known.name, known.sha256, np.asarray(encoded, np.int32)


def other_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a folder besides the weights that take formats: other tensors, tokenizer, configuration, reports."""
    weights = {name.partition("[")[0] for item in items_of(plan_of(checkpoint)) for name in item.weights}
    weights |= {name.removesuffix(".left").removesuffix(".right") for name in weights}
    tensors = sum(checkpoint.tensors[name].nbytes for name in checkpoint.tensors if name not in weights)
    return tensors + beside_bytes(checkpoint)


def beside_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a folder besides all tensors."""
    tokenizer = checkpoint.metadata.get("tokenizer", b"")
    size = len(tokenizer) if isinstance(tokenizer, bytes) else len(json.dumps(tokenizer, default=str))
    return size + 1200 * len(checkpoint.tensors) + 50_000


@dataclass(eq=False)
class Fitted:
    """Makes the checkpoint of a choice. said: by the picks of what was made, the divergence that each method gave."""

    source: Checkpoint
    bench: Bench
    items: Sequence[TensorGroup]
    candidates: Sequence[Sequence[Candidate]]
    importance: Mapping[str, NDArray[np.float32]]
    budget: Budget
    text_sha256: str
    search: Search
    reference: Reference
    sample: Sample
    methods: tuple[str, ...]
    progress: Progress | None
    said: dict[tuple[int, ...], dict[str, float]] = field(default_factory=dict)

    def checkpoint(self, choice: Choice) -> Checkpoint:
        """The codes of every changed weight are held, a byte each."""
        changed: dict[str, Stored] = {}
        formats: dict[str, QuantFormat] = {}
        chosen: dict[str, str] = {}
        for item, choices, pick in zip(self.items, self.candidates, choice.allocation.picks, strict=True):
            candidate = choices[pick]
            chosen[item.name if item.layer is None else f"{item.layer} {item.name}"] = candidate.label
            for name in candidate.replaced:
                assert candidate.format is not None
                formats[name] = candidate.format
                changed[name] = self.bench.rounded(item, name, candidate, self.importance)
        changed, method = self._best(changed, formats, choice.allocation.picks)
        run: dict[str, Any] = {"kv": choice.kv, "context": choice.context}
        if self.budget.memory_bytes is not None:
            run["memory_bytes"] = self.budget.memory_bytes
        step = Step("fit", {"formats": chosen, "method": method, **run, "budget": self.budget.limits(),
                            "search": self.search, "text_sha256": self.text_sha256}, _version())
        return replace(self.source.with_tensors(_exchanged(self.source, changed), step, edgewise_run=run), files=())

    def _best(self, rounded: dict[str, Stored], formats: Mapping[str, QuantFormat],
              picks: tuple[int, ...]) -> tuple[dict[str, Stored], str]:
        """The method whose weights are closest to the source on the windows of the search, and its name."""
        if not rounded or "gptq" not in self.methods:
            return rounded, "rtn"
        if self.sample.calibration.size < _LEAST_CALIBRATED:
            notice("info", f"GPTQ was not tried: between the parts that are measured on, the text has "
                   f"{self.sample.calibration.size} tokens, and {_LEAST_CALIBRATED} are needed", where="fit")
            return rounded, "rtn"
        layers = {name for item in self.items if item.layer is not None for name in item.weights}
        outside = {name: stored for name, stored in rounded.items() if name not in layers}
        base = self.source.with_tensors(_exchanged(self.source, outside), Step("fit"))
        refined = by_gptq(base, formats, self.sample.calibration, self.bench.threads, self.progress)
        if not refined:
            return rounded, "rtn"
        options = {"rtn": rounded, "gptq": {**rounded, **refined}}
        said = self.said[picks] = {
            name: self.bench.kl(self.reference, {weight: pack_one(recipe_of(weight, stored))
                                                 for weight, stored in tensors.items()})
            for name, tensors in options.items()}
        best = min(said, key=said.__getitem__)
        return options[best], best


def _exchanged(source: Checkpoint, changed: Mapping[str, Stored]) -> LazyTensors:
    tensors = source.tensors
    owners = {name if name in tensors else name.rpartition(".")[0] for name in changed}
    makers: dict[str, Callable[[], Stored]] = {
        name: (lambda name=name: with_parts(name, tensors[name], changed) if name in owners  # type: ignore[misc]
               else tensors[name])
        for name in tensors}
    return LazyTensors(makers)


def _version() -> str:
    from edgewise import __version__

    return __version__


def _settle(fitted: Fitted, space: Space, sample: Sample, context: int | None,
            threads: int) -> tuple[Choice, Checkpoint, Measured, Measured]:
    """Choose, build and measure; where a quality is asked for and not reached, choose again with more care."""
    budget = fitted.budget
    wanted = None if budget.quality is None else -math.log(budget.quality)
    led = wanted is not None and budget.memory_bytes is None and budget.storage_bytes is None
    limit = wanted if led else None
    reached: list[float] = []
    found: tuple[Choice, Checkpoint, Measured, Measured] | None = None
    for _ in range(_TRIES):
        choice = choose(space, budget, context, kl_limit=limit)
        if found is not None and choice.memory_bytes >= found[0].memory_bytes:
            return found
        result = fitted.checkpoint(choice)
        source_model = model_of(fitted.source, threads=threads, kv=SOURCE_KV, context=choice.context)
        model = model_of(result, threads=threads, cache=False)
        before, after = _measured(source_model, model, fitted, choice, sample)
        assert after.kl is not None
        if wanted is None or after.kl <= wanted:
            last = found is not None or limit is None or wanted is None or after.kl >= _NEAR * wanted
            found = choice, result, before, after
            if last:
                return found
            assert wanted is not None
            limit = choice.kl * min(0.97 * wanted / max(after.kl, 1e-12), 4.0)  # there is room: once more with less
            continue
        if found is not None:
            return found
        reached.append(math.exp(-after.kl))
        if not led:
            break
        assert limit is not None
        # Divergences do not quite add up: ask for as much less as was missed.
        limit = min(limit, choice.kl) * min(wanted / after.kl, 0.95)
        if choice.kl == 0.0:
            break
    if found is not None:
        return found
    raise BudgetError(f"{budget!r} cannot be met: the best choice reaches quality {max(reached):.6f}, measured; "
                      "give more memory or storage, or ask for less quality")


def _measured(source: LanguageModel, model: LanguageModel, fitted: Fitted, choice: Choice,
              sample: Sample) -> tuple[Measured, Measured]:
    """Both models on the windows of the check, then in turns at decoding."""
    kls, same, losses = [], [], ([], [])  # type: ignore[var-annotated]
    for window in sample.check:
        ids = window[:choice.context]
        logits = [each.forward(ids) for each in (source, model)]
        kls.append(kl_rows(logits[0], logits[1]))
        same.append(logits[0].argmax(axis=-1) == logits[1].argmax(axis=-1))
        for loss, rows in zip(losses, logits, strict=True):
            top = rows.max(axis=-1)
            total = top + np.log(np.exp(rows - top[:, None]).sum(axis=-1, dtype=np.float64))
            loss.append((total[:-1] - rows[np.arange(len(ids) - 1), ids[1:]]).astype(np.float64))
    kl = np.concatenate(kls)
    perplexities = [math.exp(float(np.concatenate(loss).mean())) for loss in losses]
    speeds = speeds_of((source, model), sample.check[0], choice.context)
    allocation = choice.allocation
    stored = sum(group.stored_bytes for group in fitted.items)
    parameters = sum(group.parameters for group in fitted.items)
    disk = (sum(os.path.getsize(path) for path in fitted.source.files) or fitted.source.nbytes,
            allocation.stored_bytes + fitted.source.nbytes - stored)
    return (
        Measured(disk[0], source.memory, 8 * stored / parameters, source.kv, source.context, perplexities[0],
                 speeds[0]),
        Measured(disk[1], model.memory, 8 * allocation.stored_bytes / parameters, model.kv, model.context,
                 perplexities[1], speeds[1], float(kl.mean()), float(kl.std() / math.sqrt(len(kl))),
                 float(np.concatenate(same).mean())))


def speeds_of(models: Sequence[LanguageModel], ids: NDArray[np.int32], context: int) -> list[float]:
    """Tokens per second of greedy decoding: the best of three turns of each model, taken alternately."""
    tokens = min(_SPEED_TOKENS, context // 2)
    prompt = [int(i) for i in ids[:min(32, context // 2)]]
    if tokens < 2 or not prompt:
        return [math.nan] * len(models)
    best = [0.0] * len(models)
    for _ in range(3):
        for place, model in enumerate(models):
            model.reset()
            done = model.generate(prompt, max_tokens=tokens, ignore_eos=True).result()
            best[place] = max(best[place], (len(done.ids) - 1) / max(done.decode_s, 1e-9))
            model.reset()
    return best


def beside(folder: Path, report: Report, plot: str) -> None:
    """The report and its plot, next to the model."""
    for name, content in (("fit.json", json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n"),
                          ("fit.svg", plot)):
        with write_aside(folder / name) as file:
            file.write(content.encode("utf-8"))
