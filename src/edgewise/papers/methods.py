"""The table of methods: every recipe with the verdicts of its widest run. docs/methods.md is made from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgewise.core.recipe import Recipe
from edgewise.core.report import Report, Table
from edgewise.papers.runner import SCALES, read_results, recipe_of, slugs
from edgewise.report import render

__all__ = ["methods_markdown", "widest"]

OUTCOMES = ("reproduced", "partly", "not-reproduced", "not-checkable")


def widest(reports: Mapping[str, Report]) -> tuple[str, Report] | None:
    """The run that says most: the largest scale, with ablation where there is one."""
    for scale in reversed(SCALES):
        for name in (f"{scale}, ablated", scale):
            if name in reports:
                return name, reports[name]
    return None


def methods_markdown(results: Path) -> str:
    """One row per recipe with the number of claims by verdict; then, per recipe, each claim that is not reproduced."""
    rows, rest = [], []
    for slug in slugs():
        recipe, path = recipe_of(slug), results / f"{slug}.json"
        found = widest(read_results(path)) if path.exists() else None
        rows.append(_row(slug, recipe, found))
        if found is not None:
            why = {claim.text: claim.why_not for claim in recipe.claims if claim.why_not}
            rest += [(slug, v.claim, v.outcome, _with(v.reason, why.get(v.claim, "")))
                     for v in found[1].verdicts if v.outcome != "reproduced"]
    tables = [Table("Every method", ("method", "paper", "scale", *OUTCOMES, "verdict"), tuple(rows))]
    if rest:
        tables.append(Table("What was not reproduced, and why", ("method", "claim", "verdict", "reason"), tuple(rest)))
    return render(Report("Methods", tables=tuple(tables)), "markdown")


def _with(reason: str, why_not: str) -> str:
    """The cause after the figure; a result written before the cause was known does not name it."""
    return reason if not why_not or why_not in reason else f"{reason}. {why_not}"


def _row(slug: str, recipe: Recipe, found: tuple[str, Report] | None) -> tuple[object, ...]:
    if found is None:
        return (slug, f"{recipe.title} ({recipe.paper})", "none", *(None for _ in OUTCOMES), "no result yet")
    name, report = found
    counts = [sum(v.outcome == outcome for v in report.verdicts) for outcome in OUTCOMES]
    checked = sum(counts[:3])
    verdict = ("not checkable here" if not checked else "reproduced" if counts[0] == checked
               else "not reproduced" if not counts[0] and not counts[1] else "partly reproduced")
    return slug, f"{recipe.title} ({recipe.paper})", name, *counts, verdict
