"""From claims and measured metrics to verdicts. Nothing here is a matter of opinion."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgewise.core.recipe import Claim
from edgewise.core.report import Quantity, Report, Table, Verdict

__all__ = ["CLAIM_COLUMNS", "Judged", "judge", "metrics_of", "summary"]

CLAIM_COLUMNS = ("claim", "where", "metric", "kind", "said", "tolerance", "measured", "low", "high", "verdict")


def metrics_of(report: Report) -> dict[str, float | None]:
    """The numbers of a run by name; None where it could not be measured. Words are left out."""
    return {q.name: None if q.value is None else float(q.value) for q in report.quantities
            if not isinstance(q.value, str)}


@dataclass(frozen=True)
class Judged:
    """A claim, its metric of each seed that measured it, and what follows."""

    claim: Claim
    values: tuple[float, ...]
    verdict: Verdict

    @property
    def row(self) -> tuple[object, ...]:
        """Under CLAIM_COLUMNS; measured is the median over seeds."""
        values = self.values
        return (self.claim.text, self.claim.where, self.claim.metric, self.claim.kind, self.claim.value,
                self.claim.tolerance, statistics.median(values) if values else None,
                min(values, default=None), max(values, default=None), self.verdict.outcome)


def judge(claim: Claim, seeds: Sequence[Mapping[str, float | None]], *, ablated: bool) -> Judged:
    """reproduced: it agrees for every seed. partly: for some. not-reproduced: for none. Else not-checkable.

    seeds: the metrics of each seed's run. A metric that the run did not measure is not checkable, with the reason.
    """
    if claim.ablation and not ablated:
        return Judged(claim, (), Verdict(claim.text, "not-checkable", "measured by a run with --ablate only"))
    measured = [run[claim.metric] for run in seeds if claim.metric in run]
    values = tuple(value for value in measured if value is not None)
    if not values:
        reason = (f"{claim.metric} could not be measured here" if measured
                  else f"this scale does not measure {claim.metric}")
        return Judged(claim, (), Verdict(claim.text, "not-checkable", reason))
    agreeing = sum(claim.agrees(value) for value in values)
    outcome = "reproduced" if agreeing == len(values) else "partly" if agreeing else "not-reproduced"
    middle = statistics.median(values)
    reason = (f"{claim.metric} is {middle:.4g}, {_wanted(claim)}; {agreeing} of {len(values)} "
              f"seed{'s' if len(values) > 1 else ''} agree")
    if claim.why_not and outcome != "reproduced":
        reason += f". {claim.why_not}"
    return Judged(claim, values, Verdict(claim.text, outcome, reason))  # type: ignore[arg-type]


def _wanted(claim: Claim) -> str:
    within = f" within {claim.tolerance:g}" if claim.tolerance else ""
    if claim.kind == "order":
        return f"to be above {claim.tolerance:g}"
    if claim.kind == "trend":
        return f"to {'rise' if claim.value > 0 else 'fall'} by more than {claim.tolerance:g}"
    words = {"equal": "to be", "at-least": "to be at least", "at-most": "to be at most"}[claim.kind]
    return f"{words} {claim.value:g}{within}"


def summary(name: str, judged: Sequence[Judged], runs: Sequence[Report], title: str) -> Report:
    """One Report of all seeds: metrics with their range, claims beside what was measured, verdicts."""
    table = Table("Claims", CLAIM_COLUMNS, tuple(one.row for one in judged))
    quantities = []
    for first in runs[0].quantities:
        values = [q.value for run in runs for q in run.quantities if q.name == first.name]
        numbers = [v for v in values if isinstance(v, int | float)]
        if len(numbers) < len(values) or len(values) < 2:
            quantities.append(first)
        else:
            quantities.append(Quantity(first.name, statistics.median(numbers), first.unit,
                                       (min(numbers), max(numbers)), first.origin))
    notices = tuple(dict.fromkeys(item for run in runs for item in run.notices))
    return Report(f"{name}: {title}" if title else name, tuple(quantities), (table, *runs[0].tables),
                  tuple(one.verdict for one in judged), notices=notices)
