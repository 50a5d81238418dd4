"""Conversations: what is rendered, kept, dropped and saved."""

from __future__ import annotations

import json
from contextlib import closing

import pytest

from edgewise.core.errors import (
    ContextOverflowError,
    FormatError,
    InvalidValueError,
    SourceError,
    UnsupportedError,
    collect_notices,
)
from edgewise.engine import GenerationOptions, model_of
from edgewise.engine.conversation import Conversation
from edgewise.engine.defaults import generation_defaults
from tiny_checkpoint import tiny_checkpoint, tiny_encoder


@pytest.fixture(scope="module")
def model():
    return model_of(tiny_checkpoint(context=256), cache=False, threads=1)


def talk_with(model, **options):
    return Conversation(model, GenerationOptions(**{"max_tokens": 8, "overflow": "restart", **options}))


def said(talk, text):
    return "".join(token.text for token in talk.say(text))


def test_a_turn_sees_all_that_was_said_and_reads_only_what_is_new(model):
    talk = talk_with(model)
    talk.system = "Be brief."
    first = said(talk, "Hello")
    assert talk.last.reused_tokens == 0 or first
    second = said(talk, "More")
    assert talk.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first},
                             {"role": "user", "content": "More"}, {"role": "assistant", "content": second}]
    assert talk.last.reused_tokens > 0
    alone = model_of(tiny_checkpoint(context=256), cache=False, threads=1)
    turns = [{"role": "system", "content": "Be brief."}, *talk.messages[:3]]
    assert alone.generate(turns, max_tokens=8).result().text == second


def test_reset_forgets_the_turns_and_keeps_the_system_message(model):
    talk = talk_with(model)
    talk.system = "x"
    first = said(talk, "Hello")
    talk.reset()
    assert talk.messages == []
    assert said(talk, "Hello") == first
    assert talk.system == "x"


def test_the_oldest_turns_are_dropped_aloud(model):
    talk = talk_with(model)
    with collect_notices() as notices:
        for number in range(8):
            said(talk, f"message {number}")
            assert talk.last.prompt_tokens + 8 <= model.context
    dropped = [item for item in notices if "oldest messages" in item.message]
    assert dropped
    assert {item.kind for item in dropped} == {"truncation"}
    assert talk.messages[0]["role"] == "user"
    assert talk.messages[0]["content"] != "message 0"
    assert talk.messages[-2]["content"] == "message 7"


def test_other_policies_drop_nothing(model):
    talk = talk_with(model, overflow="error")
    with pytest.raises(ContextOverflowError):
        for number in range(12):
            said(talk, f"message {number}")
    assert talk.messages[0]["content"] == "message 0"
    assert len(talk.messages) % 2 == 0  # the question that could not be answered is not part of it


def test_a_message_longer_than_the_context_is_an_error_and_leaves_no_trace(model):
    talk = talk_with(model)
    said(talk, "short")
    with collect_notices(), pytest.raises(ContextOverflowError):
        said(talk, "long " * 100)
    assert [m["content"] for m in talk.messages if m["role"] == "user"] in ([], ["short"])
    assert said(talk, "short again") is not None


def test_what_was_said_before_an_interrupt_is_kept(model):
    talk = talk_with(model)
    with closing(talk.say("Hello")) as tokens:
        texts = [next(tokens).text for _ in range(3)]
    assert talk.messages[-1] == {"role": "assistant", "content": "".join(texts)}
    assert talk.last.finish_reason == "interrupted"


def test_saved_and_loaded(model, tmp_path):
    talk, path = talk_with(model), tmp_path / "talk.json"
    talk.system = "Grüße"
    said(talk, "Hello")
    talk.save(path)
    said(talk, "More")
    talk.save(path)  # its own file may be replaced
    again = talk_with(model)
    again.load(path)
    assert (again.system, again.messages) == (talk.system, talk.messages)
    assert said(again, "And?") == said(talk, "And?")


def test_files_that_are_no_conversation(model, tmp_path):
    talk, path = talk_with(model), tmp_path / "other.json"
    path.write_text('{"precious": 1}')
    with pytest.raises(InvalidValueError, match="choose another name"):
        talk.save(path)
    assert path.read_text() == '{"precious": 1}'
    good = {"kind": "edgewise conversation", "system": None, "messages": []}
    bad = [{}, {**good, "messages": 3}, {**good, "system": 3}, {**good, "messages": [{"role": "assistant"}]},
           {**good, "messages": [{"role": "user", "content": "x"}]},
           {**good, "messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]}]
    for data in bad:
        path.write_text(json.dumps(data))
        with pytest.raises(FormatError, match=r"other\.json"):
            talk.load(path)
    with pytest.raises((SourceError, FormatError, OSError)):
        talk.load(tmp_path / "nothing.json")
    assert talk.messages == []


def test_an_encoder_does_not_talk():
    with pytest.raises(UnsupportedError, match="encoder"):
        Conversation(model_of(tiny_encoder(), cache=False, threads=1))


@pytest.mark.parametrize(("given", "expected"), [
    ({}, {}),
    ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
    ({"do_sample": False, "temperature": 0.6}, {}),
    ({"do_sample": True, "top_k": 20}, {"temperature": 1.0, "top_k": 20}),
    ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"repetition_penalty": 1.0}, {}),
])
def test_a_models_own_sampling(given, expected):
    assert generation_defaults(tiny_checkpoint(generation=given)) == expected


@pytest.mark.parametrize(("given", "left"), [
    ({"temperature": -1.0}, {}), ({"temperature": "hot"}, {}), ({"repetition_penalty": "high"}, {}),
    ({"temperature": 1.0, "top_p": 7}, {"temperature": 1.0}),
    ({"temperature": 1.0, "top_k": 2.5}, {"temperature": 1.0})])
def test_nonsense_in_a_generation_config_is_ignored_aloud(given, left):
    with collect_notices() as notices:
        assert generation_defaults(tiny_checkpoint(generation=given)) == left
    assert [item.kind for item in notices] == ["ignored"]
