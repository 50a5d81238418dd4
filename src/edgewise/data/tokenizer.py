"""Text to token ids and back: a thin, immutable face of the `tokenizers` library.

    tokenizer = tokenizer_of(checkpoint)
    ids = tokenizer.encode("Hello")
    stream = tokenizer.stream()
    text = "".join(stream.push(i) for i in ids) + stream.finish()

A tokenizer comes from a checkpoint's tokenizer.json, or is rebuilt from GGUF metadata (`gguf_tokenizer`).
Both are files of strangers: whatever is wrong with them is one FormatError, a panic of the native library included.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from types import MappingProxyType
from typing import Any

import tokenizers

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import FormatError, InvalidValueError, notice
from edgewise.core.values import dataclass
from edgewise.data.gguf_tokenizer import Built, build_from_gguf, native_call

__all__ = ["END_OF_TURN", "TextStream", "Tokenizer", "named_tokens", "tokenizer_from_json", "tokenizer_of"]

MAX_JSON_BYTES = 128 * 10**6
"""The largest tokenizer.json that is read; the largest in use (256k tokens) is a quarter of it."""

END_OF_TURN = frozenset({
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|end_of_turn|>",
    "<end_of_utterance>", "<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "<|return|>", "<|call|>", "[EOS]",
})
"""Special tokens that end a turn or a text in published models, whatever the generation settings say."""



@dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """Immutable. Ids are those of the model's embedding rows.

    eos_ids: tokens after which generation ends. bos_id: the token that starts a text, if the model has one.
    special_ids: control tokens, which `decode` leaves out by default.
    """

    backend: tokenizers.Tokenizer
    eos_ids: frozenset[int] = frozenset()
    bos_id: int | None = None
    source: str = ""
    special_ids: frozenset[int] = field(init=False)
    _byte_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        added = native_call(self.backend.get_added_tokens_decoder, where=self.source)
        object.__setattr__(self, "special_ids", frozenset(i for i, token in added.items() if token.special))
        object.__setattr__(self, "_byte_ids", self._byte_fallback_ids())

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text. add_special: with the tokens that the model expects around a text, such as BOS."""
        if not isinstance(text, str):
            raise InvalidValueError(f"encode expects a string; given {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidValueError(
                f"the text holds a lone surrogate at character {error.start}, which is no Unicode text; "
                "decode the input with errors='replace' first") from error
        encoding = native_call(lambda: self.backend.encode(text, add_special_tokens=add_special), where=self.source)
        return list(encoding.ids)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids. Bytes that are no UTF-8 become U+FFFD."""
        checked = [self._checked(i) for i in ids]
        text = native_call(lambda: self.backend.decode(checked, skip_special_tokens=skip_special), where=self.source)
        return str(text)

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """A decoder that takes one id at a time."""
        return TextStream(self, skip_special)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        found = self.backend.token_to_id(token)
        return None if found is None else int(found)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id, or None if no token has it."""
        token = self.backend.id_to_token(self._checked(token_id))
        return None if token is None else str(token)

    def to_json(self) -> bytes:
        """The bytes of an equal tokenizer.json."""
        return str(self.backend.to_str()).encode()

    def _checked(self, token_id: int) -> int:
        value = int(token_id)
        if not 0 <= value < 2**32:
            raise InvalidValueError(f"token ids are between 0 and {self.vocab_size - 1}; given {value}")
        return value

    def _byte_fallback_ids(self) -> frozenset[int]:
        # The decoder judges a run of byte tokens as a whole, so that a stream has to know which tokens these are.
        decoder = self.backend.decoder
        if decoder is None or b"ByteFallback" not in decoder.__getstate__():
            return frozenset()
        tokens = (f"<0x{byte:02X}>" for byte in range(256))
        return frozenset(i for i in map(self.backend.token_to_id, tokens) if i is not None)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens, {self.source})"


class TextStream:
    """Text as tokens arrive. The pieces of `push` and `finish` joined equal `decode` of all ids.

    A piece is held back while its last character may still change: an unfinished UTF-8 sequence, or a run of byte
    tokens, which the decoder replaces as a whole when any byte of it is invalid.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids: list[int] = []
        self._emitted = 0
        # ids[start:read] is text already emitted, decoded again as the context of what follows: decoders treat the
        # first token of a sequence differently, and in a difference of two texts with the same start that cancels.
        self._start = 0
        self._read = 0

    def push(self, token_id: int) -> str:
        """The text that is certain after this token; empty while a character is unfinished."""
        tokenizer = self._tokenizer
        self._ids.append(tokenizer._checked(token_id))
        # A token without text ends nothing either: bytes on both of its sides are one run.
        silent = (self._skip_special and token_id in tokenizer.special_ids) or tokenizer.id_to_token(token_id) is None
        if silent or token_id in tokenizer._byte_ids:
            return ""
        before = self._decode(self._ids[self._start:self._read])
        after = self._decode(self._ids[self._start:])
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._emit(after[len(before):])

    def finish(self) -> str:
        """What was held back. The stream is used up afterwards."""
        return self._emit(self._decode(self._ids)[self._emitted:])

    def _emit(self, piece: str) -> str:
        self._emitted += len(piece)
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint, from metadata["tokenizer"]: bytes of tokenizer.json, or GGUF's tokenizer keys.

    End-of-sequence ids are those of metadata["generation"], of the configuration, of the GGUF keys and of
    metadata["tokenizer_config"], and every special token in END_OF_TURN.
    """
    data = checkpoint.metadata.get("tokenizer")
    where = checkpoint.source or "tokenizer"
    generation = checkpoint.metadata.get("generation")
    settings: list[Mapping[str, Any]] = [s for s in (generation, checkpoint.config) if isinstance(s, Mapping)]
    if isinstance(data, (bytes, bytearray, str)):
        return tokenizer_from_json(data, settings=settings, names=named_tokens(checkpoint), source=where)
    if isinstance(data, Mapping):
        built = build_from_gguf(data, arch=checkpoint.arch, where=where)
        return _finish(built, settings, where)
    if data is None:
        raise FormatError("this model carries no tokenizer; a Hugging Face folder needs a tokenizer.json beside its "
                          "weights, a GGUF file the keys tokenizer.ggml.*", path=where)
    raise FormatError(f"the tokenizer should be bytes of tokenizer.json or a mapping; given {type(data).__name__}",
                      path=where)


def named_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """bos_token, eos_token, unk_token, ... as tokenizer_config.json spells them."""
    stored = checkpoint.metadata.get("tokenizer_config")
    names: dict[str, str] = {}
    for name, value in (stored.items() if isinstance(stored, Mapping) else ()):
        text = value.get("content") if isinstance(value, Mapping) else value
        if str(name).endswith("_token") and isinstance(text, str):
            names[str(name)] = text
    return names


def tokenizer_from_json(data: bytes | bytearray | str, *, settings: Iterable[Mapping[str, Any]] = (),
                        names: Mapping[str, str] = MappingProxyType({}),
                        source: str = "tokenizer.json") -> Tokenizer:
    """A tokenizer from the content of tokenizer.json.

    settings: mappings that may carry bos_token_id and eos_token_id, the first that has one counts for bos.
    names: bos_token and eos_token, as tokenizer_config.json spells them; they count before the settings.
    Truncation and padding stored in the file are switched off: cutting a text is the caller's choice.
    """
    if len(data) > MAX_JSON_BYTES:
        raise FormatError(f"tokenizer.json has {len(data)} bytes; at most {MAX_JSON_BYTES} are read", path=source)
    try:
        text = data if isinstance(data, str) else bytes(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("tokenizer.json is not UTF-8", path=source, offset=error.start) from error
    backend = native_call(lambda: tokenizers.Tokenizer.from_str(text), where=source, what="tokenizer.json")
    native_call(backend.no_truncation, where=source)
    native_call(backend.no_padding, where=source)
    if getattr(backend.model, "dropout", None):
        notice("ignored", "the BPE dropout stored in tokenizer.json is switched off: encoding is deterministic",
               where=source)
        backend.model.dropout = None
    begin, end = (backend.token_to_id(names[name]) if name in names else None for name in ("bos_token", "eos_token"))
    return _finish(Built(backend, frozenset() if end is None else frozenset({end}), begin), settings, source)


def _finish(built: Built, settings: Iterable[Mapping[str, Any]], where: str) -> Tokenizer:
    """Adds what the settings say about the tokens that start and end a text."""
    backend = built.backend
    size = native_call(lambda: backend.get_vocab_size(with_added_tokens=True), where=where)
    if size == 0:
        raise FormatError("the vocabulary is empty", path=where)
    ends = set(built.eos_ids)
    bos = built.bos_id
    for mapping in settings:
        ends.update(_ids_of(mapping, "eos_token_id", size, where))
        if bos is None:
            bos = next(iter(_ids_of(mapping, "bos_token_id", size, where)), None)
    added = native_call(backend.get_added_tokens_decoder, where=where)
    ends.update(i for i, token in added.items() if token.special and token.content in END_OF_TURN)
    return Tokenizer(backend, frozenset(ends), bos, where)


def _ids_of(mapping: Mapping[str, Any], key: str, size: int, where: str) -> list[int]:
    """The ids under a key that holds an int or a list of ints; what is no id of the vocabulary is reported."""
    value = mapping.get(key)
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    good = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < size]
    if len(good) < len(values):
        notice("ignored", f"{key} {json.dumps(value, default=str)[:80]} is outside the vocabulary of {size} tokens",
               where=where)
    return good
