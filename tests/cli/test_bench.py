"""edgewise bench, as a user types it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from edgewise.cli import app
from edgewise.core.report import Report


def run(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)])


@pytest.mark.slow  # it measures what the machine can do
def test_the_report_is_printed_and_written(tiny, tmp_path):
    out = tmp_path / "speed.json"
    result = run(tiny, "-p", "8,16", "-n", "4", "-d", "0,8", "-t", "1", "--repeats", "2", "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    report = Report.from_json(json.loads(result.stdout))
    assert [row[1] for row in report.tables[1].rows] == ["pp8", "pp16", "tg4", "pp8@8", "pp16@8", "tg4@8"]
    assert report["memory read, 1 thread"] > 0
    assert report["int8 peak, 1 thread"] > 0
    written = Report.from_json(json.loads(out.read_text()))
    assert written.tables == report.tables


@pytest.mark.slow  # it measures what the machine can do
def test_profile(tiny):
    result = run(tiny, "-p", "16", "-n", "4", "-t", "1,2", "--repeats", "2", "--profile", "--json")
    assert result.exit_code == 0, result.stderr
    tables = Report.from_json(json.loads(result.stdout)).tables[2:]
    assert [table.title for table in tables] == [
        "Operators of pp16, 1 thread", "Operators of tg4, one token, 1 thread", "Operators of pp16, 2 threads",
        "Operators of tg4, one token, 2 threads"]
    for table in tables:
        assert {"qkv", "attention", "down", "head", "whole"} <= {row[0] for row in table.rows}
        assert sum(row[3] for row in table.rows[:-1]) == pytest.approx(1)


@pytest.mark.parametrize(("args", "words"), [
    (["-p", "8,x"], "-p takes whole numbers"),
    (["-n", "-4"], "-n takes whole numbers"),
    (["-t", "0"], "at least 1"),
    (["--energy-model", "nosuchboard"], "nosuchboard"),
    (["-p", "0", "-n", "0"], "nothing to run"),
])
def test_refusals(tiny, args, words):
    result = run(tiny, *args)
    assert result.exit_code in (2, 3), result.stderr
    assert words in result.stderr
