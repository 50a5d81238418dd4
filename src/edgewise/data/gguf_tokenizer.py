"""Rebuild a tokenizer from the `tokenizer.ggml.*` keys of a GGUF file.

Four families, by tokenizer.ggml.model:
    gpt2    byte-level BPE; tokenizer.ggml.pre names how text is cut into words first (PRE_TOKENIZERS)
    llama   SentencePiece BPE with byte fallback; the order of merges is recovered from the scores
            (gemma4: the same with the merges given)
    t5      SentencePiece unigram
    bert    WordPiece

The result encodes as the tokenizer.json that the model was published with. Where a file's own converter and that
tokenizer.json differ (NFC in Qwen2, for instance), tokenizer.json is right: the model was trained with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from edgewise.core.errors import FormatError, UnsupportedError, notice
from edgewise.core.values import dataclass

__all__ = ["PRE_TOKENIZERS", "Built", "PreTokenizer", "build_from_gguf", "native_call"]

MAX_TOKENS = 4_000_000
MAX_PIECE_CHARACTERS = 2_048
"""Longest token of a vocabulary whose merges are derived: the splits of a token are as many as its characters."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""tokenizer.ggml.token_type, as SentencePiece numbers them."""

T = TypeVar("T")


@dataclass(frozen=True)
class Built:
    """A tokenizer, and the ids that its file names."""

    backend: Tokenizer
    eos_ids: frozenset[int] = frozenset()
    bos_id: int | None = None


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level model cuts text into words before merging.

    splits: one after the other, each cuts out what it matches and leaves the rest; DIGITS cuts out single digits,
    anything else is a regular expression in Oniguruma's syntax.
    nfc: text is brought to Unicode's composed form first.
    ignore_merges: a word that is a token needs no merges.
    add_bos: whether BOS starts a text when the file does not say.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


DIGITS = "digits"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_QWEN35 = (_ENGLISH + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
_SEED = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_BAILING = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "%s" + _LOWER + "%s"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED % ("*", "+") + "|" + _CASED % ("+", "*") + r"|\p{N}" + _SYMBOLS
_GPT4O = (_CASED % ("*", "+") + _ENGLISH + "?|" + _CASED % ("+", "*") + _ENGLISH + r"?|\p{N}{1,3}" + _SYMBOLS)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3 = (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
              _ASCII_PUNCTUATION + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# The cased letters of the Unicode version that DeepSeek LLM was published with, as its tokenizer.json lists them.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cb2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+",
                 "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$", _CJK, r"\p{N}+")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")
_FALCON = (r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

_BY_RULE: tuple[tuple[PreTokenizer, str], ...] = (
    (PreTokenizer(_DEFAULT), "default"),
    (PreTokenizer((_GPT2,)), "gpt-2 phi-2 jais trillion granite-docling gigachat a.x-4.0 mellum exaone4 roberta-bpe"),
    (PreTokenizer((_GPT2,)), "jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code"),
    (PreTokenizer((_GPT2,), nfc=True), "olmo mpt modern-bert"),
    (PreTokenizer((DIGITS, _GPT2)), "smollm starcoder refact codeshell exaone minerva-7b mellum2"),
    (PreTokenizer((DIGITS, _GPT2), nfc=True), "command-r"),
    (PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
     "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"),
    (PreTokenizer((_LLAMA3,)), "dbrx smaug-bpe glm4 chatglm-bpe"),
    (PreTokenizer((_QWEN2,), nfc=True), "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez"),
    (PreTokenizer((_QWEN35,), nfc=True), "qwen35"),
    (PreTokenizer((_QWEN2,)), "stablelm2 hunyuan solar-open grok-2"),
    (PreTokenizer((_SEED,)), "seed-coder"),
    (PreTokenizer((_BAILING,)), "bailingmoe bailingmoe2 llada-moe"),
    (PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True), "tekken"),
    (PreTokenizer((_GPT4O,)), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (PreTokenizer((_BLOOM,)), "bloom poro-chat gpt3-finnish"),
    (PreTokenizer((_BLOOM, DIGITS)), "viking"),
    (PreTokenizer(_FALCON), "falcon"),
    (PreTokenizer(_DEEPSEEK_LLM), "deepseek-llm"),
    (PreTokenizer(_DEEPSEEK_CODER), "deepseek-coder"),
    (PreTokenizer(_DEEPSEEK3), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: rule for rule, names in _BY_RULE for name in names.split()}
"""tokenizer.ggml.pre -> how text is cut."""


def native_call(call: Callable[[], T], *, where: str, what: str = "tokenizer") -> T:
    """What `call` returns. An error or a panic of the tokenizers library becomes a FormatError."""
    try:
        return call()
    except BaseException as error:
        # A Rust panic arrives as pyo3_runtime.PanicException, which is not an Exception and cannot be imported.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            message = " ".join(str(error).split())[:300]
            raise FormatError(f"the {what} cannot be used: {message or type(error).__name__}", path=where) from None
        raise


def build_from_gguf(metadata: Mapping[str, Any], *, arch: str = "", where: str = "GGUF") -> Built:
    """The tokenizer that `tokenizer.ggml.*` keys describe.

    metadata: the keys as the file has them, with or without the prefix "tokenizer.ggml.".
    arch: model type; Gemma's merges follow the order of its tokens, not their scores.
    Raises FormatError for missing or contradictory keys, UnsupportedError for a model outside the four families.
    """
    keys = _Keys({str(k).removeprefix("tokenizer.ggml."): v for k, v in metadata.items()}, where)
    model = keys.text("model")
    builder = _BUILDERS.get(model)
    if builder is None:
        raise UnsupportedError(f"{where}: tokenizer.ggml.model is {model!r}; edgewise rebuilds {', '.join(_BUILDERS)}; "
                               "convert the model to a Hugging Face folder with a tokenizer.json instead")
    vocab = _Vocabulary.read(keys)
    return builder(keys, vocab, arch)


@dataclass(frozen=True)
class _Keys:
    """Typed access to metadata of a file that is not trusted."""

    values: Mapping[str, Any]
    where: str

    def text(self, name: str, default: str | None = None) -> str:
        value = self.values.get(name, default)
        if not isinstance(value, str):
            self.fail(name, "a string", value)
        return str(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, (bool, int)):
            self.fail(name, "a boolean", value)
        return bool(value)

    def token(self, name: str, count: int, default: int | None = None) -> int | None:
        """An optional token id below count. One outside is reported."""
        value = self.values.get(name)
        if value is None:
            return default if default is not None and default < count else None
        if not hasattr(value, "__index__"):
            self.fail(name, "a token id", value)
        if int(value) in (-1, 2**32 - 1):  # both mean: none
            return None
        if not 0 <= int(value) < count:
            notice("ignored", f"tokenizer.ggml.{name} is {int(value)}, outside the vocabulary of {count} tokens",
                   where=self.where)
            return None
        return int(value)

    def items(self, name: str, kind: type, count: int | None = None) -> Sequence[Any] | None:
        """An optional array, of `count` values when given. kind: str, or a number type."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__"):
            self.fail(name, "an array", value)
        items = value.tolist() if hasattr(value, "tolist") else list(value)
        allowed = (kind,) if kind is str else (int, float)
        if not all(issubclass(found, allowed) for found in set(map(type, items))):
            self.fail(name, f"an array of {kind.__name__}", next(i for i in items if not isinstance(i, allowed)))
        if count is not None and len(items) != count:
            raise FormatError(f"tokenizer.ggml.{name} has {len(items)} entries for {count} tokens", path=self.where)
        return items

    def fail(self, name: str, expected: str, value: Any) -> None:
        given = "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise FormatError(f"tokenizer.ggml.{name} should be {expected}; given {given}", path=self.where)


@dataclass(frozen=True)
class _Vocabulary:
    """tokens: by id, unique. types: by id. scores: by id, or None."""

    tokens: list[str]
    types: Sequence[int]
    scores: Sequence[float] | None
    ids: dict[str, int] = field(repr=False)

    @classmethod
    def read(cls, keys: _Keys) -> _Vocabulary:
        tokens = keys.items("tokens", str)
        if not tokens:
            raise FormatError("tokenizer.ggml.tokens is missing or empty", path=keys.where)
        if len(tokens) > MAX_TOKENS:
            raise FormatError(f"tokenizer.ggml.tokens has {len(tokens)} entries; at most {MAX_TOKENS}", path=keys.where)
        named = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        types = keys.items("token_type", int, len(named)) or [NORMAL] * len(named)
        scores = keys.items("scores", float, len(named))
        if scores is not None and not all(map(math.isfinite, scores)):
            raise FormatError("tokenizer.ggml.scores holds a value that is not finite", path=keys.where)
        return cls(named, types, scores, cls.index(named, keys.where))

    @staticmethod
    def index(tokens: Sequence[str], where: str) -> dict[str, int]:
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(ids) != len(tokens):
            twice = next(i for i, token in enumerate(tokens) if ids[token] != i)
            raise FormatError(f"tokenizer.ggml.tokens holds {tokens[twice]!r} twice, as {twice} and "
                              f"{ids[tokens[twice]]}", path=where)
        return ids

    def of_type(self, *types: int) -> list[str]:
        return [self.tokens[i] for i in np.flatnonzero(np.isin(self.types, types)).tolist()]

    def spelled(self, tokens: list[str], where: str) -> _Vocabulary:
        """The same vocabulary in another spelling."""
        return _Vocabulary(tokens, self.types, self.scores, self.index(tokens, where))


def _byte_level(keys: _Keys, vocab: _Vocabulary, arch: str) -> Built:
    name = keys.text("pre", "")
    rule = PRE_TOKENIZERS.get(name)
    if rule is None:
        notice("fallback", f"pre-tokenizer {name!r} is not known; text is cut by the default rule, and some token ids "
                           "may differ from the model's own tokenizer", where=keys.where)
        rule = PRE_TOKENIZERS["default"]
    backend = _model(keys, lambda: models.BPE(
        vocab=vocab.ids, merges=_given_merges(keys), ignore_merges=rule.ignore_merges))
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [_split(pattern) for pattern in rule.splits]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return _finish(keys, vocab, backend, add_bos=rule.add_bos)


def _split(pattern: str) -> Any:
    if pattern == DIGITS:
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _sentencepiece(keys: _Keys, vocab: _Vocabulary, arch: str) -> Built:
    """SentencePiece's BPE. A space is ▁, a text starts with one, and so does what follows a special token."""
    gemma = arch.startswith("gemma") or keys.text("model") == "gemma4"
    if gemma:  # its files spell runs of spaces as spaces, where the model's tokens are runs of ▁
        vocab = vocab.spelled(["▁" * len(t) if t.strip(" ") == "" else t for t in vocab.tokens], keys.where)
    merges = _given_merges(keys) if keys.values.get("merges") is not None else _derived_merges(keys, vocab, gemma)
    unknown = keys.token("unknown_token_id", len(vocab.tokens), default=0)
    backend = _model(keys, lambda: models.BPE(
        vocab=vocab.ids, merges=merges, unk_token=None if unknown is None else vocab.tokens[unknown],
        fuse_unk=True, byte_fallback=True))
    prefix = keys.flag("add_space_prefix", not gemma)
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    if gemma:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(content=" ", left=1)] if prefix else []))
    return _finish(keys, vocab, backend, add_bos=True, bos=1, eos=2)


def _derived_merges(keys: _Keys, vocab: _Vocabulary, by_position: bool) -> list[tuple[str, str]]:
    """The merges that a vocabulary implies: every token from every two tokens that make it, best score first.

    SentencePiece joins the neighbours whose joint token scores highest; a rank per pair says the same. Pairs of one
    score, such as the ways to make one token, are ordered as in transformers' converter: the longer left part first.
    """
    if by_position:
        scores: Sequence[float] = range(0, -len(vocab.tokens), -1)
    elif vocab.scores is not None:
        scores = vocab.scores
    else:
        raise FormatError("tokenizer.ggml.scores is missing; a SentencePiece vocabulary needs them", path=keys.where)
    longest = max(map(len, vocab.tokens))
    if longest > MAX_PIECE_CHARACTERS:
        raise FormatError(f"a token of {longest} characters; at most {MAX_PIECE_CHARACTERS}", path=keys.where)
    ids, tokens = vocab.ids, vocab.tokens
    merges: list[tuple[str, str]] = []
    best_first = sorted(range(len(tokens)), key=scores.__getitem__, reverse=True)
    for _, group in itertools.groupby(best_first, key=scores.__getitem__):
        pairs = [(token[:cut], token[cut:]) for token in (tokens[i] for i in group)
                 for cut in range(len(token) - 1, 0, -1) if token[:cut] in ids and token[cut:] in ids]
        pairs.sort(key=lambda pair: (-len(pair[0]), -len(pair[1])))
        merges += pairs
    return merges


def _given_merges(keys: _Keys) -> list[tuple[str, str]]:
    merges = keys.items("merges", str)
    if merges is None:
        raise FormatError("tokenizer.ggml.merges is missing; a byte-pair vocabulary needs them", path=keys.where)
    # Without a loop in Python, which for fifty thousand merges is a twentieth of a start.
    pairs: list[tuple[str, str]] = list(map(itemgetter(0, 2), map(str.partition, merges, itertools.repeat(" "))))
    if all(map(all, pairs)):
        return pairs
    # The left part may itself start with a space.
    pairs = [(merge[:cut], merge[cut + 1:]) for merge in merges if (cut := merge.find(" ", 1)) > 0]
    if len(pairs) != len(merges):
        wrong = next(merge for merge in merges if merge.find(" ", 1) < 0)
        raise FormatError(f"tokenizer.ggml.merges should hold pairs with a space between; given {wrong[:40]!r}",
                          path=keys.where)
    return pairs


def _unigram(keys: _Keys, vocab: _Vocabulary, arch: str) -> Built:
    if vocab.scores is None:
        raise FormatError("tokenizer.ggml.scores is missing; a unigram vocabulary needs them", path=keys.where)
    scores = vocab.scores
    unknown = keys.token("unknown_token_id", len(vocab.tokens), default=2)
    byte_fallback = BYTE in vocab.types
    backend = _model(keys, lambda: models.Unigram(
        [(token, float(score)) for token, score in zip(vocab.tokens, scores, strict=True)], unk_id=unknown,
        byte_fallback=byte_fallback))
    charsmap = keys.items("precompiled_charsmap", int)
    steps: list[Any] = []
    if charsmap:
        raw = bytes(int(value) & 0xFF for value in charsmap)  # the file may store them signed
        steps.append(native_call(lambda: normalizers.Precompiled(raw), where=keys.where,
                                 what="tokenizer's character map"))
    if keys.flag("remove_extra_whitespaces", True):
        steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    scheme = "always" if keys.flag("add_space_prefix", True) else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    metaspace = decoders.Metaspace(replacement="▁", prepend_scheme=scheme)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace]) if byte_fallback else metaspace
    return _finish(keys, vocab, backend, add_eos=True, eos=1)


def _word_piece(keys: _Keys, vocab: _Vocabulary, arch: str) -> Built:
    """BERT. A GGUF marks the pieces that start a word with ▁; the model's own vocabulary marks the others with ##."""
    if any(token.startswith("▁") for token in vocab.tokens):
        kept = {token for token, kind in zip(vocab.tokens, vocab.types, strict=True) if kind in (CONTROL, UNKNOWN)}
        vocab = vocab.spelled([
            token[1:] if token.startswith("▁") and len(token) > 1
            else token if token in kept or (token.startswith("[") and token.endswith("]") and len(token) > 2)
            else "##" + token for token in vocab.tokens], keys.where)
    count = len(vocab.tokens)
    unknown = keys.token("unknown_token_id", count, default=vocab.ids.get("[UNK]"))
    if unknown is None:
        raise FormatError("tokenizer.ggml.unknown_token_id is missing, and there is no token [UNK]", path=keys.where)
    backend = _model(keys, lambda: models.WordPiece(vocab.ids, unk_token=vocab.tokens[unknown]))
    lower = keys.flag("normalizer.lowercase", True)
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lower, strip_accents=keys.flag("normalizer.strip_accents", lower))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    first = keys.token("bos_token_id", count, default=keys.token("cls_token_id", count, default=vocab.ids.get("[CLS]")))
    # The key is misspelled in the format itself.
    last = keys.token("seperator_token_id", count, default=keys.token("separator_token_id", count,
                                                                      default=vocab.ids.get("[SEP]")))
    _add_special(vocab, backend, keys.where, extra=[t for t in ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
                                                     if t in vocab.ids])
    if first is not None and last is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[f"{vocab.tokens[first]}:0", "$A:0", f"{vocab.tokens[last]}:0"],
            pair=[f"{vocab.tokens[first]}:0", "$A:0", f"{vocab.tokens[last]}:0", "$B:1", f"{vocab.tokens[last]}:1"],
            special_tokens=[(vocab.tokens[first], first), (vocab.tokens[last], last)])
    return Built(backend, frozenset(), first)


_BUILDERS: Mapping[str, Callable[[_Keys, _Vocabulary, str], Built]] = {
    "gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _sentencepiece, "t5": _unigram, "bert": _word_piece,
}


def _model(keys: _Keys, make: Callable[[], Any]) -> Tokenizer:
    return Tokenizer(native_call(make, where=keys.where, what="vocabulary and merges of the tokenizer"))


def _add_special(vocab: _Vocabulary, backend: Tokenizer, where: str, extra: Sequence[str] = ()) -> None:
    """Control tokens are matched in a text and left out of decoded text; user-defined ones are only matched."""
    special = dict.fromkeys([*vocab.of_type(CONTROL, UNKNOWN), *extra])
    plain = vocab.of_type(USER_DEFINED)
    native_call(lambda: backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]), where=where)
    native_call(lambda: backend.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in plain]), where=where)


def _finish(keys: _Keys, vocab: _Vocabulary, backend: Tokenizer, *, add_bos: bool = False, add_eos: bool = False,
            bos: int | None = None, eos: int | None = None) -> Built:
    """Adds special tokens, and BOS and EOS around a text where the file or the family wants them."""
    count = len(vocab.tokens)
    bos_id = keys.token("bos_token_id", count, default=bos)
    eos_id = keys.token("eos_token_id", count, default=eos)
    _add_special(vocab, backend, keys.where, extra=[vocab.tokens[i] for i in (bos_id, eos_id) if i is not None])
    around = ["$A"]
    if keys.flag("add_bos_token", add_bos) and bos_id is not None:
        around.insert(0, vocab.tokens[bos_id])
    if keys.flag("add_eos_token", add_eos) and eos_id is not None:
        around.append(vocab.tokens[eos_id])
    if len(around) > 1:
        ids = {token: vocab.ids[token] for token in around if token != "$A"}
        backend.post_processor = processors.TemplateProcessing(
            single=[f"{piece}:0" for piece in around],
            pair=[f"{piece}:0" for piece in around] + [f"{'$B' if p == '$A' else p}:1" for p in around],
            special_tokens=list(ids.items()))
    ends = {eos_id, keys.token("eot_token_id", count), keys.token("eom_token_id", count)}
    return Built(backend, frozenset(i for i in ends if i is not None), bos_id)
