"""The verb fit: options reach the search, the Report comes out as JSON, errors become exit codes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from edgewise.cli import app
from edgewise.engine.loading import model_of
from tiny_checkpoint import tiny_checkpoint, tiny_folder


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("All work and no play makes a dull model of its reader. " * 60)
    return tiny_folder(tmp_path / "tiny")


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_json_is_the_report_and_the_folder_is_there(source, tmp_path):
    memory = model_of(tiny_checkpoint(), threads=1).memory.total_bytes * 7 // 10
    done = run("fit", source, "--memory", memory, "--out", tmp_path / "out", "--text", tmp_path / "text.txt",
               "--threads", 1, "--formats", "int8/g32,int4/g32/fp16/min", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    values = {quantity["name"]: quantity["value"] for quantity in report["quantities"]}
    assert values["memory_bytes"] <= memory
    assert values["written to"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_without_a_limit(source):
    done = run("fit", source)
    assert done.exit_code == 2
    assert "needs a limit" in done.stderr


def test_an_impossible_budget(source, tmp_path):
    done = run("fit", source, "--memory", "10KB", "--text", tmp_path / "text.txt", "--out", tmp_path / "out",
               "--threads", 1)
    assert done.exit_code == 6
    assert "the least memory is" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "message"), [(("--search", "deep"), "quick or full"),
                                                (("--quality", "1.5"), "at most 1"),
                                                (("--memory", "90MB", "--formats", "int4/x"), "granularity")])
def test_unusable_options(source, tmp_path, words, message):
    done = run("fit", source, "--text", tmp_path / "text.txt", *words)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_search_over_pipelines(source, tmp_path):
    pytest.importorskip("optuna")
    memory = model_of(tiny_checkpoint(), threads=1, context=64).memory.total_bytes
    words = ("fit", source, "--memory", memory, "--steps", "width,sparsity,bits", "--trials", 4, "--orders", 2,
             "--seed", 3, "--methods", "rtn", "--context", 64, "--out", tmp_path / "out", "--text",
             tmp_path / "text.txt", "--threads", 1, "--json")
    done = run(*words)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    values = {quantity["name"]: quantity["value"] for quantity in report["quantities"]}
    assert values["trials"] == 4
    assert values["seed"] == 3
    assert values["memory_bytes"] <= memory
    assert [table["title"] for table in report["tables"]][:2] == ["Before and after", "Steps of the chosen pipeline"]
    answer = run("run", tmp_path / "out", "abc", "-n", 3, "--temperature", 0)
    assert answer.exit_code == 0, answer.output
    again = run(*words, "--resume")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(("words", "message"), [(("--trials", 3), "--steps starts"), (("--resume",), "--steps starts"),
                                                (("--steps", "height"), "steps are of"),
                                                (("--steps", "bits", "--search", "full"), "of formats alone")])
def test_unusable_searches(source, words, message):
    done = run("fit", source, "--memory", "1MB", *words)
    assert done.exit_code == 2
    assert message in done.stderr.replace("\n", " ")
