"""Every style shows every number and every notice, and escapes what it is given."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as xml

import pytest

from edgewise.core.checkpoint import Step
from edgewise.core.errors import InvalidValueError, Notice
from edgewise.core.report import Quantity, Report, Table, Verdict
from edgewise.report import plot_table, render
from edgewise.report.svg import ticks
from edgewise.report.text import cell, describe, with_unit

TABLE = Table("sizes <&|", ("name", "memory", "quality"), (("a<b|c", 1_500_000, 0.5), ("[red]d", 3_000_000, None),
                                                           ("e", 4_000_000, 0.75)), ("", "B", ""))
REPORT = Report("fit of <m>", (Quantity("memory", 90_000_000, "B"), Quantity("ppl", 33.06, spread=(32.0, 34.0),
                                                                             origin="quoted")),
                (TABLE,), (Verdict("it fits", "partly", "barely"),), {"cpu": "x86"},
                (Step("quantize", {"bits": 4}),), (Notice("clamp", "context cut to <512>", "kv"),))


@pytest.mark.parametrize("style", ["terminal", "markdown", "html", "json"])
def test_every_style_shows_numbers_and_notices(style):
    text = render(REPORT, style, width=120)
    for expected in ("memory", "ppl", "quality", "clamp", "it fits", "partly", "barely"):
        assert expected in text
    if style != "json":
        for expected in ("90 MB", "33.06 (32 to 34)", "1.5 MB", "0.75", "quoted"):
            assert expected in text
    assert text.endswith("\n")


def test_json_style_is_the_report():
    assert Report.from_json(json.loads(render(REPORT, "json"))) == REPORT


def test_terminal_shows_brackets_as_they_are_and_colour_only_when_asked():
    plain = render(REPORT, "terminal", width=100)
    assert "[red]d" in plain
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= 100
    assert "\x1b" in render(REPORT, "terminal", colour=True)


def test_html_is_self_contained_and_escaped():
    plot = plot_table(TABLE, x="memory", y="quality")
    page = render(REPORT, "html", plots=[plot])
    assert "a&lt;b|c" in page
    assert "<512>" not in page
    assert plot in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in page


def test_markdown_escapes_cells():
    text = render(REPORT, "markdown")
    assert "a&lt;b\\|c" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {4}


def test_svg_has_a_point_per_complete_row_and_a_line_along_the_front():
    root = xml.fromstring(plot_table(TABLE, x="memory", y="quality", label="name", front=(0, 2)))
    kinds = [element.tag.split("}")[1] for element in root.iter()]
    assert kinds.count("circle") == 2
    assert kinds.count("polyline") == 1
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"a<b|c", "e", "memory", "quality", "sizes <&|"} <= set(texts)
    points = [(float(e.get("cx")), float(e.get("cy"))) for e in root.iter() if e.tag.endswith("circle")]
    assert points[0][0] < points[1][0]
    assert points[0][1] > points[1][1]  # up is smaller y in SVG


def test_svg_of_a_report_takes_the_first_two_numeric_columns():
    table = Table("t", ("name", "x", "y"), (("a", 1, 2), ("b", 2, 4)))
    assert render(Report("r", tables=(table,)), "svg") == plot_table(table, x="x", y="y")
    with pytest.raises(InvalidValueError, match="two numeric columns"):
        render(Report("r"), "svg")


def test_svg_refuses_unknown_or_empty_columns():
    with pytest.raises(InvalidValueError, match="no column 'speed'"):
        plot_table(TABLE, x="speed", y="quality")
    with pytest.raises(InvalidValueError, match="no row with numbers"):
        plot_table(TABLE, x="name", y="quality")


@pytest.mark.parametrize("values", [[0.0, 1.0], [3.0], [0.0], [1e6, 1.1e6], [-5.0, 5.0], [1e-9, 2e-9], [0.97, 0.999]])
def test_ticks_enclose_the_values_in_even_steps(values):
    marks = ticks(values)
    assert marks[0] <= min(values)
    assert marks[-1] >= max(values)
    assert 2 <= len(marks) <= 12
    steps = [b - a for a, b in itertools.pairwise(marks)]
    assert max(steps) == pytest.approx(min(steps))


@pytest.mark.parametrize(("value", "text"), [
    (None, "–"), (True, "yes"), (0, "0"), (1234567, "1,234,567"), (0.123456, "0.1235"), (1234.5, "1,234"), (0.0, "0"),
    (1e-7, "1.000e-07"), (float("nan"), "nan"), (12.0, "12"), ("x", "x"), (-0.5, "-0.5"), (999.96, "1000"),
])
def test_cell(value, text):
    assert cell(value) == text


@pytest.mark.parametrize(("value", "unit", "text"), [
    (1_536_000, "B", "1.536 MB"), (0.002, "s", "2 ms"), (90.0, "s", "90 s"), (3, "", "3"), (42.5e9, "B/s", "42.5 GB/s"),
    (512, "B", "512 B"), (0, "B", "0 B"), (None, "B", "–"), (5, "tokens/s", "5 tokens/s"), ("avx512", "x", "avx512 x"),
])
def test_with_unit(value, unit, text):
    assert with_unit(value, unit) == text


def test_describe():
    assert describe(Quantity("t", 0.002, "s", (0.001, 0.003))) == "2 ms (1 ms to 3 ms)"


def test_unknown_style():
    with pytest.raises(InvalidValueError, match="expected terminal"):
        render(REPORT, "pdf")
