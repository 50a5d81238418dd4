"""edgewise quantize: what it prints, what it writes, and how it says no."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from edgewise.cli import app
from edgewise.formats.folder import read_folder


def run(*arguments):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("A leaf is green, and the sea is blue; what is near is not far.\n" * 100, "utf-8")
    return path


def test_a_model_is_written_and_reported(tiny, notes, tmp_path):
    done = run(tiny, "--method", "gptq", "--format", "int4/g32", "--calibrate", notes, "--windows", 8, "--out",
               tmp_path / "small", "--set", "damp=0.02", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    values = {quantity["name"]: quantity["value"] for quantity in report["quantities"]}
    assert values["method"].startswith("gptq (Frantar")
    assert 0 < values["quality"] <= 1
    assert read_folder(tmp_path / "small").lineage[-1].config["settings"]["damp"] == 0.02


def test_the_methods_are_listed():
    done = run("--list")
    assert done.exit_code == 0
    for name in ("rtn", "gptq", "awq", "smoothquant", "llm-int8", "lorc"):
        assert name in done.output


@pytest.mark.parametrize(("arguments", "code", "words"), [
    ((), 2, "which MODEL"), (("{tiny}", "--method", "magic"), 2, "no method 'magic'"),
    (("{tiny}", "--set", "damp"), 2, "NAME=VALUE"), (("{tiny}", "--format", "int4/g48"), 2, "q_proj.weight"),
    (("no-such-model",), 3, "no-such-model"),
])
def test_what_cannot_be_done_is_one_line(tiny, notes, tmp_path, arguments, code, words):
    given = [each.format(tiny=tiny) for each in arguments]
    done = run(*given, *(("--calibrate", notes, "--out", tmp_path / "out") if given else ()), "--offline")
    assert done.exit_code == code
    assert words in done.output
    assert done.output.count("edgewise: error:") == 1
    assert not (tmp_path / "out").exists()
