"""Generation: what comes out is what the logits say; stops, limits, seeds, full contexts, and prompts read once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tiny_checkpoints import EOS, bert, llama

from edgewise.core.errors import ContextOverflowError, InvalidValueError, UnsupportedError, collect_notices
from edgewise.engine.generate import GenerationOptions
from edgewise.engine.loading import model_of

PROMPT = [10, 20, 30, 40, 50]


@pytest.fixture(scope="module")
def model():
    return model_of(llama(), threads=1)


@pytest.fixture(autouse=True)
def _fresh(model):
    model.reset()


def small(context: int = 24):
    return model_of(llama(), threads=1, context=context)


def greedy(model, prompt, n):
    """By whole forward passes, without any cache."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model.forward(ids)[-1].argmax()))
    return ids[len(prompt):]


def test_greedy_is_the_best_token_each_time(model):
    found = model.generate(PROMPT, max_tokens=20, ignore_eos=True).result()
    assert found.ids == greedy(model, PROMPT, 20)
    assert found.finish_reason == "length"
    assert found.prompt_tokens == 5
    assert model.generate(PROMPT, max_tokens=20, ignore_eos=True).result().ids == found.ids


def test_tokens_and_text_come_as_they_are_certain(model):
    generation = model.generate(PROMPT, max_tokens=30, ignore_eos=True)
    tokens = list(generation)
    assert "".join(token.text for token in tokens) == generation.text
    assert generation.text == model.tokenizer.decode(generation.ids)
    assert "".join(model.stream(PROMPT, max_tokens=30, ignore_eos=True)) == generation.text


def test_seeds(model):
    def drawn(**options):
        return model.generate(PROMPT, max_tokens=15, temperature=1.5, ignore_eos=True, **options).result().ids

    assert drawn(seed=3) == drawn(seed=3)
    assert len({tuple(drawn(seed=seed)) for seed in range(4)}) == 4
    assert drawn(seed=3, top_k=1) == greedy(model, PROMPT, 15)


def test_log_probabilities_add_up_to_the_forward_pass(model):
    tokens = list(model.generate(PROMPT, max_tokens=12, temperature=1.0, seed=1, logprobs=3, ignore_eos=True))[:12]
    ids = [token.id for token in tokens]
    wide = model.forward(PROMPT + ids)[4:16].astype(np.float64)
    own = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    assert sum(token.logprob for token in tokens) == pytest.approx(own[np.arange(12), ids].sum(), abs=1e-4)
    for token, row in zip(tokens, own, strict=True):
        assert [i for i, _ in token.alternatives] == np.argsort(-row, kind="stable")[:3].tolist()
        assert all(math.isclose(p, row[i], abs_tol=1e-4) for i, p in token.alternatives)


def test_the_end_of_text_ends_it(model):
    biased = model_of(llama(seed=4), threads=1)
    for seed in range(200):
        found = biased.generate(PROMPT, max_tokens=100, temperature=3.0, seed=seed).result()
        if found.finish_reason == "stop":
            assert EOS not in found.ids
            longer = biased.generate(PROMPT, max_tokens=100, temperature=3.0, seed=seed, ignore_eos=True).result()
            assert longer.ids[:len(found.ids) + 1] == [*found.ids, EOS]
            assert len(longer.ids) == 100
            return
    raise AssertionError("no end of text in two hundred tries")


def test_stop_strings_across_tokens(model):
    text = model.generate(PROMPT, max_tokens=40, ignore_eos=True).result().text
    stop = text[11:16]
    assert len(stop) == 5
    generation = model.generate(PROMPT, max_tokens=40, ignore_eos=True, stop=[stop, "never in it"])
    pieces = [token.text for token in generation]
    assert generation.text == "".join(pieces) == text[:text.index(stop)]
    assert generation.finish_reason == "stop"
    assert len(generation.ids) < 40
    assert model.generate(PROMPT, max_tokens=12, ignore_eos=True, stop=text[:1]).result().text == ""


def test_limits(model):
    nothing = model.generate(PROMPT, max_tokens=0)
    assert list(nothing) == []
    assert (nothing.finish_reason, nothing.ids, nothing.text) == ("length", [], "")
    assert len(model.generate(PROMPT, max_tokens=1, ignore_eos=True).result().ids) == 1


def test_a_prompt_is_read_once():
    model, fresh = small(64), small(64)
    first = model.generate(PROMPT, max_tokens=8, ignore_eos=True).result()
    assert first.reused_tokens == 0
    longer = PROMPT + first.ids + [60, 61]
    again = model.generate(longer, max_tokens=8, ignore_eos=True).result()
    assert again.reused_tokens == len(PROMPT) + 7  # the last token drawn was never read
    assert again.ids == fresh.generate(longer, max_tokens=8, ignore_eos=True).result().ids
    other = [*PROMPT[:3], 99, 98]
    again = model.generate(other, max_tokens=8, ignore_eos=True).result()
    assert again.reused_tokens == 3
    fresh.reset()
    assert again.ids == fresh.generate(other, max_tokens=8, ignore_eos=True).result().ids
    same = model.generate(other, max_tokens=8, ignore_eos=True).result()
    assert same.reused_tokens == 4  # the last is read again for its logits
    assert same.ids == again.ids


def test_reuse_after_everything_that_can_happen():
    """An end of text, a stop, a generation given up half way, a restart: what is held is known."""
    model = small()
    for options in ({"stop": "e"}, {"temperature": 3.0, "seed": 5}, {"overflow": "restart", "max_tokens": 70},
                    {"overflow": "stop", "max_tokens": 70}):
        with collect_notices():
            before = model.generate(PROMPT, **{"max_tokens": 10, "ignore_eos": True, **options}).result()
        for prompt in (PROMPT, (PROMPT + before.ids)[:20], (PROMPT + before.ids)[-12:]):
            found = model.generate(prompt, max_tokens=4, ignore_eos=True).result()
            assert found.ids == small().generate(prompt, max_tokens=4, ignore_eos=True).result().ids
    given_up = model.generate(PROMPT, max_tokens=10, ignore_eos=True)
    next(given_up)
    next(given_up)
    assert model.generate(PROMPT, max_tokens=5, ignore_eos=True).result().ids == greedy(model, PROMPT, 5)


def test_an_interrupted_generation_says_so(model):
    one = model.generate(PROMPT, max_tokens=10, ignore_eos=True)
    next(one)
    model.generate([1, 2, 3], max_tokens=2, ignore_eos=True).result()
    with pytest.raises(InvalidValueError, match="the model has read another sequence since"):
        next(one)
    two = model.generate(PROMPT, max_tokens=10, ignore_eos=True)
    next(two)
    model.forward([1, 2])
    with pytest.raises(InvalidValueError, match="another sequence"):
        next(two)


class TestFullContext:
    def test_is_an_error_before_anything_is_read(self):
        with pytest.raises(ContextOverflowError, match=r"5 tokens of prompt and 21 new ones .* 24 positions.*overflow"):
            small().generate(PROMPT, max_tokens=21).result()
        found = small().generate(PROMPT, max_tokens=20, ignore_eos=True).result()
        assert len(found.ids) == 20

    def test_is_an_error_when_it_comes(self):
        generation = small().generate(PROMPT, ignore_eos=True)
        with pytest.raises(ContextOverflowError, match="full after 20 new tokens"):
            list(generation)
        assert len(generation.ids) == 20

    def test_stop_is_reported(self):
        with collect_notices() as notices:
            found = small().generate(PROMPT, ignore_eos=True, overflow="stop").result()
        assert (found.finish_reason, len(found.ids)) == ("context", 20)
        assert [(n.kind, n.where) for n in notices] == [("truncation", "context")]

    def test_restart_is_reported_and_goes_on_from_what_is_kept(self):
        with collect_notices() as notices:
            found = small().generate(PROMPT, ignore_eos=True, overflow="restart", keep=3, max_tokens=40).result()
        assert found.finish_reason == "length"
        text = PROMPT + found.ids
        kept = text[:3] + text[15:25]  # 24 positions and the token that did not fit; half of the 21 not kept for good
        assert found.ids[20:31] == greedy(small(40), kept, 11)
        assert [n.kind for n in notices] == ["truncation"] * len(notices)
        assert "12 tokens after the first 3 were dropped" in notices[0].message

    def test_a_prompt_that_does_not_fit(self):
        with pytest.raises(ContextOverflowError, match="the prompt has 25 tokens, the context 24"):
            small().generate(list(range(25)), max_tokens=1, overflow="restart").result()
        assert len(small().generate(list(range(24)), max_tokens=1, ignore_eos=True).result().ids) == 1


@pytest.mark.parametrize(("prompt", "message"), [([], "prompt is empty"), ([257], "token 257 is outside"),
                                                 ([3, -1], "token -1 is outside the vocabulary of 257")])
def test_wrong_prompts(model, prompt, message):
    with pytest.raises(InvalidValueError, match=message):
        model.generate(prompt, max_tokens=2).result()


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": -1}, "temperature is between 0 and 100; given -1"), ({"temperature": math.nan}, "temperature"),
    ({"top_p": 1.5}, "top_p"), ({"min_p": -0.1}, "min_p"), ({"top_k": -1}, "top_k"), ({"seed": 2**64}, "seed"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"max_tokens": -1}, "max_tokens"),
    ({"logprobs": 101}, "logprobs"),
    ({"overflow": "shift"}, "overflow is error, stop or restart; given 'shift'"), ({"stop": ["a", ""]}, "stop string"),
    ({"temprature": 1}, "unknown generation option temprature; known: .*temperature")])
def test_wrong_options(model, options, message):
    with pytest.raises(InvalidValueError, match=message):
        model.generate(PROMPT, **options)


def test_changes_make_a_copy():
    options = GenerationOptions(temperature=0.5)
    assert options.with_changes(stop="x").stop == ("x",)
    assert options.with_changes(stop=None).stop == ()
    assert options.stop == ()


def test_an_encoder_does_not_generate():
    model = model_of(bert(), threads=1)
    for call in (lambda: model.generate([1], max_tokens=1), lambda: model.perplexity([1, 2, 3], window=3)):
        with pytest.raises(UnsupportedError, match=r"needs a decoder; tiny-bert is an encoder .*use embed"):
            call()


def test_without_a_tokenizer_ids_still_work():
    model = model_of(llama(tokenizer=False), threads=1)
    with pytest.raises(UnsupportedError, match="carries no tokenizer; pass token ids"):
        model.generate("hello")
    found = model.generate(PROMPT, max_tokens=5).result()
    assert (len(found.ids), found.text) == (5, "")
    assert found.ids == greedy(model, PROMPT, 5)


def test_templates_and_raw_text():
    model = model_of(llama(), threads=1)
    text = model.tokenizer.decode(model.prompt_ids("hi"))
    assert text == "[user]hi>"
    assert model.tokenizer.decode(model.prompt_ids("hi", raw=True)) == "hi"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert model.generate(turns, max_tokens=1).result().prompt_tokens == len("[user]a[assistant]b>")
    with pytest.raises(InvalidValueError, match="raw text is a string"):
        model.generate(turns, raw=True)


def test_text_held_back_comes_without_a_token(model):
    """A stop string that could begin with the last piece holds it back; what follows carries no id of its own."""
    whole = model.generate("Hello", raw=True, max_tokens=6, ignore_eos=True).result()
    assert whole.text
    held = list(model.generate("Hello", raw=True, max_tokens=6, ignore_eos=True, stop=whole.text[-1] + "\0"))
    assert "".join(token.text for token in held) == whole.text
    assert [token.id for token in held] == [*whole.ids, None]


def test_ids_are_integers(model):
    with pytest.raises(InvalidValueError, match="float64"):
        model.forward([1.5, 2.0])
