"""A search over pipelines: which steps, with which settings, and in which order, under a Budget.

    from edgewise.fit import compose
    result = compose("smollm2", Budget(memory_bytes=60_000_000), steps=("width", "sparsity", "bits"), out="small")

Optuna proposes (a tree-structured Parzen estimator: Bergstra et al., NeurIPS 2011), the engine measures. A pipeline is
encoded as which steps it has, a place in [0, 1] for each, by which they are ordered (random keys: Bean, ORSA J. Comput.
6, 1994), and settings from short lists, so that pipelines share what they begin with. The score is the divergence from
the source within the budget, or the memory where only a quality is asked for; what breaks the budget or cannot take the
model has none, and its reason is kept. Bits alone, and each other step with bits, are tried first: the result is never
worse than `fit` without a composition, as measured on the text of the search.

Trials are told in the order in which they were asked for, `workers` at a time, and the sampler of each is seeded by its
number: one seed gives one result for a number of workers, and a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.core.budget import Budget
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import BudgetError, InvalidValueError, notice, require
from edgewise.core.numbers import QuantFormat
from edgewise.engine.archs import plan_of
from edgewise.fit.candidates import LADDER
from edgewise.fit.choose import context_limit
from edgewise.fit.composed import composed_plot, composed_report, measured_models
from edgewise.fit.memo import Memo
from edgewise.fit.search import CALIBRATED, METHODS, TOKENS, FitResult, beside, check_question, ids_of
from edgewise.fit.sensitivity import sample_of
from edgewise.fit.steps import KINDS, PER_WEIGHT, PipelineStep, form_at_start, key_of, pipeline_text
from edgewise.fit.trial import Evaluator, Problem, StepCost, Trial
from edgewise.fit.workers import Local, Workers
from edgewise.formats.cache import cache_root
from edgewise.formats.folder_writer import check_target, write_folder
from edgewise.formats.sources import open_checkpoint
from edgewise.measure.machine import usable_cores

__all__ = ["compose"]

Progress = Callable[[str, int, int], None]
Pipeline = tuple[PipelineStep, ...]
STEPS = ("width", "rank", "sparsity", "bits")
MEMO_BYTES = 4_000_000_000
_ASKS = 4
"""Proposals for each trial that is wanted: of those that were measured already, the score is known."""
_STARTUP = 8
"""Trials before the estimator guides the search."""
_TAKEN = 4
"""Best trials that are built, until one keeps the quality on text that the search did not see."""
_SHARES: dict[str, dict[str, tuple[Any, ...]]] = {
    "width": {"sparsity": (0.05, 0.1, 0.2, 0.3), "method": ("units", "modegpt")},
    "depth": {"method": ("shortgpt",)},
    "rank": {"share": (0.95, 0.9, 0.8, 0.65), "where": ("all", "attention", "feed_forward"), "method": ("svd-llm",)},
    "sparsity": {"where": ("all", "attention", "feed_forward"), "method": ("wanda", "sparsegpt")},
}
"""What each step chooses from; the first of each is where the search starts."""


def compose(source: str | os.PathLike[str] | Checkpoint, budget: Budget, *, steps: Sequence[str] = STEPS,
            trials: int = 24, seed: int = 0, workers: int = 1, orders: int = 6, out: str | Path | None = None,
            context: int | None = None, text_from: str | Sequence[int] = "pydoc",
            formats: Sequence[str | QuantFormat] | None = None, methods: Sequence[str] = METHODS,
            threads: int | None = None, resume: bool = False, overwrite: bool = False, offline: bool | None = None,
            memo_bytes: int = MEMO_BYTES, progress: Progress | None = None) -> FitResult:
    """Search for the pipeline of steps that loses least within a budget, and build and measure what it makes.

    steps: of `steps.KINDS`, which a pipeline may have, each once; "bits" always is in it where it is given. trials:
    pipelines measured. orders: in how many orders the steps of the best pipeline are measured after the search; 0 for
    none. workers: pipelines measured at a time, each by a process of its own through Ray where there are several;
    threads are divided among them. resume: go on with the trials of a search for the same that was killed, or add to
    them. memo_bytes: disk that intermediate models may take, under the cache. The others are those of `fit`.
    Raises BudgetError where no pipeline that was tried keeps the budget, and MissingExtraError without Optuna.
    """
    check_question(budget, context, "quick", methods)
    kinds = _kinds(steps)
    if trials < 1 or workers < 1 or orders < 0:
        raise InvalidValueError(f"trials and workers are at least 1, orders at least 0; given {trials}, {workers} and "
                                f"{orders}")
    require("optuna", extra="search", purpose="a search over pipelines of steps")
    if out is not None:
        check_target(out, overwrite=overwrite)
    started = time.perf_counter()
    threads = max((threads or usable_cores().usable) // workers, 1)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(
        os.fspath(source), offline=offline, progress=progress)
    plan = plan_of(checkpoint)
    name, digest, ids = ids_of(checkpoint, text_from, offline, progress)
    sample = sample_of(ids, context=context_limit(plan), tokens=TOKENS["quick"], calibrated=CALIBRATED["quick"])
    ladder = tuple(fmt if isinstance(fmt, QuantFormat) else QuantFormat.parse(fmt) for fmt in formats or LADDER)
    problem = Problem(checkpoint, budget, sample, name, digest, ladder, tuple(methods), context, threads)
    space = Space(kinds, len(plan.layers), ladder, "gptq" if "gptq" in methods else "rtn")

    state = cache_root() / "fit" / f"{problem.key[:24]}-{'-'.join(kinds)}-{seed}-{workers}"
    log = _Log(state, resume)
    memo = Memo(cache_root() / "fit" / "made", memo_bytes)
    memo.folder.mkdir(parents=True, exist_ok=True)
    say = _Said(progress)
    evaluator = Evaluator(problem, memo, say)
    with (Local(evaluator) if workers == 1 else Workers(problem, memo, state, workers)) as team:
        search = _Search(space, budget, seed, workers, log, team, say)
        found = search.run(trials)
        subject, ordered = _orders(found, space, orders, form_at_start(checkpoint).number.bits, team, say)
    best, made, rows = _taken(found, evaluator, problem, space)

    folder: Path | None = None
    made = replace(made, lineage=(*made.lineage, Step("compose", {
        "pipeline": [step.to_json() for step in best.pipeline], "trials": len(found), "steps": list(kinds)},
        made.lineage[-1].version, seed)))
    storage = best.stored_bytes or 0
    if out is not None:
        folder = write_folder(made, out, overwrite=overwrite, progress=progress)
        storage = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    report = composed_report(problem, best, found, rows, subject, ordered, storage=storage, seed=seed,
                             seconds=time.perf_counter() - started, source_bytes=evaluator.source_bytes,
                             written=None if folder is None else str(folder), lineage=made.lineage)
    if broken := budget.check(report):
        raise BudgetError(f"{broken[0]}, though the choice was made for less; ask for a little less")
    for item in best.notices:
        if item.kind != "info":
            notice(item.kind, item.message, where=item.where)
    if folder is not None:
        beside(folder, report, composed_plot(report))
    return FitResult(made, report, folder)


def _kinds(steps: Sequence[str]) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(step.strip().lower() for step in steps))
    if not kinds or set(kinds) - set(KINDS):
        raise InvalidValueError(f"steps are of {', '.join(KINDS)}; given {', '.join(steps) or 'none'}")
    return tuple(kind for kind in KINDS if kind in kinds)


# ---- what may be proposed -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Space:
    """Names of parameters and what they choose from. method: of bits."""

    kinds: tuple[str, ...]
    layers: int
    ladder: tuple[QuantFormat, ...]
    method: str

    @property
    def uniform(self) -> tuple[QuantFormat, ...]:
        """Formats of a bits step that is not the last: with groups that every rank and width is a multiple of."""
        small = tuple(fmt for fmt in self.ladder if fmt.granularity.kind == "group" and fmt.granularity.group <= 32)
        return small or self.ladder

    def choices(self, kind: str) -> dict[str, tuple[Any, ...]]:
        """By the name of a setting."""
        if kind == "bits":
            return {"format": tuple(map(str, self.uniform))}
        found = dict(_SHARES[kind])
        if kind == "depth":
            counts = sorted({1, max(self.layers // 10, 1), max(self.layers // 5, 1)})
            found["sparsity"] = tuple(round(count / self.layers, 6) for count in counts)
        return found

    def distributions(self) -> dict[str, Any]:
        """Of Optuna, by the name of a parameter."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        found: dict[str, Any] = {}
        for kind in self.kinds:
            if kind != "bits":
                found[f"use {kind}"] = CategoricalDistribution((False, True))
            found[f"place {kind}"] = FloatDistribution(0.0, 1.0)
            for name, values in self.choices(kind).items():
                found[f"{kind} {name}"] = CategoricalDistribution(values)
        return found

    def proposed(self, ask: Callable[[str, Any], Any]) -> Pipeline:
        """The pipeline of the parameters that `ask(name, distribution)` gives; only those that count are asked for."""
        of = self.distributions()
        used = [kind for kind in self.kinds if kind == "bits" or ask(f"use {kind}", of[f"use {kind}"])]
        places = {kind: ask(f"place {kind}", of[f"place {kind}"]) for kind in used} if len(used) > 1 else {}
        used.sort(key=lambda kind: places.get(kind, 0.0))
        made = []
        for kind in used:
            if kind == "bits" and kind == used[-1]:
                made.append(self.bits(PER_WEIGHT))
                continue
            settings = {name: ask(f"{kind} {name}", of[f"{kind} {name}"]) for name in self.choices(kind)}
            made.append(self.bits(settings["format"]) if kind == "bits" else
                        PipelineStep(kind, tuple(settings.items())))
        return tuple(made)

    def bits(self, fmt: str) -> PipelineStep:
        """A step of bits in a format, or with one for each weight."""
        return PipelineStep("bits", (("format", fmt), ("method", self.method)))

    def starts(self) -> list[dict[str, Any]]:
        """Parameters of the first trials: bits alone, and each other step before bits, at its gentlest."""
        others = [kind for kind in self.kinds if kind != "bits"]
        nothing: dict[str, Any] = {f"use {kind}": False for kind in others}
        found = [nothing]
        for kind in others:
            gentle = {f"{kind} {name}": values[0] for name, values in self.choices(kind).items()}
            found.append({**nothing, f"use {kind}": True, f"place {kind}": 0.25, "place bits": 0.75, **gentle})
        return found


# ---- the search -----------------------------------------------------------------------------------------------------

class _Said:
    """Progress of what a trial does, under the name of the trial."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.title = progress, ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(f"{self.title}: {what}" if self.title else what, done, total)


class _Log:
    """Every proposal with what became of it, a line each. A line that a kill cut short does not count."""

    def __init__(self, folder: Path, resume: bool) -> None:
        self.path = folder / "trials.jsonl"
        if folder.exists() and not resume:
            if self.path.exists():
                notice("info", "the trials of an earlier search for the same are discarded; --resume would have gone "
                       "on with them", where=str(folder))
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.entries: list[tuple[dict[str, Any], Trial]] = []
        whole = 0
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            try:
                data = json.loads(line)
                self.entries.append((data["params"], Trial.from_json(data["trial"])))
            except (ValueError, KeyError, TypeError):
                break
            whole += len(line)
        if self.path.exists():
            os.truncate(self.path, whole)

    def add(self, params: dict[str, Any], trial: Trial) -> None:
        self.entries.append((params, trial))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"params": params, "trial": trial.to_json()}) + "\n")
            file.flush()
            os.fsync(file.fileno())


class _Search:
    def __init__(self, space: Space, budget: Budget, seed: int, workers: int, log: _Log, team: Any,
                 say: _Said) -> None:
        self.space, self.seed, self.workers, self.log, self.team, self.say = space, seed, workers, log, team, say
        self.by_memory = budget.memory_bytes is None and budget.storage_bytes is None

    def run(self, trials: int) -> list[Trial]:
        """Each pipeline once, in the order of the search."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="minimize")
        known: dict[str, Trial] = {}
        of = self.space.distributions()
        for params, trial in self.log.entries:
            score = self._score(trial)
            study.add_trial(optuna.trial.create_trial(
                state=optuna.trial.TrialState.PRUNED if score is None else optuna.trial.TrialState.COMPLETE,
                params=params, distributions={name: of[name] for name in params}, value=score))
            known.setdefault(key_of(trial.pipeline), trial)
        starts = self.space.starts()
        asked = len(self.log.entries)
        while len(known) < trials and asked < _ASKS * trials:
            count = min(self.workers, trials - len(known))
            batch = []
            for number in range(asked, asked + count):
                if number < len(starts):
                    study.enqueue_trial(starts[number])
                # By its number: a search that goes on proposes what one that was not killed would have.
                study.sampler = optuna.samplers.TPESampler(seed=int(np.random.SeedSequence(
                    (self.seed, number)).generate_state(1)[0]), n_startup_trials=_STARTUP)
                trial = study.ask()
                batch.append((trial, self.space.proposed(_asked(trial))))
            asked += count
            new = {key_of(pipeline): pipeline for _, pipeline in batch if key_of(pipeline) not in known}
            self.say.title = f"trial {len(known) + 1} of {trials}, " + ", ".join(map(pipeline_text, new.values()))
            known.update(zip(new, self.team.trials(list(new.values())), strict=True))
            for trial, pipeline in batch:
                made = known[key_of(pipeline)]
                score = self._score(made)
                study.tell(trial, score, state=optuna.trial.TrialState.PRUNED if score is None else None)
                self.log.add(dict(trial.params), made)
        self.say.title = ""
        return list(known.values())

    def _score(self, trial: Trial) -> float | None:
        """What is least of the best; None of a trial that has none."""
        if trial.outcome != "ok":
            return None
        return trial.memory_bytes if self.by_memory else trial.kl


def _asked(trial: Any) -> Callable[[str, Any], Any]:
    def ask(name: str, of: Any) -> Any:
        return (trial.suggest_categorical(name, of.choices) if hasattr(of, "choices") else
                trial.suggest_float(name, of.low, of.high))

    return ask


def ranked(trials: Iterable[Trial], budget: Budget) -> list[Trial]:
    """Those that keep the budget, the best first; of equal ones that with fewer steps."""
    by_memory = budget.memory_bytes is None and budget.storage_bytes is None
    ok = [trial for trial in trials if trial.outcome == "ok"]
    return sorted(ok, key=lambda trial: ((trial.memory_bytes, trial.kl) if by_memory else
                                         (trial.kl, trial.memory_bytes), len(trial.pipeline)))


def _taken(found: Sequence[Trial], evaluator: Evaluator, problem: Problem,
           space: Space) -> tuple[Trial, Checkpoint, dict[str, Any]]:
    """The best trial whose model keeps the quality on text that the search did not see, built, and measured beside the
    source and bits alone."""
    best = ranked(found, problem.budget)
    if not best:
        tried = [f"{pipeline_text(trial.pipeline)}: {trial.reason}" for trial in found[:3]]
        raise BudgetError(f"none of {len(found)} pipelines keeps {problem.budget!r}. {'. '.join(tried)}. "
                          "Give more, more --steps or --trials, or start from a smaller model")
    alone = next((trial for trial in found if trial.pipeline == (space.bits(PER_WEIGHT),) and trial.outcome == "ok"),
                 None)
    reached: list[float] = []
    for trial in best[:_TAKEN]:
        made, _ = evaluator.made(trial.pipeline)
        plain = None if alone is None or alone is trial else evaluator.made(alone.pipeline)[0]
        rows = measured_models(problem, trial, made, plain)
        if problem.budget.quality is None or rows["chosen"].quality >= problem.budget.quality:
            return trial, made, rows
        reached.append(rows["chosen"].quality)
    raise BudgetError(f"{problem.budget!r} cannot be met: the best of {len(found)} pipelines reaches quality "
                      f"{max(reached):.6f}, measured; give more memory or storage, or ask for less quality")


def _orders(found: Sequence[Trial], space: Space, count: int, float_bits: int, team: Any,
            say: _Said) -> tuple[Trial | None, list[tuple[Pipeline, tuple[StepCost, ...] | str]]]:
    """The steps of the best pipeline that has several, in other orders and at one format, so that the bytes are equal.
    Second: of each order what its steps cost, or why it failed."""
    several = [trial for trial in found if trial.outcome == "ok" and len(trial.pipeline) > 1]
    if not several or count < 2:
        return None, []
    subject = min(several, key=lambda trial: (trial.kl, trial.memory_bytes))
    steps = tuple(_uniform(subject, space, float_bits) if step.kind == "bits" else step for step in subject.pipeline)
    orders = [steps, *(order for order in itertools.permutations(steps) if order != steps)][:count]
    say.title = "the same steps in other orders"
    made = team.costs(orders)
    say.title = ""
    return subject, list(zip(orders, made, strict=True))


def _uniform(trial: Trial, space: Space, float_bits: int) -> PipelineStep:
    """The step of bits with one format for all, the nearest to what the weights got."""
    place = next(i for i, step in enumerate(trial.pipeline) if step.kind == "bits")
    if trial.pipeline[place]["format"] != PER_WEIGHT:
        return trial.pipeline[place]
    bits = float_bits * trial.steps[place].stored_bytes / trial.steps[place - 1].stored_bytes
    return space.bits(str(min(space.uniform, key=lambda fmt: abs(fmt.bits_per_weight - bits))))
