"""edgewise coverage: which techniques of the field are here."""

from __future__ import annotations

from typing import Annotated

import typer

from edgewise.core.report import Report

EXAMPLES = ("edgewise coverage", "edgewise coverage --area compression --json")


def command(
    area: Annotated[str | None, typer.Option("--area", help="Only one area of the checklist.",
                                             show_default=False)] = None,
) -> Report:
    """The checklist of a review of on-device language models: what is here, with the test that shows it."""
    from edgewise.papers import coverage_report

    report: Report = coverage_report(area)
    return report
