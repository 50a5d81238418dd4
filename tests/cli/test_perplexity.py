"""edgewise perplexity, as a user types it."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
from typer.testing import CliRunner

from edgewise import load
from edgewise.cli import app
from edgewise.core.report import Report
from edgewise.native.probe import tiers

CONTENT = "The quick brown fox jumps over the lazy dog. " * 12


def run(*args):
    return CliRunner().invoke(app, ["perplexity", "--threads", "1", *map(str, args)])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(CONTENT)
    return path


def report(*args):
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return Report.from_json(json.loads(result.stdout))


def test_the_value_and_what_it_was_measured_on(tiny, text):
    found = report(tiny, "--text", text, "--window", 64, "--windows", 3)
    expected = load(tiny, threads=1).perplexity(CONTENT, window=64, windows=3)
    assert found["perplexity"] == expected
    assert found["mean_negative_log_probability"] == pytest.approx(math.log(expected))
    assert found["text_sha256"] == hashlib.sha256(CONTENT.encode()).hexdigest()
    assert found["text_tokens"] == len(CONTENT)  # one token per byte
    assert (found["windows"], found["predicted_tokens"]) == (3, 3 * 63)
    assert found.environment["tier"] in tiers()


def test_without_windows_it_is_the_whole_text(tiny, text):
    assert report(tiny, "--text", text, "--window", 64)["windows"] == len(CONTENT) // 64
    assert "perplexity" in run(tiny, "--text", text, "--window", 64).stdout


def test_a_coarser_format_changes_the_value(tiny, text):
    exact = report(tiny, "--text", text, "--window", 64)
    coarse = report(tiny, "--text", text, "--window", 64, "--format", "int2/g32/fp16/min")
    assert coarse["perplexity"] != exact["perplexity"]
    assert any("requantised" in item.message for item in coarse.notices)


@pytest.mark.parametrize(("args", "code", "words"), [
    (["{tiny}", "--text", "lee_backgrund"], 3, "lee_background"),
    (["{tiny}", "--text", "{text}", "--window", "512"], 2, "context of 256"),
    (["{tiny}", "--text", "{short}", "--window", "64"], 2, "longer text"),
    (["{encoder}", "--text", "{text}", "--window", "32"], 5, "decoder"),
    (["nothing.gguf", "--text", "{text}"], 3, "nothing.gguf"),
    (["{tiny}", "--text", "{text}", "--window", "64", "--memory", "10KB"], 6, "give more"),
])
def test_what_is_wrong_is_said(tiny, encoder, text, tmp_path, args, code, words):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    result = run(*[arg.format(tiny=tiny, encoder=encoder, text=text, short=short) for arg in args])
    assert result.exit_code == code, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_smollm2_on_the_evaluation_text(monkeypatch):
    """Within 1 % of float32's 33.060 on the first eight windows; the text is the one that value was measured on."""
    monkeypatch.undo()
    found = report("smollm2", "--windows", 8)
    assert found["text_sha256"] == "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
    assert found["text_tokens"] == 75_678
    assert found["perplexity"] == pytest.approx(33.060, rel=0.01)
