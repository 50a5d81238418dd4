"""edgewise run, as a user types it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from edgewise import load
from edgewise.cli import app, frame
from edgewise.formats.gguf import write_gguf_raw
from edgewise.native.probe import tiers
from signals import hear_interrupts
from tiny_checkpoint import tiny_checkpoint, tiny_folder


def run(*args, **options):
    return CliRunner().invoke(app, ["run", "--threads", "1", *map(str, args)], **options)


def answer(*args, **options):
    result = run(*args, "--json", **options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_answer_is_that_of_the_library(tiny):
    model = load(tiny, threads=1)
    expected = model.generate("Hello", max_tokens=12).result()
    assert len(expected.ids) == 12
    result = run(tiny, "Hello", "-n", 12)
    assert result.exit_code == 0
    assert result.stdout == expected.text.rstrip("\n") + "\n"
    assert result.stderr == ""


def test_json_says_everything(tiny):
    data = answer(tiny, "Hello", "-n", 6, "--logprobs", 2)
    assert data["model"] == tiny
    assert data["finish_reason"] == "length"
    assert data["usage"] == {"prompt_tokens": 24, "completion_tokens": 6, "total_tokens": 30, "reused_tokens": 0}
    assert set(data["timings"]) == {"load_s", "prefill_s", "decode_s", "prefill_tokens_per_s", "decode_tokens_per_s"}
    assert [item["id"] for item in data["logprobs"]] == data["ids"]
    for item in data["logprobs"]:  # greedy: the chosen token is the likeliest one
        assert item["alternatives"][0]["id"] == item["id"]
        assert item["alternatives"][0]["logprob"] == pytest.approx(item["logprob"])
        assert item["alternatives"][1]["logprob"] <= item["logprob"] < 0
    assert data["sampling"] == {"from": "default", "temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0,
                                "repetition_penalty": 1, "seed": 0}
    assert data["memory"]["total_bytes"] == sum(
        data["memory"][part] for part in ("weights_bytes", "kv_bytes", "scratch_bytes"))
    assert data["tier"] in tiers()
    assert data["notices"] == []


def test_logprobs_are_a_table_for_a_person(tiny):
    result = run(tiny, "Hello", "-n", 3, "--logprobs", 2)
    assert result.exit_code == 0
    assert "Log-probabilities" in result.stdout
    assert "likeliest" in result.stdout


def test_prompts_from_argument_file_and_pipe_are_one(tiny, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Grüße\n", encoding="utf-8")
    expected = answer(tiny, "Grüße", "-n", 4)["ids"]
    assert answer(tiny, "--file", path, "-n", 4)["ids"] == expected
    assert answer(tiny, "-n", 4, input="Grüße\n")["ids"] == expected
    assert answer(tiny, "-", "-n", 4, input="Grüße\n")["ids"] == expected


def test_raw_continues_the_text_as_it_stands(tiny):
    data = answer(tiny, "--raw", "-n", 2, input="abc\n")
    assert data["usage"]["prompt_tokens"] == 4  # one token per byte, the line end among them
    assert answer(tiny, "--raw", "-n", 2, "abc")["usage"]["prompt_tokens"] == 3


def test_a_system_message_is_part_of_the_prompt(tiny):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = load(tiny, threads=1).generate(turns, max_tokens=4).result()
    assert answer(tiny, "Hi", "--system", "Be brief.", "-n", 4)["ids"] == expected.ids


def test_sampling_follows_its_seed(tiny):
    def drawn(*more):
        return answer(tiny, "Hello", "-n", 12, "--temperature", 1.5, *more)

    first = drawn("--seed", 7)
    assert drawn("--seed", 7)["ids"] == first["ids"]
    assert drawn("--seed", 8)["ids"] != first["ids"]
    fresh = drawn()
    assert drawn("--seed", fresh["sampling"]["seed"])["ids"] == fresh["ids"]
    assert drawn()["sampling"]["seed"] != fresh["sampling"]["seed"]


def test_the_models_own_sampling_is_the_default(tmp_path):
    folder = tiny_folder(tmp_path / "sampled", generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9})
    data = answer(folder, "Hello", "-n", 2)
    assert (data["sampling"]["from"], data["sampling"]["temperature"], data["sampling"]["top_p"]) == (
        "generation_config", 0.6, 0.9)
    data = answer(folder, "Hello", "-n", 2, "--temperature", 0)
    assert data["sampling"]["temperature"] == 0
    assert "temperature 0.6, top-p 0.9" in run(folder, "Hello", "-n", 2, "--stats").stderr


def test_a_stop_string_ends_the_answer(tiny):
    whole = answer(tiny, "Hello", "-n", 8)["text"]
    stopped = answer(tiny, "Hello", "-n", 8, "--stop", whole[1])
    assert stopped["text"] == whole[:1]
    assert stopped["finish_reason"] == "stop"


def test_stats_go_to_standard_error(tiny):
    result = run(tiny, "Hello", "-n", 3, "--stats")
    labels = [line.split()[0] for line in result.stderr.splitlines()]
    assert labels == ["load", "prefill", "decode", "ended", "sampling", "memory", "tier"]
    assert "tokens/s" in result.stderr
    assert "greedy" in result.stderr
    assert "tokens/s" not in result.stdout


@pytest.mark.parametrize(("policy", "code"), [("error", 7), ("stop", 0), ("restart", 0)])
def test_a_full_context_is_never_silent(tiny, policy, code):
    result = run(tiny, "Hello", "-n", 40, "--context", 48, "--overflow", policy)
    assert result.exit_code == code
    assert {"error": "do not fit the context of 48", "stop": "the context of 48 positions is full",
            "restart": "tokens after the first 0 were dropped"}[policy] in result.stderr


def test_a_full_context_ends_the_answer_by_default(tiny):
    data = answer(tiny, "Hello", "-n", 40, "--context", 48)
    assert data["finish_reason"] == "context"
    assert [item["kind"] for item in data["notices"]] == ["truncation"]
    assert run(tiny, "Hello", "-n", 40, "--context", 48, "--strict").exit_code == 9


@pytest.mark.parametrize("as_json", [True, False])
def test_an_interrupt_prints_what_there_is(tiny, monkeypatch, as_json):
    pieces = []

    def interrupted(self, text):
        pieces.append(text)
        if not self.json:
            sys.stdout.write(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(frame.Output, "write", interrupted)
    result = run(tiny, "Hello", "-n", 50, *(["--json"] if as_json else []))
    assert result.exit_code == 130
    if as_json:
        data = json.loads(result.stdout)
        assert data["finish_reason"] == "interrupted"
        assert len(data["ids"]) == 3
        assert data["text"] == "".join(pieces[:3])
    else:
        assert result.stdout.startswith("".join(pieces[:3]))


@pytest.mark.slow
def test_a_signal_ends_the_process_with_130(tiny):
    command = [sys.executable, "-m", "edgewise", "run", tiny, "Hello", "--overflow", "restart"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          preexec_fn=hear_interrupts) as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert b"Traceback" not in errors
    assert process.returncode == 130


# ---- encoders -----------------------------------------------------------------------------------------------------

def test_an_encoder_gives_its_embedding(encoder):
    expected = load(encoder, threads=1).embed("a sentence")[0]
    data = answer(encoder, "a sentence")
    assert data["dimensions"] == 64
    np.testing.assert_array_equal(np.asarray(data["embedding"], np.float32), expected)
    shown = run(encoder, "a sentence")
    assert shown.exit_code == 0
    assert "dimensions" in shown.stdout
    assert "--json" in shown.stdout


def test_generation_options_of_an_encoder_are_ignored_aloud(encoder):
    data = answer(encoder, "a sentence", "--temperature", 1)
    assert [item["kind"] for item in data["notices"]] == ["ignored"]
    assert "--temperature" in data["notices"][0]["message"]


def test_a_decoder_embeds_when_asked(tiny):
    assert answer(tiny, "a sentence", "--embed")["dimensions"] == 64


# ---- errors -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("args", "code", "words"), [
    (["smollm3", "Hi"], 3, "smollm2"),
    (["no/such/file.gguf", "Hi"], 3, "no/such/file.gguf"),
    (["{tiny}", "Hi", "--memory", "100KB"], 6, "give more"),
    (["{tiny}", "Hi", "--memory", "much"], 2, "90MB"),
    (["{tiny}", "Hi", "--kv", "int5"], 2, "fp16, bf16, int8, int4"),
    (["{tiny}", "Hi", "--format", "int99"], 2, "int4/g32/fp16/min"),
    (["{tiny}", "Hi", "--temperature", "-1"], 2, "temperature"),
    (["{tiny}", "Hi", "--overflow", "later"], 2, "restart"),
    (["{tiny}", "Hi", "--file", "x"], 2, "not both"),
    (["{tiny}", "--file", "no-such-file.txt"], 1, "no-such-file.txt"),
    (["{tiny}", ""], 2, "empty"),
    (["{tiny}", "Hi", "--raw", "--system", "x"], 2, "--system"),
    (["{tiny}", "Hi", "--context", "4"], 7, "context"),
    (["{tiny}", "Hi", "--unknown"], 2, "--unknown"),
])
def test_what_is_wrong_is_said_in_one_line(tiny, args, code, words):
    result = run(*[arg.format(tiny=tiny) for arg in args])
    assert result.exit_code == code
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    if not result.stderr.startswith("Usage"):
        assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


def test_an_unknown_architecture_names_the_known_ones(tmp_path):
    path = tmp_path / "strange.gguf"
    write_gguf_raw(path, {"general.architecture": "strange"},
                   {"token_embd.weight": ("F32", tiny_checkpoint().tensors["model.embed_tokens.weight"])})
    result = run(path, "Hi")
    assert result.exit_code == 5
    assert "strange" in result.stderr
    assert "llama" in result.stderr


def test_debug_shows_the_traceback(tmp_path):
    assert "Traceback" in run(tmp_path / "nothing.gguf", "Hi", "--debug").stderr


def test_help_has_examples():
    result = run("--help")
    assert result.exit_code == 0
    assert "edgewise run smollm2" in result.stdout


# ---- starting -----------------------------------------------------------------------------------------------------

def test_a_start_imports_nothing_heavy(tiny):
    code = ("import sys; from edgewise.cli import app\n"
            f"app(['run', {tiny!r}, 'Hello', '-n', '1'], standalone_mode=False)\n"
            "print(sorted(m for m in sys.modules if m.partition('.')[0] in "
            "('torch', 'transformers', 'rich', 'huggingface_hub', 'scipy')), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.slow
def test_smollm2_answers(monkeypatch):
    monkeypatch.undo()  # a model that is in the user's cache is not fetched again
    data = answer("smollm2", "The capital of France is", "--raw", "-n", 20)
    assert data["text"].startswith(" Paris")
    assert data["finish_reason"] == "length"
