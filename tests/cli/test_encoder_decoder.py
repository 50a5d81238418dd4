"""The verbs on a T5, which reads a text and answers it: what runs, and what the others say instead."""

from __future__ import annotations

import json

import pytest
from tiny_checkpoints import t5
from typer.testing import CliRunner

from edgewise import load
from edgewise.cli import app
from edgewise.core.errors import UnsupportedError
from edgewise.formats.folder_writer import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "t5"
    write_folder(t5(), path)
    return str(path)


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_run_answers_a_text(folder):
    expected = load(folder, threads=1).generate("A text", max_tokens=9, ignore_eos=False).result()
    result = call("run", folder, "A text", "-n", 9, "--threads", 1, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert (data["arch"], data["ids"], data["text"]) == ("t5", expected.ids, expected.text)
    assert data["usage"]["prompt_tokens"] == 6
    assert data["memory"]["total_bytes"] == load(folder, threads=1).memory.total_bytes


def test_run_embeds_by_the_encoder(folder):
    data = json.loads(call("run", folder, "A text", "--embed", "--threads", 1, "--json").stdout)
    assert data["embedding"] == pytest.approx(load(folder, threads=1).embed("A text")[0].tolist(), abs=1e-7)


def test_inspect_shows_both_stacks(folder):
    data = json.loads(call("inspect", folder, "--json").stdout)
    shown = {item["name"]: item["value"] for item in data["quantities"]}
    assert (shown["architecture"], shown["layers"], shown["hidden"], shown["heads"]) == ("t5", 2, 64, 3)


def test_bench_times_a_text_and_an_answer(folder):
    result = call("bench", folder, "-p", 8, "-n", 4, "--threads", 1, "--json")
    assert result.exit_code == 0, result.stderr
    table = json.loads(result.stdout)["tables"][1]
    assert [row[table["columns"].index("test")] for row in table["rows"]] == ["pp8", "tg4"]


@pytest.mark.parametrize(("args", "message"), [
    (("run", "--system", "Be brief.", "A text"), "reads one text"),
    (("perplexity", "--window", 8, "--text", "pydoc"), "perplexity needs a decoder"),
    (("fit", "--memory", "1MB"), "load it with a format instead"),
    (("chat",), "answers one text at a time"),
    (("convert", "--out", "t5.gguf"), "Write a Hugging Face folder instead")])
def test_other_verbs_say_what_to_do_instead(folder, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(args[0], folder, *args[1:])
    assert result.exit_code == UnsupportedError.exit_code
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert message in " ".join(result.stderr.split())
