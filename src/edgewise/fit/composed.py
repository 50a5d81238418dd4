"""What a search over pipelines found, as a Report: what each step cost and gave, the front of trials, the orders."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.report import Quantity, Report, Table
from edgewise.engine.loading import model_of
from edgewise.engine.model import LanguageModel
from edgewise.fit.result import Measured
from edgewise.fit.search import beside_bytes, speeds_of
from edgewise.fit.sensitivity import SOURCE_KV, kl_rows
from edgewise.fit.steps import PipelineStep, pipeline_text
from edgewise.fit.trial import Problem, StepCost, Trial
from edgewise.report import plot_table

__all__ = ["composed_plot", "composed_report", "front_of_trials", "measured_models"]

_FRONT = "Pareto front of the trials"


def measured_models(problem: Problem, trial: Trial, made: Checkpoint,
                    alone: Checkpoint | None) -> dict[str, Measured]:
    """Source, chosen and, where it is another, bits alone, on the windows of the check; decoding in turns."""
    source = model_of(problem.checkpoint, threads=problem.threads, kv=SOURCE_KV, context=trial.context)
    models = {"source": source}
    checkpoints = {"source": problem.checkpoint, "chosen": made}
    if alone is not None:
        checkpoints["bits alone"] = alone
    models |= {name: model_of(checkpoint, threads=problem.threads, cache=False)
               for name, checkpoint in checkpoints.items() if name != "source"}
    kls: dict[str, list[np.ndarray]] = {name: [] for name in models}
    same: dict[str, list[np.ndarray]] = {name: [] for name in models}
    losses: dict[str, list[np.ndarray]] = {name: [] for name in models}
    length = min(trial.context, *(model.context for model in models.values()))
    for window in problem.sample.check:
        ids = window[:length]
        exact = source.forward(ids)
        for name, model in models.items():
            logits = exact if model is source else model.forward(ids)
            kls[name].append(kl_rows(exact, logits))
            same[name].append(exact.argmax(axis=-1) == logits.argmax(axis=-1))
            top = logits.max(axis=-1)
            total = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1, dtype=np.float64))
            losses[name].append((total[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]).astype(np.float64))
    speeds = dict(zip(models, speeds_of(tuple(models.values()), problem.sample.check[0], length), strict=True))
    parameters = sum(math.prod(problem.checkpoint.tensors[name].shape) for name in problem.checkpoint.tensors)

    def measured(name: str, model: LanguageModel, checkpoint: Checkpoint) -> Measured:
        kl = np.concatenate(kls[name])
        own = sum(os.path.getsize(path) for path in checkpoint.files) if name == "source" else 0
        return Measured(own or checkpoint.nbytes + beside_bytes(checkpoint), model.memory,
                        8 * checkpoint.nbytes / parameters, model.kv, model.context,
                        math.exp(float(np.concatenate(losses[name]).mean())), speeds[name],
                        None if name == "source" else float(kl.mean()), float(kl.std() / math.sqrt(len(kl))),
                        float(np.concatenate(same[name]).mean()))

    return {name: measured(name, model, checkpoints[name]) for name, model in models.items()}


def front_of_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Those that were measured and that no other beats in both memory and divergence, by memory."""
    found: list[Trial] = []
    measured = [trial for trial in trials if trial.kl is not None]
    for trial in sorted(measured, key=lambda trial: (trial.memory_bytes, trial.kl, len(trial.pipeline))):
        if not found or trial.kl < found[-1].kl:  # type: ignore[operator]
            found.append(trial)
    return found


def composed_report(problem: Problem, best: Trial, trials: Sequence[Trial], rows: Mapping[str, Measured],
                    subject: Trial | None,
                    ordered: Sequence[tuple[tuple[PipelineStep, ...], tuple[StepCost, ...] | str]], *, storage: int,
                    seed: int, seconds: float, source_bytes: tuple[int, int], written: str | None,
                    lineage: tuple[Step, ...]) -> Report:
    """rows: models as measured on the check. subject, ordered: whose steps were measured in other orders, and these."""
    chosen = rows["chosen"]
    alone = rows.get("bits alone", chosen if len(best.pipeline) == 1 and best.pipeline[0].kind == "bits" else None)
    assert chosen.kl is not None
    low, high = chosen.kl - 1.96 * chosen.kl_error, chosen.kl + 1.96 * chosen.kl_error
    counts = {outcome: sum(trial.outcome == outcome for trial in trials) for outcome in ("ok", "over", "failed")}
    quantities = [
        Quantity("pipeline", pipeline_text(best.pipeline)),
        Quantity("quality", chosen.quality, "", (math.exp(-high), math.exp(-max(low, 0.0)))),
        Quantity("mean KL", chosen.kl, "nats", (low, high)),
        *([] if alone is None or alone.kl is None else [
            Quantity("mean KL of bits alone", alone.kl, "nats", (alone.kl - 1.96 * alone.kl_error,
                                                                 alone.kl + 1.96 * alone.kl_error))]),
        Quantity("memory_bytes", chosen.memory.total_bytes, "B"),
        Quantity("storage_bytes", storage, "B"),
        Quantity("tokens_per_s", chosen.decode_tokens_per_s, "tokens/s"),
        Quantity("trials", len(trials)), Quantity("trials over the budget", counts["over"]),
        Quantity("trials failed", counts["failed"]), Quantity("seed", seed),
        Quantity("text", f"{problem.text_name}, SHA-256 {problem.text_sha256[:16]}, {problem.sample.search.size} "
                 f"positions searched on, {problem.sample.check.size} checked on"),
        Quantity("time", seconds, "s"),
        *([] if written is None else [Quantity("written to", written)])]
    tables = [_before_and_after(rows), _steps_table(best, source_bytes)]
    if subject is not None:
        tables.append(_orders_table(ordered, subject))
    tables.append(_front_table(trials, best))
    if missing := [trial for trial in trials if trial.outcome != "ok"]:
        tables.append(Table("Trials without a score", ("pipeline", "outcome", "reason"), tuple(
            (_label(trial), trial.outcome, trial.reason) for trial in missing)))
    return Report(f"{problem.checkpoint.metadata.get('name') or problem.checkpoint.source}: composed for "
                  f"{problem.budget!r}", tuple(quantities), tuple(tables), lineage=lineage)


def _label(trial: Trial) -> str:
    return " > ".join(step.label for step in trial.pipeline) or "nothing"


def _before_and_after(rows: Mapping[str, Measured]) -> Table:
    names = [name for name in ("source", "bits alone", "chosen") if name in rows]
    each = [rows[name] for name in names]
    lines = (("bytes on disk", *(_mb(row.disk_bytes) for row in each)),
             ("memory", *(_mb(row.memory.total_bytes) for row in each)),
             ("  weights", *(_mb(row.memory.weights_bytes) for row in each)),
             ("  KV cache", *(_mb(row.memory.kv_bytes) for row in each)),
             ("  scratch", *(_mb(row.memory.scratch_bytes) for row in each)),
             ("context, positions", *(row.context for row in each)), ("KV format", *(row.kv for row in each)),
             ("bits per weight of the source", *(round(row.bits_per_weight, 2) for row in each)),
             ("mean KL to the source, nats", *(row.kl or 0.0 for row in each)),
             ("  its standard error", *(row.kl_error for row in each)),
             ("quality exp(-KL)", *(math.exp(-(row.kl or 0.0)) for row in each)),
             ("same first choice", *(row.agreement for row in each)),
             ("perplexity", *(row.perplexity for row in each)),
             ("decoding, tokens/s", *(row.decode_tokens_per_s for row in each)))
    return Table("Before and after", ("", *names), lines)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def _steps_table(trial: Trial, source_bytes: tuple[int, int]) -> Table:
    """Divergence on the text of the search, with the source's KV format but in the last line."""
    rows, before = [], (*source_bytes, 0.0)
    for place, cost in enumerate(trial.steps):
        last = place + 1 == len(trial.steps)
        kl = trial.kl if last and trial.kl is not None else cost.kl
        rows.append((cost.step.label, before[0], cost.weights_bytes, before[1], cost.stored_bytes, before[2], kl,
                     cost.seconds))
        before = (cost.weights_bytes, cost.stored_bytes, kl)
    return Table("Steps of the chosen pipeline", ("step", "weights before", "weights", "stored before", "stored",
                                                  "KL before", "KL", "took"), tuple(rows),
                 ("", "B", "B", "B", "B", "nats", "nats", "s"))


def _orders_table(ordered: Sequence[tuple[tuple[PipelineStep, ...], tuple[StepCost, ...] | str]],
                  subject: Trial) -> Table:
    """The best order first; an order that failed has its reason in place of numbers."""
    rows = []
    for order, costs in ordered:
        name = " > ".join(step.label for step in order)
        mark = "as searched" if order[0].kind == subject.pipeline[0].kind and [
            step.kind for step in order] == [step.kind for step in subject.pipeline] else ""
        rows.append((name, None, None, None, f"failed: {costs}") if isinstance(costs, str) else
                    (name, costs[-1].weights_bytes, costs[-1].kl, sum(cost.seconds for cost in costs), mark))
    rows.sort(key=lambda row: (row[2] is None, row[2] or 0.0))
    return Table("The same steps in other orders, all weights in one format", ("order", "weights", "KL", "took", ""),
                 tuple(rows), ("", "B", "nats", "s", ""))


def _front_table(trials: Sequence[Trial], best: Trial) -> Table:
    """Every trial that was measured, by memory."""
    front = front_of_trials(trials)
    rows = tuple((trial.memory_bytes / 1e6, math.exp(-trial.kl), trial.kl,  # type: ignore[operator]
                  "on the front" if trial in front else "", "chosen" if trial is best else "", _label(trial),
                  trial.seconds, trial.outcome if trial.outcome != "ok" else "")
                 for trial in sorted((trial for trial in trials if trial.kl is not None),
                                     key=lambda trial: (trial.memory_bytes, trial.kl)))
    return Table(_FRONT, ("memory, MB", "quality", "KL", "front", "choice", "pipeline", "took", "budget"), rows,
                 ("", "", "nats", "", "", "", "s", ""))


def composed_plot(report: Report) -> str:
    """The trials as an SVG document, the front joined."""
    table = next(table for table in report.tables if table.title == _FRONT)
    return plot_table(table, x="memory, MB", y="quality", label="choice",
                      front=[place for place, row in enumerate(table.rows) if row[3]])
