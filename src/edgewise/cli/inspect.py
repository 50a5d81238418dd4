"""edgewise inspect: what is in a model file."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from edgewise.cli import options as shared
from edgewise.cli.frame import current
from edgewise.core.report import Report

EXAMPLES = (
    "edgewise inspect smollm2",
    "edgewise inspect model.gguf --tensors",
    "edgewise inspect path/to/folder --template",
    "edgewise inspect smollm2 --json",
)


def command(
    model: shared.Model,
    tensors: Annotated[bool, typer.Option("--tensors", help="Every tensor in a line of its own, instead of those of "
                                          "all layers in one.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="Every key of the configuration.")] = False,
    template: Annotated[bool, typer.Option("--template", help="The chat template alone, as it is.")] = False,
) -> Report | None:
    """Show tensors, formats, sizes, architecture, template, licence and lineage. --json always has all of it."""
    from edgewise.formats.describe import describe

    with shared.loading("fetching") as progress:
        report = describe(model, progress=progress)
    if current().json:
        return report
    if template:
        source = next((table.rows[0][0] for table in report.tables if table.title == "Chat template"), None)
        if source is not None:
            current().write(source if source.endswith("\n") else source + "\n")
            return None
    shown = {"Formats", "Lineage", "Tensors" if tensors else "Groups", *(["Configuration"] if keys else [])}
    return replace(report, tables=tuple(table for table in report.tables if table.title in shown))
