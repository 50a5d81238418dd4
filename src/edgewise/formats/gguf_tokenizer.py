"""tokenizer.json as the `tokenizer.ggml.*` keys of a GGUF file.

Three families: byte-level BPE (gpt2), BPE with byte fallback (llama) and WordPiece (bert). A tokenizer whose way of
cutting text has no GGUF name is refused: under a wrong name other tools would produce other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from edgewise.core.errors import FormatError, UnsupportedError

__all__ = ["keys_of_tokenizer"]

Json = Mapping[str, Any]
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_NEWER = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
_PRE = {
    (_GPT2,): "gpt-2",
    ("digits", _GPT2): "smollm",
    (_NEWER % r"\p{N}{1,3}",): "llama-bpe",
    (_NEWER % r"\p{N}",): "qwen2",
}
"""How text is cut before merging -> tokenizer.ggml.pre."""


def keys_of_tokenizer(raw: bytes, vocabulary: int, *, where: str = "tokenizer.json") -> dict[str, Any]:
    """raw: a tokenizer.json. vocabulary: rows of the embedding; ids without a token are filled and marked unused."""
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the tokenizer is not valid JSON: {error}", path=where) from None
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict):
        raise FormatError("the tokenizer has no 'model'", path=where)
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    build = _FAMILIES.get("bytes" if kind == "BPE" and model.get("byte_fallback") else kind)
    if build is None:
        raise UnsupportedError(f"{where}: a tokenizer of type {kind!r} is not written as GGUF; "
                               "BPE and WordPiece are. Write a Hugging Face folder instead")
    try:
        return {f"tokenizer.ggml.{key}": value for key, value in build(data, model, vocabulary, where).items()}
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise FormatError(f"the tokenizer is malformed: {error!r}", path=where) from error


def _tokens(data: Json, model: Json, vocabulary: int, where: str) -> tuple[list[str], list[int]]:
    """Tokens and their types by id."""
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [_UNUSED] * vocabulary
    added = {entry["id"]: entry for entry in data.get("added_tokens") or ()}
    for token, index in (*model["vocab"].items(), *((entry["content"], i) for i, entry in added.items())):
        if not 0 <= index < vocabulary:
            raise FormatError(f"token {token!r} has id {index}, but the embedding has {vocabulary} rows", path=where)
        tokens[index], types[index] = token, _NORMAL
    for index, entry in added.items():
        types[index] = _CONTROL if entry.get("special") else _USER
    return tokens, types


def _merges(model: Json) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _byte_level(data: Json, model: Json, vocabulary: int, where: str) -> dict[str, Any]:
    splits = tuple(_splits(data.get("pre_tokenizer")))
    if splits not in _PRE:
        raise UnsupportedError(f"{where}: its way of cutting text, {splits}, has no GGUF name that edgewise knows; "
                               f"{', '.join(_PRE.values())} have. Write a Hugging Face folder instead")
    tokens, types = _tokens(data, model, vocabulary, where)
    return {"model": "gpt2", "pre": _PRE[splits], "tokens": tokens, "token_type": types, "merges": _merges(model),
            **_ends(data, tokens), "add_space_prefix": False}


def _splits(pre: Json | None) -> Iterator[str]:
    """The cuts of a pre-tokenizer, one after the other."""
    if pre is None:
        return
    kind = pre["type"]
    if kind == "Sequence":
        for part in pre["pretokenizers"]:
            yield from _splits(part)
    elif kind == "Digits":
        yield "digits" if pre.get("individual_digits") else "runs of digits"
    elif kind == "Split":
        yield pre["pattern"].get("Regex") or str(pre["pattern"])
    elif kind == "ByteLevel":
        if pre.get("add_prefix_space"):
            yield "a space before the text"
        if pre.get("use_regex", True):
            yield _GPT2
    else:
        yield str(kind)


def _byte_fallback(data: Json, model: Json, vocabulary: int, where: str) -> dict[str, Any]:
    """SentencePiece's BPE: instead of merges a score per token, the earlier the merge the higher."""
    tokens, types = _tokens(data, model, vocabulary, where)
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = _BYTE
    unknown = model.get("unk_token")
    if unknown in model["vocab"]:
        types[model["vocab"][unknown]] = _UNKNOWN
    order = {merge.replace(" ", "", 1): rank for rank, merge in reversed(list(enumerate(_merges(model))))}
    last = float(len(order))
    scores = [-float(order.get(token, last)) if kind == _NORMAL else 0.0
              for token, kind in zip(tokens, types, strict=True)]
    return {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": types,
            **_ends(data, tokens), "add_space_prefix": _prepends_space(data)}


def _prepends_space(data: Json) -> bool:
    """Whether a text gets a space in front: by a normalizer, or by the pre-tokenizer of newer files."""
    normalizer = data.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return (any(step.get("type") == "Prepend" for step in steps)
            or (data.get("pre_tokenizer") or {}).get("prepend_scheme") in ("first", "always"))


def _word_piece(data: Json, model: Json, vocabulary: int, where: str) -> dict[str, Any]:
    """GGUF marks the pieces that begin a word with ▁, where tokenizer.json marks the others with ##."""
    plain, types = _tokens(data, model, vocabulary, where)
    tokens = [token if kind == _CONTROL or (token.startswith("[") and token.endswith("]"))
              else token.removeprefix("##") if token.startswith("##") else "▁" + token
              for token, kind in zip(plain, types, strict=True)]
    normalizer = data.get("normalizer") or {}
    lower = normalizer.get("lowercase", True)
    accents = normalizer.get("strip_accents")
    special = {"bos": "[CLS]", "seperator": "[SEP]", "unknown": model.get("unk_token", "[UNK]"), "padding": "[PAD]",
               "mask": "[MASK]"}
    ids = {token: i for i, token in enumerate(plain)}
    return {"model": "bert", "pre": "jina-v2-en", "tokens": tokens, "token_type": types, "token_type_count": 2,
            "normalizer.lowercase": bool(lower),
            "normalizer.strip_accents": bool(lower if accents is None else accents),
            **{f"{name}_token_id": ids[token] for name, token in special.items() if token in ids}}


def _ends(data: Json, tokens: list[str]) -> dict[str, Any]:
    """Whether a text begins with BOS and ends with EOS, and which tokens those are, by the post-processor."""
    steps = data.get("post_processor") or {}
    steps = steps.get("processors", [steps])
    found: dict[str, Any] = {"add_bos_token": False, "add_eos_token": False}
    for step in steps:
        single = step.get("single") if step.get("type") == "TemplateProcessing" else None
        if not single:
            continue
        for name, part in (("bos", single[0]), ("eos", single[-1])):
            if "SpecialToken" in part:
                found[f"add_{name}_token"] = True
                found[f"{name}_token_id"] = tokens.index(part["SpecialToken"]["id"])
    return found


_FAMILIES: dict[str, Callable[[Json, Json, int, str], dict[str, Any]]] = {
    "BPE": _byte_level, "bytes": _byte_fallback, "WordPiece": _word_piece}
