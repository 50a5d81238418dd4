"""edgewise inspect, as a user types it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from edgewise.cli import app
from edgewise.core.report import Report
from edgewise.formats.describe import describe
from tiny_checkpoint import CHAT_TEMPLATE


def run(*args):
    return CliRunner().invoke(app, ["inspect", *map(str, args)])


def test_json_is_the_report_of_the_library(tiny):
    result = run(tiny, "--json")
    assert result.exit_code == 0
    found = Report.from_json(json.loads(result.stdout))
    assert found.to_json() == describe(tiny).to_json()
    assert {table.title for table in found.tables} == {"Formats", "Groups", "Tensors", "Configuration",
                                                       "Chat template"}


def test_a_person_sees_groups_and_asks_for_more(tiny):
    shown = run(tiny).stdout
    assert "model.layers.*.mlp.up_proj.weight" in shown
    assert "apache-2.0" in shown
    assert "rope_theta" not in shown
    assert "model.layers.1.mlp.up_proj.weight" in run(tiny, "--tensors").stdout
    assert "rope_theta" in run(tiny, "--keys").stdout


def test_the_template_alone(tiny, encoder):
    assert run(tiny, "--template").stdout == CHAT_TEMPLATE + "\n"
    assert "none" in run(encoder, "--template").stdout


@pytest.mark.parametrize(("content", "code", "words"), [
    (None, 3, "no model"), (b"not a model at all, certainly not", 4, "byte 0")])
def test_what_is_wrong_is_said_in_one_line(tmp_path, content, code, words):
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    result = run(path)
    assert result.exit_code == code
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
