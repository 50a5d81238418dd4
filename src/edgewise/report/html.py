"""A Report as one self-contained HTML page: no script, no font, no image from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from edgewise.core.report import Report
from edgewise.report.markdown import rows_as_text
from edgewise.report.text import describe

__all__ = ["to_html"]

_CSS = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.25rem .75rem;border-bottom:1px solid #ddd;text-align:left}
.notice{background:#fff6d6;border-left:4px solid #d9a400;padding:.25rem .75rem}svg{max-width:100%}"""


def to_html(report: Report, plots: Sequence[str] = ()) -> str:
    """The report as a page. plots: SVG documents of our own making; they are embedded as they are."""
    return "\n".join(_lines(report, plots)) + "\n"


def _lines(report: Report, plots: Sequence[str]) -> Iterator[str]:
    title = escape(report.title)
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield f"<style>{_CSS}</style></head><body><h1>{title}</h1>"
    for item in report.notices:
        yield f'<p class="notice">{escape(str(item))}</p>'
    if report.quantities:
        yield _table(("quantity", "value", "origin"), [(q.name, describe(q), q.origin) for q in report.quantities])
    yield from plots
    for table in report.tables:
        yield f"<h2>{escape(table.title)}</h2>"
        yield _table(table.columns, rows_as_text(table))
    if report.verdicts:
        yield "<h2>Verdicts</h2>"
        yield _table(("claim", "verdict", "reason"), [(v.claim, v.outcome, v.reason) for v in report.verdicts])
    if report.lineage:
        yield "<h2>Lineage</h2>"
        yield _table(("step", "configuration", "version", "seed"),
                     [(s.name, str(dict(s.config)), s.version, str(s.seed)) for s in report.lineage])
    if report.environment:
        yield "<h2>Environment</h2>"
        yield _table(("key", "value"), [(str(key), str(value)) for key, value in report.environment.items()])
    yield "</body></html>"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
