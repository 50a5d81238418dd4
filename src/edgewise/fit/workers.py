"""Who measures the pipelines of a search: this process, or several through Ray, on one machine or on many."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgewise.core.errors import EdgewiseError, collect_notices, require
from edgewise.fit.memo import Memo
from edgewise.fit.steps import PipelineStep
from edgewise.fit.trial import Evaluator, Problem, StepCost, Trial
from edgewise.formats.folder import read_folder
from edgewise.formats.folder_writer import write_folder

__all__ = ["Local", "Workers"]

Pipeline = tuple[PipelineStep, ...]
Costs = tuple[StepCost, ...] | str


def _costs(evaluator: Evaluator, pipeline: Pipeline) -> Costs:
    """What each step costs, or why it cannot be."""
    with collect_notices():
        try:
            return evaluator.steps(pipeline)
        except (EdgewiseError, ImportError, ArithmeticError) as error:
            return str(error)


class Local:
    """One pipeline after the other, here."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def trials(self, pipelines: Sequence[Pipeline]) -> list[Trial]:
        """Each as measured."""
        return [self._evaluator.trial(pipeline) for pipeline in pipelines]

    def costs(self, pipelines: Sequence[Pipeline]) -> list[Costs]:
        """Of each the costs of its steps, whatever a budget says; a text where one fails."""
        return [_costs(self._evaluator, pipeline) for pipeline in pipelines]


class Workers:
    """As many processes as asked for, through Ray: a cluster where RAY_ADDRESS names one, else on this machine.

    They read the source and share what they make through the state folder and the memo, which a cluster has to see
    under the same paths.
    """

    def __init__(self, problem: Problem, memo: Memo, state: Path, count: int) -> None:
        self._ray = require("ray", extra="workers", purpose="a search on several workers")
        self._problem, self._memo, self._state, self._count = problem, memo, state, count
        self._actors: list[Any] = []
        self._ours = False

    def __enter__(self) -> Workers:
        ray, source = self._ray, self._state / "source"
        if not source.exists():
            write_folder(self._problem.checkpoint, source)
        self._problem.save(self._state)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not ray.is_initialized():
            local: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {
                "num_cpus": self._count, "include_dashboard": False}
            ray.init(log_to_driver=False, **local)
            self._ours = True
        remote = ray.remote(num_cpus=1)(_Worker)
        self._actors = [remote.remote(str(self._state), str(self._memo.folder), self._memo.limit_bytes,
                                      self._problem.threads, self._problem.key) for _ in range(self._count)]
        return self

    def __exit__(self, *error: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._ours:
            self._ray.shutdown()

    def trials(self, pipelines: Sequence[Pipeline]) -> list[Trial]:
        """Each as measured, in their order."""
        return [Trial.from_json(data) for data in self._all("trial", pipelines)]

    def costs(self, pipelines: Sequence[Pipeline]) -> list[Costs]:
        """As of Local."""
        return [data if isinstance(data, str) else tuple(map(StepCost.from_json, data))
                for data in self._all("costs", pipelines)]

    def _all(self, method: str, pipelines: Sequence[Pipeline]) -> list[Any]:
        """The next pipeline goes to the worker that is free first."""
        pool = self._ray.util.ActorPool(self._actors)
        return list(pool.map(lambda actor, data: getattr(actor, method).remote(data),
                             [[step.to_json() for step in pipeline] for pipeline in pipelines]))


class _Worker:
    """In a process of Ray. key: of the problem, which the source as written here has to give as well."""

    def __init__(self, state: str, memo: str, limit_bytes: int, threads: int, key: str) -> None:
        checkpoint = read_folder(Path(state) / "source")
        problem = Problem.load(Path(state), checkpoint, threads)
        self._evaluator = Evaluator(problem, Memo(Path(memo), limit_bytes), key=key)

    def trial(self, pipeline: list[Any]) -> dict[str, Any]:
        return self._evaluator.trial(tuple(map(PipelineStep.from_json, pipeline))).to_json()

    def costs(self, pipeline: list[Any]) -> Any:
        made = _costs(self._evaluator, tuple(map(PipelineStep.from_json, pipeline)))
        return made if isinstance(made, str) else [cost.to_json() for cost in made]
