"""A Report as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from edgewise.core.report import Report, Table
from edgewise.report.text import cell, describe, with_unit

__all__ = ["to_markdown"]


def to_markdown(report: Report) -> str:
    """The report as GitHub-flavoured Markdown, every field of it."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"# {_plain(report.title)}"
    if report.quantities:
        yield ""
        yield from _grid(("quantity", "value", "origin"), [(q.name, describe(q), q.origin) for q in report.quantities])
    for table in report.tables:
        yield from ("", f"## {_plain(table.title)}", "")
        yield from _grid(table.columns, rows_as_text(table))
    if report.verdicts:
        yield from ("", "## Verdicts", "")
        yield from _grid(("claim", "verdict", "reason"), [(v.claim, v.outcome, v.reason) for v in report.verdicts])
    if report.notices:
        yield from ("", "## Notices", "")
        yield from (f"- {_plain(str(item))}" for item in report.notices)
    if report.lineage:
        yield from ("", "## Lineage", "")
        for step in report.lineage:
            config = ", ".join(f"{key}={value}" for key, value in step.config.items())
            yield f"- {_plain(step.name)}{_plain(f' ({config})') if config else ''}"
    if report.environment:
        yield from ("", "## Environment", "")
        yield from (f"- {_plain(str(key))}: {_plain(str(value))}" for key, value in report.environment.items())


def rows_as_text(table: Table) -> list[tuple[str, ...]]:
    """The cells of a table as text, with units where the table has them."""
    units = table.units or ("",) * len(table.columns)
    return [tuple(with_unit(value, unit) if unit else cell(value) for value, unit in zip(row, units, strict=True))
            for row in table.rows]


def _grid(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    for row in (columns, ("---",) * len(columns), *rows):
        yield f"| {' | '.join(_plain(text) for text in row)} |"


def _plain(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
