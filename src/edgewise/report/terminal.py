"""A Report as tables for a terminal."""

from __future__ import annotations

import io
import shutil

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from edgewise.core.report import Report, Table
from edgewise.report.text import cell, describe, with_unit

__all__ = ["to_terminal"]


def to_terminal(report: Report, *, colour: bool, width: int | None) -> str:
    """The report as text of at most `width` columns, with ANSI colours if asked for."""
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=colour, no_color=not colour, highlight=False,
                      width=width or shutil.get_terminal_size((100, 24)).columns, legacy_windows=False)
    console.print(Text(report.title, style="bold"))
    if report.quantities:
        grid = RichTable.grid(padding=(0, 2))
        for _ in range(3):
            grid.add_column(overflow="fold")  # a path is shown whole
        mixed = len({q.origin for q in report.quantities}) > 1
        for quantity in report.quantities:
            origin = quantity.origin if mixed or quantity.origin != "measured" else ""
            grid.add_row(Text(quantity.name), Text(describe(quantity)), Text(origin, style="dim"))
        console.print(grid)
    for table in report.tables:
        console.print(_table(table))
    for verdict in report.verdicts:
        console.print(Text(f"{verdict.outcome}: {verdict.claim}{' — ' + verdict.reason if verdict.reason else ''}"))
    for item in report.notices:
        console.print(Text(str(item), style="yellow"))
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


def _table(table: Table) -> RichTable:
    drawn = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    units = table.units or ("",) * len(table.columns)
    for index, column in enumerate(table.columns):
        numeric = any(isinstance(row[index], int | float) for row in table.rows)
        drawn.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(with_unit(value, unit) if unit else cell(value))
                        for value, unit in zip(row, units, strict=True)))
    return drawn
