"""The face of the tokenizers library: ids, text, streams, ends of text, and files that are wrong."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import FormatError, InvalidValueError, collect_notices
from edgewise.data.gguf_tokenizer import native_call
from edgewise.data.tokenizer import Tokenizer, tokenizer_from_json, tokenizer_of

TEXT = st.text(max_size=40) | st.text(st.sampled_from("ab <|im_end|>\n\t▁é😀👩‍👧0\u0301"), max_size=30)


def byte_level() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "he", "ll", "hell", "Ġw"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|im_end|>"])
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2: a few pieces, and a token for every byte."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "é", "ab"]
    vocab = {t: i for i, t in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", fuse_unk=True,
                                                byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    tokens = ["[UNK]", "[CLS]", "[SEP]", "a", "b", "##a", "##b", "ab", "'", ".", ",", "0", "##0", "é"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("a", -2.1), ("b", -2.2), ("▁a", -1.0), ("▁ab", -0.5), ("é", -3.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "word_piece": word_piece, "metaspace": metaspace}
MADE = {name: Tokenizer(make()) for name, make in KINDS.items()}


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> list[str]:
    stream = tokenizer.stream(skip_special=skip_special)
    return [*(stream.push(i) for i in ids), stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT, skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_stream_of_a_text_equals_the_whole(kind, text, skip):
    tokenizer = MADE[kind]
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special=skip)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_stream_of_any_ids_equals_the_whole(kind, data, skip):
    """Ids as a model may produce them: half characters, invalid bytes, special tokens in the middle of a character."""
    tokenizer = MADE[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=24))
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special=skip)


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_byte_level_decodes_what_it_encoded(text):
    tokenizer = MADE["byte_level"]
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_a_stream_never_shows_half_a_character():
    tokenizer = MADE["byte_level"]
    ids = tokenizer.encode("a😀b")
    assert len(ids) == 6
    assert streamed(tokenizer, ids, True) == ["a", "", "", "", "😀", "b", ""]
    assert streamed(tokenizer, ids[:3], True) == ["a", "", "", "\ufffd"]


def test_a_stream_of_bytes_waits_for_the_end_of_their_run():
    # One invalid byte turns the valid ones before it into replacement characters, so none may be shown early.
    tokenizer = MADE["byte_fallback"]
    letter, bad, a = (tokenizer.token_to_id(t) for t in ("<0x41>", "<0xFF>", "a"))
    assert streamed(tokenizer, [letter, a], True) == ["", "Aa", ""]
    assert streamed(tokenizer, [letter, bad, a], True) == ["", "", "\ufffd\ufffda", ""]
    # A special token that is left out, and an id that no token has, are not the end of the run.
    for nothing in (tokenizer.token_to_id("</s>"), tokenizer.vocab_size):
        assert streamed(tokenizer, [letter, nothing, bad], True) == ["", "", "", "\ufffd\ufffd"]


def test_ids_tokens_and_sizes():
    tokenizer = MADE["byte_level"]
    assert tokenizer.vocab_size == 256 + 4 + 3
    assert tokenizer.id_to_token(tokenizer.token_to_id("hell")) == "hell"
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.id_to_token(10**6) is None
    assert tokenizer.special_ids == {tokenizer.token_to_id("<|begin|>"), tokenizer.token_to_id("<|im_end|>")}
    assert tokenizer.decode([tokenizer.token_to_id("<|im_end|>")]) == ""
    assert tokenizer.decode([tokenizer.token_to_id("<|im_end|>")], skip_special=False) == "<|im_end|>"
    with pytest.raises(AttributeError):
        tokenizer.source = "elsewhere"
    assert tokenizer_from_json(tokenizer.to_json()).encode("hello w") == tokenizer.encode("hello w")


def test_special_tokens_are_added_only_when_asked():
    tokenizer = MADE["word_piece"]
    assert tokenizer.encode("ab") == [1, 7, 2]
    assert tokenizer.encode("ab", add_special=False) == [7]


@pytest.mark.parametrize("bad", ["\ud800", "a\udfffb"])
def test_text_that_is_no_unicode_is_refused(bad):
    with pytest.raises(InvalidValueError, match="surrogate"):
        MADE["byte_level"].encode(bad)


@pytest.mark.parametrize("bad", [b"bytes", None, 7, ["a"]])
def test_only_strings_are_encoded(bad):
    with pytest.raises(InvalidValueError, match="expects a string"):
        MADE["byte_level"].encode(bad)


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_ids_out_of_range_are_refused(bad):
    with pytest.raises(InvalidValueError, match="token ids"):
        MADE["byte_level"].decode([bad])
    with pytest.raises(InvalidValueError, match="token ids"):
        MADE["byte_level"].stream().push(bad)


def checkpoint(tokenizer, config=None, **metadata) -> Checkpoint:
    return Checkpoint("llama", config or {}, {}, {"tokenizer": tokenizer, **metadata}, source="some-model")


def test_ends_come_from_settings_and_from_special_tokens():
    data = byte_level().to_str().encode()
    end = MADE["byte_level"].token_to_id("<|im_end|>")
    assert tokenizer_of(checkpoint(data)).eos_ids == {end}
    assert tokenizer_of(checkpoint(data, generation={"eos_token_id": 5})).eos_ids == {5, end}
    assert tokenizer_of(checkpoint(data, generation={"eos_token_id": [5, 6]})).eos_ids == {5, 6, end}
    found = tokenizer_of(checkpoint(data, {"eos_token_id": 7, "bos_token_id": 3}, generation={"bos_token_id": 4}))
    assert (found.eos_ids, found.bos_id) == ({7, end}, 4)
    named = {"eos_token": {"content": "<|begin|>"}, "bos_token": "h"}
    found = tokenizer_of(checkpoint(data, {"bos_token_id": 3}, tokenizer_config=named))
    assert (found.eos_ids, found.bos_id) == ({found.token_to_id("<|begin|>"), end}, found.token_to_id("h"))
    # An ordinary token spelled like the end of a turn ends nothing.
    plain = byte_level()
    plain.add_tokens(["<|eot_id|>"])
    assert tokenizer_of(checkpoint(plain.to_str().encode())).eos_ids == {end}


@pytest.mark.parametrize("value", [10**6, -1, "2", 1.5, True, [0, None]])
def test_ends_outside_the_vocabulary_are_reported(value):
    with collect_notices() as notices:
        tokenizer_of(checkpoint(byte_level().to_str().encode(), generation={"eos_token_id": value}))
    assert [n.kind for n in notices] == ["ignored"]
    assert "eos_token_id" in notices[0].message


def test_a_length_limit_in_the_file_cuts_nothing():
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=12)
    assert len(tokenizer_from_json(tokenizer.to_str()).encode("abcdefgh")) == 8


def test_dropout_in_the_file_is_switched_off_and_reported():
    data = json.loads(byte_level().to_str())
    data["model"]["dropout"] = 0.9
    with collect_notices() as notices:
        tokenizer = tokenizer_from_json(json.dumps(data))
    assert [n.kind for n in notices] == ["ignored"]
    expected = MADE["byte_level"].encode("hello hello")
    assert [tokenizer.encode("hello hello") for _ in range(20)] == [expected] * 20


GOOD = json.loads(byte_level().to_str())


def changed(**model) -> bytes:
    return json.dumps({**GOOD, "model": {**GOOD["model"], **model}}).encode()


@pytest.mark.parametrize("data", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b"[" * 200_000, b'{"a":' * 100_000,
    b'{"model": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    json.dumps({**GOOD, "model": 5}).encode(),
    json.dumps({**GOOD, "added_tokens": {"id": 1}}).encode(),
    json.dumps({**GOOD, "added_tokens": [{"id": -1, "content": "x"}]}).encode(),
    json.dumps({**GOOD, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated",
                                          "invert": False}}).encode(),
    json.dumps({**GOOD, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}).encode(),
    changed(vocab=[1, 2]), changed(vocab={"a": -1}), changed(merges=[["q", "q"]]), changed(merges=[7]),
    changed(type="NoSuchModel"),
    json.dumps({**GOOD, "model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}, "added_tokens": []}).encode(),
    json.dumps({**GOOD, "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}).encode(),
], ids=lambda data: data[:24].decode("latin-1") + str(len(data)))
def test_a_wrong_file_is_one_error(data):
    with pytest.raises(FormatError, match="some-model"):
        tokenizer_of(checkpoint(data)).encode("hello")


def test_an_oversized_file_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr("edgewise.data.tokenizer.MAX_JSON_BYTES", 100)
    with pytest.raises(FormatError, match="at most 100"):
        tokenizer_from_json(b" " * 101)


@pytest.mark.parametrize(("value", "message"), [(None, "carries no tokenizer"), (7, "given int"), ([], "given list")])
def test_a_missing_or_foreign_tokenizer_is_one_error(value, message):
    with pytest.raises(FormatError, match=message):
        tokenizer_of(checkpoint(value))


def test_a_panic_of_the_library_is_an_error_and_an_interrupt_is_not():
    class PanicException(BaseException):
        """As pyo3 raises it."""

    def panic():
        raise PanicException("index out of bounds")

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(FormatError, match="index out of bounds"):
        native_call(panic, where="some-model")
    with pytest.raises(KeyboardInterrupt):
        native_call(interrupt, where="some-model")


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_file_never_crashes(data):
    raw = bytearray(json.dumps(GOOD).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place:place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    with collect_notices():
        try:
            tokenizer = tokenizer_from_json(bytes(raw))
            tokenizer.decode(tokenizer.encode("hello <|im_end|> wörld"))
        except FormatError:
            pass


def test_the_strings_compared_are_a_thousand_different_ones(unicode_texts):
    assert len(set(unicode_texts)) == len(unicode_texts) == 1000


def test_equal_texts_give_equal_ids_after_training(corpus, unicode_texts):
    """A tokenizer.json, read here and by the library itself, on 1,000 strings."""
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.train_from_iterator(corpus[:1500], trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    ours = tokenizer_from_json(raw.to_str())
    assert [ours.encode(t) for t in unicode_texts] == [raw.encode(t).ids for t in unicode_texts]


@pytest.mark.slow
def test_minilm_equals_transformers(unicode_texts):
    from transformers import AutoTokenizer

    from edgewise.formats import resolve
    from edgewise.formats.folder import read_folder

    folder = resolve("minilm")
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = tokenizer_of(read_folder(folder))
    assert [ours.encode(t) for t in unicode_texts] == [theirs.encode(t) for t in unicode_texts]
    assert ours.vocab_size == 30522
    long = "word " * 600
    assert len(ours.encode(long)) == 602
