"""edgewise reproduce and coverage, as a user types them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from edgewise.cli import app
from edgewise.core.report import Report
from edgewise.papers.coverage import ROWS


def run(*args):
    return CliRunner().invoke(app, [*map(str, args)])


def test_the_list_names_every_recipe():
    from edgewise.papers import slugs

    result = run("reproduce", "--list", "--json")
    report = Report.from_json(json.loads(result.stdout))
    assert tuple(row[0] for row in report.tables[0].rows) == slugs()


@pytest.mark.parametrize(("args", "words"), [
    ((), "give a recipe"), (("nothing-such",), "no recipe"), (("nothing-such", "--scale", "huge"), "smoke, small or"),
])
def test_refusals(args, words):
    result = run("reproduce", *args)
    assert result.exit_code == 2
    assert words in result.stderr


def test_coverage_prints_the_checklist():
    result = run("coverage")
    assert result.exit_code == 0
    assert "F1" in result.stdout
    report = Report.from_json(json.loads(run("coverage", "--area", "compression", "--json").stdout))
    assert report["rows"] == sum(row.area == "compression" for row in ROWS)
    assert run("coverage", "--area", "cooking").exit_code == 2
