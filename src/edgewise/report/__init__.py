"""A Report drawn as terminal table, Markdown, HTML, SVG plot or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from edgewise.core.errors import InvalidValueError
from edgewise.core.report import Report
from edgewise.report.svg import plot_table

__all__ = ["Style", "plot_table", "render"]

Style = Literal["terminal", "markdown", "html", "svg", "json"]


def render(report: Report, style: Style = "terminal", *, colour: bool = False, width: int | None = None,
           plots: Sequence[str] = ()) -> str:
    """The report as text. Notices are always part of it.

    colour, width: of the terminal style; width in characters, by default the terminal's, or 100 without one.
    plots: SVG documents to put into the HTML, such as `plot_table` makes.
    style "svg" plots the first table with two numeric columns: the first of them against the second.
    """
    if style == "terminal":
        from edgewise.report.terminal import to_terminal

        return to_terminal(report, colour=colour, width=width)
    if style == "markdown":
        from edgewise.report.markdown import to_markdown

        return to_markdown(report)
    if style == "html":
        from edgewise.report.html import to_html

        return to_html(report, plots)
    if style == "svg":
        from edgewise.report.svg import to_svg

        return to_svg(report)
    if style == "json":
        return json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n"
    raise InvalidValueError(f"style {style!r}: expected terminal, markdown, html, svg or json")
