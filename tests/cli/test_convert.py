"""edgewise convert, as a user types it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from edgewise.cli import app
from edgewise.core.report import Report
from edgewise.formats import open_checkpoint


def invoke(*args):
    return CliRunner().invoke(app, list(map(str, args)))


def test_a_converted_model_runs(tiny, tmp_path):
    out = tmp_path / "tiny.gguf"
    result = invoke("convert", tiny, "--out", out, "--format", "q4_0", "--embedding", "Q8_0", "--json")
    assert result.exit_code == 0, result.stderr
    report = Report.from_json(json.loads(result.stdout))
    assert 0 < report["relative_rms_error"] < 0.2
    assert {table.title for table in report.tables} == {"Classes", "Layers", "Tensors"}
    assert open_checkpoint(out).tensors["model.embed_tokens.weight"].codec.name == "Q8_0"
    assert invoke("run", out, "Hello", "-n", 4).exit_code == 0


def test_a_person_sees_classes_and_layers(tiny, tmp_path):
    shown = invoke("convert", tiny, "-o", tmp_path / "a", "--format", "int4/g32").stdout
    assert "feed-forward" in shown
    assert "relative" in shown
    assert "down_proj" not in shown
    assert "down_proj" in invoke("convert", tiny, "-o", tmp_path / "b", "--format", "int4/g32", "--tensors").stdout


@pytest.mark.parametrize(("args", "code", "words"), [
    (["{tiny}", "--out", "x.gguf", "--format", "Q9_9"], 2, "Q4_0"),
    (["{tiny}", "--out", "x.gguf", "--format", "Q4_K"], 5, "not written"),
    (["{tiny}", "--out", "x.gguf", "--dense", "fp16"], 2, "folder"),
    (["{tiny}", "--out", "x", "--layout", "awq"], 2, "compressed-tensors"),
    (["{tiny}", "--out", "x.gguf", "--layout", "compressed-tensors"], 2, "model folder"),
    (["{tiny}", "--out", "x", "--layout", "compressed-tensors"], 2, "no weight is in a format"),
    (["{tiny}", "--out", "{tiny}", "--overwrite"], 2, "being read"),
    (["no-such-model", "--out", "x.gguf"], 3, "no-such-model"),
    (["{tiny}"], 2, "--out"),
])
def test_what_is_wrong_is_said(tiny, tmp_path, monkeypatch, args, code, words):
    monkeypatch.chdir(tmp_path)
    result = invoke("convert", *[arg.format(tiny=tiny) for arg in args])
    assert result.exit_code == code
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
