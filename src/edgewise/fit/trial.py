"""One pipeline on one model: its steps one after the other, what each cost and lost, and whether a budget holds it.

Divergence is mean KL(source || model) on the windows of the search, by the engine; memory is weights, KV cache and
scratch at the chosen context. What a pipeline begins with is made once for all pipelines that begin so, see memo.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgewise import __version__
from edgewise.core.budget import Budget
from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import (
    BudgetError,
    InvalidValueError,
    Notice,
    UnsupportedError,
    collect_notices,
    require,
)
from edgewise.core.numbers import QuantFormat
from edgewise.core.plain import from_plain, to_plain
from edgewise.fit.allocate import front_of
from edgewise.fit.candidates import candidates_of, groups_of, items_of
from edgewise.fit.choose import Choice, Space, choose
from edgewise.fit.dispatch import WINDOWS, Calibration
from edgewise.fit.memo import Memo
from edgewise.fit.pruners import pruner_of
from edgewise.fit.search import BANDS, KVS, Fitted, beside_bytes, other_bytes, possible
from edgewise.fit.sensitivity import SOURCE_KV, Bench, Reference, Sample, errors_of, importance_of, rates_of
from edgewise.fit.steps import PER_WEIGHT, Form, PipelineStep, applied, form_after, form_at_start, key_of
from edgewise.formats.cache import files_key

__all__ = ["Evaluator", "Problem", "StepCost", "Trial", "source_key"]

Progress = Callable[[str, int, int], None]
Pipeline = tuple[PipelineStep, ...]
_QUALITY_TRIES = 3


@dataclass(frozen=True)
class StepCost:
    """What a step did. weights_bytes: in the engine, stored_bytes: in a file, after it. kl: in nats, of what it left.
    seconds: it took when it was made; reused: another pipeline began so, and it was not made again."""

    step: PipelineStep
    weights_bytes: int
    stored_bytes: int
    kl: float
    seconds: float
    reused: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "step": self.step.to_json()}

    @classmethod
    def from_json(cls, data: Any) -> StepCost:
        return cls(**{**data, "step": PipelineStep.from_json(data["step"])})


@dataclass(frozen=True)
class Trial:
    """A pipeline as measured. outcome: "ok"; "over", of the budget; "failed", a step could not take the model.

    reason: of the last two. kl, memory_bytes, kv and context are those of the whole, None where it was not made.
    """

    pipeline: Pipeline
    outcome: str
    steps: tuple[StepCost, ...] = ()
    kl: float | None = None
    memory_bytes: int | None = None
    stored_bytes: int | None = None
    kv: str = ""
    context: int = 0
    method: str = ""
    reason: str = ""
    notices: tuple[Notice, ...] = field(default=(), compare=False)

    @property
    def quality(self) -> float | None:
        return None if self.kl is None else math.exp(-self.kl)

    @property
    def seconds(self) -> float:
        """That its steps took when they were made."""
        return sum(cost.seconds for cost in self.steps)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "pipeline": [step.to_json() for step in self.pipeline],
                "steps": [cost.to_json() for cost in self.steps], "notices": [item.to_json() for item in self.notices]}

    @classmethod
    def from_json(cls, data: Any) -> Trial:
        return cls(**{**data, "pipeline": tuple(map(PipelineStep.from_json, data["pipeline"])),
                      "steps": tuple(map(StepCost.from_json, data["steps"])),
                      "notices": tuple(map(Notice.from_json, data["notices"]))})


@dataclass(frozen=True, eq=False)
class Problem:
    """What all pipelines are tried on. ladder: formats of a bits step per weight. methods: of that step.

    text_name, text_sha256: of the text that the sample is of.
    """

    checkpoint: Checkpoint
    budget: Budget
    sample: Sample
    text_name: str
    text_sha256: str
    ladder: tuple[QuantFormat, ...]
    methods: tuple[str, ...]
    context: int | None = None
    threads: int = 1

    @property
    def key(self) -> str:
        """Of all that a result depends on: threads do not change it."""
        parts = [__version__, source_key(self.checkpoint), self.budget.limits(), self.text_sha256,
                 [list(each.shape) for each in (self.sample.search, self.sample.check, self.sample.calibration)],
                 list(map(str, self.ladder)), self.methods, self.context]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def calibration(self, needs: str) -> Calibration:
        """So many windows as a step needs."""
        windows = self.sample.calibration[:WINDOWS[needs]] if needs in WINDOWS else self.sample.calibration
        return Calibration(windows, self.sample.check, self.text_name, self.text_sha256)

    def save(self, folder: Path) -> None:
        """For another process: the sample and the settings. The checkpoint is its own affair."""
        np.savez(folder / "sample.npz", **vars(self.sample))
        (folder / "problem.json").write_text(json.dumps({
            "budget": to_plain(self.budget), "text": [self.text_name, self.text_sha256],
            "ladder": list(map(str, self.ladder)), "methods": self.methods, "context": self.context}), "utf-8")

    @classmethod
    def load(cls, folder: Path, checkpoint: Checkpoint, threads: int) -> Problem:
        """What `save` wrote."""
        data = json.loads((folder / "problem.json").read_text("utf-8"))
        with np.load(folder / "sample.npz") as arrays:
            sample = Sample(**{name: arrays[name] for name in arrays.files})
        return cls(checkpoint, from_plain(Budget, data["budget"], "budget"), sample, *data["text"],
                   tuple(map(QuantFormat.parse, data["ladder"])), tuple(data["methods"]), data["context"], threads)


def source_key(checkpoint: Checkpoint) -> str:
    """The contents of a checkpoint, of its files where it has any."""
    if checkpoint.files:
        return files_key(checkpoint.files)
    digest = hashlib.sha256(json.dumps(dict(checkpoint.config), sort_keys=True, default=str).encode())
    for name in sorted(checkpoint.tensors):
        digest.update(name.encode() + np.ascontiguousarray(checkpoint.tensors[name].dense()).tobytes())
    return digest.hexdigest()


class Evaluator:
    """Tries pipelines on a problem, one at a time.

    The engine's sums do not depend on how many threads there are, those of a BLAS do: it is held to one, so that every
    worker on every machine finds the same.
    """

    def __init__(self, problem: Problem, memo: Memo, progress: Progress | None = None, *,
                 key: str | None = None) -> None:
        self.problem, self.memo, self.progress = problem, memo, progress
        source = Bench(problem.checkpoint, threads=problem.threads)
        self.reference: Reference = source.reference(problem.sample.search)
        self.source_bytes = (source.weights_bytes, problem.checkpoint.nbytes)
        self._key = problem.key if key is None else key
        self._limits = require("threadpoolctl", extra="search", purpose="a search over pipelines").threadpool_limits

    def trial(self, pipeline: Pipeline) -> Trial:
        """The pipeline as measured; what cannot be is an outcome with its reason, and no error."""
        costs: list[StepCost] = []
        with collect_notices() as notices, self._limits(1, "blas"):
            try:
                trial = self._trial(pipeline, costs)[0]
            except BudgetError as error:
                trial = Trial(pipeline, "over", tuple(costs), reason=str(error))
            except (InvalidValueError, UnsupportedError, ImportError, np.linalg.LinAlgError) as error:
                trial = Trial(pipeline, "failed", tuple(costs), reason=str(error))
        return replace(trial, notices=tuple(item for item in notices if item.kind != "info"))

    def made(self, pipeline: Pipeline) -> tuple[Checkpoint, Trial]:
        """The model of a pipeline, made again or as it was kept."""
        with self._limits(1, "blas"):
            trial, checkpoint = self._trial(pipeline, [])
        return checkpoint, trial

    def steps(self, pipeline: Pipeline) -> tuple[StepCost, ...]:
        """What the steps cost and lose, whatever the budget says. Of one format for all, where there are bits."""
        with self._limits(1, "blas"):
            return self._shaped(pipeline)[1]

    # ---- the steps

    def _trial(self, pipeline: Pipeline, costs: list[StepCost]) -> tuple[Trial, Checkpoint]:
        for place, step in enumerate(pipeline):
            if step.kind == "bits" and step["format"] == PER_WEIGHT and place + 1 < len(pipeline):
                raise InvalidValueError("a format for each weight is the last step: what a budget leaves is known then")
        per_weight = bool(pipeline) and pipeline[-1].kind == "bits" and pipeline[-1]["format"] == PER_WEIGHT
        key = f"{self._key} whole {key_of(pipeline)}"
        if (held := self.memo.get(key)) is not None:
            return Trial.from_json(held[1]), self._named(held[0])
        checkpoint, _ = self._shaped(pipeline[:-1] if per_weight else pipeline, costs)
        trial, checkpoint = self._ended(pipeline, checkpoint, costs, per_weight)
        if per_weight:
            self.memo.put(key, checkpoint, trial.to_json())
        return trial, checkpoint

    def _shaped(self, pipeline: Pipeline, costs: list[StepCost] | None = None
                ) -> tuple[Checkpoint, tuple[StepCost, ...]]:
        """The model after all steps but a last one of bits per weight. costs: filled as steps are done."""
        costs = [] if costs is None else costs
        checkpoint, form = replace(self.problem.checkpoint, files=()), form_at_start(self.problem.checkpoint)
        for place in range(len(pipeline)):
            checkpoint, form, cost = self._step(checkpoint, form, pipeline[:place + 1])
            costs.append(cost)
        return checkpoint, tuple(costs)

    def _named(self, checkpoint: Checkpoint) -> Checkpoint:
        """As of the source, and not of the folder that it was kept in."""
        return replace(checkpoint, source=self.problem.checkpoint.source)

    def _step(self, before: Checkpoint, form: Form, prefix: Pipeline) -> tuple[Checkpoint, Form, StepCost]:
        step, key = prefix[-1], f"{self._key} {key_of(prefix)}"
        if (held := self.memo.get(key)) is not None:
            checkpoint, record = held
            return self._named(checkpoint), form_after(form, step), replace(StepCost.from_json(record), reused=True)
        needs = pruner_of(str(step["method"])).needs if step.kind in ("width", "depth") else "gram"
        sample = self.problem.calibration(needs)
        if needs != "nothing" and not sample.windows.size:
            raise InvalidValueError(f"{step.label} needs a text to calibrate on, and between the parts that are "
                                    "measured on there is none; give a longer text")
        started = time.perf_counter()
        checkpoint, form = applied(before, form, step, sample, threads=self.problem.threads, progress=self.progress)
        seconds = time.perf_counter() - started
        bench = Bench(checkpoint, threads=self.problem.threads)
        cost = StepCost(step, bench.weights_bytes, checkpoint.nbytes, bench.kl(self.reference), seconds)
        self.memo.put(key, checkpoint, cost.to_json())
        return checkpoint, form, cost

    def _ended(self, pipeline: Pipeline, shaped: Checkpoint, costs: list[StepCost],
               per_weight: bool) -> tuple[Trial, Checkpoint]:
        """KV format and context, and where asked for a format for each weight, within the budget."""
        problem, started = self.problem, time.perf_counter()
        bench = Bench(shaped, threads=problem.threads, progress=self.progress)
        items = items_of(bench.plan)
        candidates = [candidates_of(item, problem.ladder if per_weight else (), None) for item in items]
        other = other_bytes(shaped)
        possible(bench, candidates, problem.threads, other, problem.budget, problem.context)
        own = bench.reference(problem.sample.search)
        importance = importance_of(shaped, problem.sample, problem.threads) if per_weight else {}
        kls = [[0.0] * len(choices) for choices in candidates]
        if per_weight:
            rates = rates_of(bench, own, groups_of(bench.plan, bands=BANDS), importance, self.progress)
            kls = errors_of(items, candidates, rates, importance, problem.threads, self.progress)
        kvs = {SOURCE_KV: 0.0, **{kv: bench.kl(own, kv=kv) for kv in KVS}}
        space = Space(bench.plan, [front_of(candidates, kls, by) for by in ("packed", "stored")], kvs,
                      problem.threads, other)
        fitted = Fitted(shaped, bench, items, candidates, importance, problem.budget, problem.text_sha256, "quick",
                        self.reference, problem.sample, problem.methods if per_weight else ("rtn",), self.progress)
        choice, made, kl = self._chosen(fitted, space, costs)
        after = Bench(made, threads=problem.threads)
        if per_weight:
            costs.append(StepCost(pipeline[-1], after.weights_bytes, made.nbytes, kl, time.perf_counter() - started))
        trial = Trial(pipeline, "ok", tuple(costs), kl, choice.memory_bytes, made.nbytes + beside_bytes(made),
                      choice.kv, choice.context, str(made.lineage[-1].config["method"]) if per_weight else "")
        limit = problem.budget.quality
        if limit is not None and math.exp(-kl) < limit:
            trial = replace(trial, outcome="over",
                            reason=f"quality is {math.exp(-kl):.4f}, to be at least {limit:g}")
        return trial, made

    def _chosen(self, fitted: Fitted, space: Space, costs: list[StepCost]) -> tuple[Choice, Checkpoint, float]:
        """The best choice; where only a quality is asked for, the least memory that reaches it, or the nearest."""
        budget, quality = self.problem.budget, self.problem.budget.quality
        led = quality is not None and budget.memory_bytes is None and budget.storage_bytes is None
        lost = costs[-1].kl if costs else 0.0
        wanted = -math.log(quality) if quality is not None else math.inf
        limit = wanted - lost if led else None
        if limit is not None and limit <= 0:
            raise BudgetError(f"before any bits were taken, the quality is {math.exp(-lost):.4f}, to be at least "
                              f"{quality:g}")
        best: tuple[Choice, Checkpoint, float] | None = None
        for _ in range(_QUALITY_TRIES if led else 1):
            choice = choose(space, budget, self.problem.context, kl_limit=limit)
            made = fitted.checkpoint(choice)
            kl = Bench(replace(made, files=()), threads=self.problem.threads).kl(self.reference, kv=choice.kv)
            best = choice, made, kl
            if kl <= wanted or limit is None:
                break
            limit = min(limit, choice.kl) * min(max(wanted - lost, 0.0) / max(kl - lost, 1e-12), 0.9)
        assert best is not None
        return best

