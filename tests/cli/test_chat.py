"""edgewise chat, with its turns piped in; once at a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from edgewise import load
from edgewise.cli import app
from edgewise.engine import GenerationOptions
from edgewise.engine.conversation import Conversation
from signals import hear_interrupts


def chat(model, lines, *args):
    return CliRunner().invoke(app, ["chat", str(model), "-n", "8", "--threads", "1", *map(str, args)], input=lines)


def test_each_line_is_a_turn(tiny):
    talk = Conversation(load(tiny, threads=1), GenerationOptions(max_tokens=8, overflow="restart"))
    expected = "".join("".join(t.text for t in talk.say(line)) + "\n" for line in ("Hello", "More"))
    result = chat(tiny, "Hello\n\nMore\n")
    assert result.exit_code == 0
    assert result.stdout == expected
    assert result.stderr == ""


def test_json_is_the_whole_conversation(tiny):
    result = chat(tiny, "Hello\nMore\n", "--system", "Be brief.", "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert data["system"] == "Be brief."
    assert [m["role"] for m in data["messages"]] == ["user", "assistant"] * 2
    assert data["turns"][0]["reused_tokens"] == 0
    assert 0 < data["turns"][1]["reused_tokens"] < data["turns"][1]["prompt_tokens"]
    assert all(turn["notices"] == [] for turn in data["turns"])


def test_commands(tiny, tmp_path):
    saved = tmp_path / "talk.json"
    result = chat(tiny, f"/help\nHello\n/stats\n/save {saved}\n/reset\n/load {saved}\n/system Be brief.\n/system\n"
                        "/nonsense\n/save\n/exit\nnever said\n")
    assert result.exit_code == 0
    assert "/reset" in result.stderr
    assert "2 messages" in result.stderr
    assert "of 256 positions" in result.stderr
    assert "tokens/s" in result.stderr
    assert "Saved 2 messages" in result.stderr
    assert f"2 messages from {saved}" in result.stderr
    assert result.stderr.count("System message: Be brief.") == 2
    assert "/nonsense is no command" in result.stderr
    assert "/save needs" in result.stderr
    assert len(json.loads(saved.read_text())["messages"]) == 2


def test_what_begins_with_two_slashes_and_what_ends_in_a_backslash(tiny):
    data = json.loads(chat(tiny, "//exit\none\\\ntwo\n", "--json").stdout)
    assert [m["content"] for m in data["messages"] if m["role"] == "user"] == ["/exit", "one\ntwo"]


def test_a_full_context_is_said_and_the_talk_goes_on(tiny):
    result = chat(tiny, "some words to fill it\n" * 6)
    assert result.exit_code == 0
    assert "oldest messages were dropped" in result.stderr
    assert chat(tiny, "some words to fill it\n" * 6, "--overflow", "error").exit_code == 7


def test_stats_after_each_answer(tiny):
    result = chat(tiny, "Hello\nMore\n", "--stats")
    assert len([line for line in result.stderr.splitlines() if line.startswith("read ")]) == 2


@pytest.mark.parametrize(("args", "code", "words"), [
    (["smollm3"], 3, "smollm2"), (["{encoder}"], 5, "encoder"), (["{tiny}", "--memory", "10KB"], 6, "give more"),
    (["{tiny}", "--overflow", "x"], 2, "restart")])
def test_what_is_wrong_is_said_in_one_line(tiny, encoder, args, code, words):
    result = CliRunner().invoke(app, ["chat", *[arg.format(tiny=tiny, encoder=encoder) for arg in args]], input="Hi\n")
    assert result.exit_code == code
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_at_a_terminal(tiny, tmp_path):
    """An error and an interrupt do not end the talk; Ctrl-D does."""
    main, side = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "edgewise", "chat", tiny, "-n", "4"], stdin=side, stdout=side,
                               stderr=side, start_new_session=True, env={**os.environ, "TERM": "dumb"},
                               preexec_fn=hear_interrupts)
    os.close(side)
    seen = ""

    def until(words, meanwhile=lambda: None):
        """Reads on until the words have come. meanwhile: called after each second of silence."""
        nonlocal seen
        end = time.monotonic() + 60
        while words not in seen:
            assert time.monotonic() < end, seen
            if select.select([main], [], [], 1.0)[0]:
                seen += os.read(main, 4096).decode("utf-8", "replace")
            else:
                meanwhile()
        seen = seen.partition(words)[2]

    until("> ")
    os.write(main, f"/load {tmp_path / 'nothing.json'}\n".encode())
    until("edgewise: error: ")
    until("> ")
    process.send_signal(signal.SIGINT)
    # A signal that comes between the prompt and the wait for a key is seen at the next key only, or at the next signal.
    until("Ctrl-D or /exit leaves", meanwhile=lambda: process.send_signal(signal.SIGINT))
    os.write(main, b"Hello\n")
    until("> ")
    os.write(main, b"/stats\n")
    until("2 messages")
    until("> ")
    os.write(main, b"\x04")
    try:  # a process at a terminal may wait until its output is read
        while os.read(main, 4096):
            pass
    except OSError:  # what Linux says once nobody is at the other end
        pass
    assert process.wait(60) == 0
    os.close(main)
