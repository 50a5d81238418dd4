"""A loaded model: tokens in, tokens, logits or embeddings out.

    model = load("smollm2")
    for piece in model.stream("What is a leaf?"):
        print(piece, end="")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import ContextOverflowError, InvalidValueError, UnsupportedError
from edgewise.core.values import dataclass
from edgewise.data.chat import ChatTemplate
from edgewise.data.tokenizer import Tokenizer
from edgewise.engine.generate import Generation, GenerationOptions, generate
from edgewise.engine.packing import PackedWeights
from edgewise.engine.tuning import Tuning
from edgewise.native import _core  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from edgewise.core.stats import Stats

__all__ = ["KV_FORMATS", "LanguageModel", "Memory", "read_share"]

Float32 = NDArray[np.float32]
KV_FORMATS = ("fp16", "bf16", "int8", "int4", "fp32")


@dataclass(frozen=True)
class Memory:
    """What `--memory` counts, in bytes. kv is the whole context; pages of it are taken when first used."""

    weights_bytes: int
    kv_bytes: int
    scratch_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.scratch_bytes


@dataclass(eq=False, repr=False)
class LanguageModel:
    """A decoder, an encoder or both. One sequence at a time per slot; not for use from two threads at once.

    Made by `edgewise.load`. checkpoint: the description of the model, without its tensors.
    sites: per layer, the names of the linears that read each of the inputs the session can capture.
    attention: the policy of layers that would see all positions; endless: a sequence takes constant memory.
    encoder, start: of an encoder-decoder, the session that reads texts, and the token that every answer starts from.
    """

    checkpoint: Checkpoint
    session: Any
    native: Any
    packed: PackedWeights
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    kind: str
    kv: str
    hidden: int
    vocab: int
    sites: tuple[Mapping[str, tuple[str, ...]], ...]
    encoder: Any = None
    start: int | None = None
    attention: str = "full"
    endless: bool = False
    tuning: Tuning = field(default_factory=Tuning)
    shapes: tuple[tuple[tuple[int, int], ...], ...] = ()  # per layer, of q, k, v, o, gate, up, down; (0, 0): none
    _cached_ids: list[int] = field(default_factory=list)  # what slot 0 holds
    _source_ids: list[int] | None = None  # the text that slot 0 attends to
    _current: object = None  # the Generation that slot 0 belongs to

    @property
    def layers(self) -> int:
        return len(self.sites)

    @property
    def context(self) -> int:
        """Positions that a sequence may have."""
        return int(self.session.context)

    @property
    def memory(self) -> Memory:
        sessions = [self.session] if self.encoder is None else [self.session, self.encoder]
        return Memory(self.packed.nbytes, sum(int(one.kv_nbytes) for one in sessions),
                      sum(int(one.scratch_nbytes) for one in sessions))

    @property
    def tier(self) -> str:
        """The instruction tier in use: reference, avx2, avx512, neon, ..."""
        return str(self.session.tier)

    @property
    def input_sparse(self) -> bool:
        """Whether tokens that are decoded read only some inputs of the layers."""
        return bool(np.asarray(self.session.inputs_read).size)

    def inputs_read(self) -> float | None:
        """Share of the layers' weights that a decoded token touched, low rank apart, since the session was made or
        `session.forget_counts()`; None where every input is read or nothing was decoded."""
        if not self.input_sparse or not self.session.tokens_decoded:
            return None
        return read_share(self.session, self.shapes)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text."""
        return self._tokenizer().encode(text, add_special=add_special)

    def prompt_ids(self, messages: str | Sequence[Mapping[str, Any]], *, raw: bool = False) -> list[int]:
        """Token ids of a conversation, or of one user message, through the chat template. raw: of the text itself."""
        tokenizer = self._tokenizer()
        if self.kind == "encoder-decoder" and not isinstance(messages, str):
            raise UnsupportedError(f"{self.checkpoint.source} is an encoder-decoder ({self.checkpoint.arch}): it reads "
                                   "one text, without a system message or turns; give a string")
        if raw or self.template is None:
            if not isinstance(messages, str):
                raise InvalidValueError("raw text is a string; given a conversation")
            return tokenizer.encode(messages)
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        return tokenizer.encode(self.template.render(turns), add_special=False)

    def generate(self, prompt: str | Sequence[int] | Sequence[Mapping[str, Any]],
                 options: GenerationOptions | None = None, *, raw: bool = False, **changes: Any) -> Generation:
        """Continue a prompt: a user message, a conversation, or token ids; an encoder-decoder answers it.

        Iterating the Generation yields Tokens as they come. changes: fields of GenerationOptions.
        raw: the text is continued as it stands, without the chat template.
        """
        self._need(("decoder", "encoder-decoder"), "generate")
        ids = self._ids(prompt, raw)
        return generate(self, ids, (options or GenerationOptions()).with_changes(**changes))

    def stream(self, prompt: str | Sequence[int] | Sequence[Mapping[str, Any]],
               options: GenerationOptions | None = None, *, raw: bool = False, **changes: Any) -> Iterator[str]:
        """The text of `generate`, piece by piece."""
        for token in self.generate(prompt, options, raw=raw, **changes):
            if token.text:
                yield token.text

    def _ids(self, prompt: Any, raw: bool) -> list[int]:
        if isinstance(prompt, str):
            return self.prompt_ids(prompt, raw=raw)
        items = list(prompt)
        if items and isinstance(items[0], Mapping):
            return self.prompt_ids(items, raw=raw)
        return [int(i) for i in items]

    def forward(self, ids: Sequence[int], decoder_ids: Sequence[int] | None = None) -> Float32:
        """Logits of every position, (tokens, vocab), of a sequence alone; an encoder's states, (tokens, hidden).

        Of an encoder-decoder: logits (decoder tokens, vocab) of decoder_ids, the first of which is `start`.
        """
        if self.kind == "encoder":
            return self.states(ids)
        if (decoder_ids is not None) != (self.encoder is not None):
            raise InvalidValueError(
                "an encoder-decoder takes ids of the text and decoder_ids, which begin with the model's start token; a "
                f"decoder takes ids alone; {self.checkpoint.source} is of kind {self.kind}")
        self.reset()
        if decoder_ids is not None:
            self.read_source(ids)
        parts = [np.asarray(self.session.logits(rows))
                 for rows in self.passes(ids if decoder_ids is None else decoder_ids)]
        self.reset()
        return np.concatenate(parts)

    def read_source(self, ids: Sequence[int] | NDArray[np.int32]) -> int:
        """Let slot 0 of an encoder-decoder attend to a text, from an empty answer on.

        Returns how many of its tokens need no reading, as it is the text that was read last.
        """
        self._need(("encoder-decoder",), "read_source")
        tokens = [int(i) for i in ids]
        if tokens == self._source_ids:
            return len(tokens)
        self._source_ids = None
        self._cached_ids.clear()
        with native_errors():
            self.session.set_source(0, self.states(tokens))
        self._source_ids = tokens
        return 0

    def passes(self, ids: Sequence[int] | NDArray[np.int32], *, slot: int = 0) -> Iterator[NDArray[np.int32]]:
        """Feed a sequence in passes; after each, the rows of that pass are yielded for reading off results."""
        return self._passes(self.session, ids, slot)

    def _passes(self, session: Any, ids: Sequence[int] | NDArray[np.int32], slot: int) -> Iterator[NDArray[np.int32]]:
        tokens = self._tokens(ids, session.length(slot))
        for start in range(0, len(tokens), session.batch):
            part = tokens[start:start + session.batch]
            with native_errors():
                session.forward(part, np.full(len(part), slot, np.int32))
            yield np.arange(len(part), dtype=np.int32)

    def _tokens(self, ids: Sequence[int] | NDArray[np.int32], held: int = 0) -> NDArray[np.int32]:
        """A sequence that fits behind the `held` tokens of a slot."""
        given = np.asarray(ids)
        if given.ndim != 1 or not len(given) or not np.issubdtype(given.dtype, np.integer):
            raise InvalidValueError(f"a sequence is at least one token id; given shape {given.shape} of {given.dtype}")
        if held + len(given) > self.context:
            raise ContextOverflowError(
                f"{held + len(given)} tokens do not fit the context of {self.context} positions; "
                "shorten the text or load the model with a longer context")
        return np.ascontiguousarray(given, np.int32)

    def embed(self, texts: str | Sequence[str], *, pooling: str | None = None, normalise: bool = True) -> Float32:
        """Sentence embeddings, (texts, hidden). pooling: mean, cls or last; by default the model's own, else mean."""
        how = dict(self.checkpoint.metadata.get("pooling") or {})
        pooling = pooling or str(how.get("mode", "mean"))
        if pooling not in ("mean", "cls", "last"):
            raise InvalidValueError(f"pooling is mean, cls or last; given {pooling!r}")
        rows = []
        for states in self.states_of([self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]):
            row = {"mean": lambda s=states: s.mean(axis=0), "cls": lambda s=states: s[0],
                   "last": lambda s=states: s[-1]}[pooling]()
            rows.append(row / max(float(np.linalg.norm(row)), 1e-12) if normalise else row)
        return np.asarray(rows, np.float32).reshape(-1, self.hidden)

    def states(self, ids: Sequence[int]) -> Float32:
        """Last hidden states after the final norm, (tokens, hidden); of an encoder-decoder, the encoder's."""
        session = self.session if self.encoder is None else self.encoder
        if self.encoder is None:
            self.reset()
        session.truncate(0, 0)
        parts = [np.asarray(session.normed(rows)) for rows in self._passes(session, ids, 0)]
        session.truncate(0, 0)
        return np.concatenate(parts)

    def states_of(self, sequences: Sequence[Sequence[int]]) -> list[Float32]:
        """`states` of each sequence. An encoder reads as many at once as it has slots, to the same numbers."""
        if self.kind != "encoder" or self.session.slots == 1:
            return [self.states(ids) for ids in sequences]
        texts, slots = [self._tokens(ids) for ids in sequences], int(self.session.slots)
        return [states for start in range(0, len(texts), slots)
                for states in self._states_together(texts[start:start + slots])]

    def _states_together(self, sequences: Sequence[NDArray[np.int32]]) -> list[Float32]:
        """Of at least one sequence and no more than slots, each within the context, in one pass."""
        slots = np.repeat(np.arange(len(sequences), dtype=np.int32), [len(tokens) for tokens in sequences])
        for slot in range(len(sequences)):
            self.reset(slot)
        with native_errors():
            self.session.forward(np.concatenate(sequences), slots)
        states = np.asarray(self.session.normed(np.arange(len(slots), dtype=np.int32)))
        for slot in range(len(sequences)):
            self.reset(slot)
        return np.split(states, np.cumsum([len(tokens) for tokens in sequences])[:-1])

    def perplexity(self, text: str | Sequence[int], *, windows: int | None = None, window: int = 512,
                   progress: Callable[[str, int, int], None] | None = None) -> float:
        """Perplexity of a text: see `edgewise.engine.score.perplexity`."""
        self._need(("decoder",), "perplexity")
        from edgewise.engine import score

        return score.perplexity(self, text, windows=windows, window=window, progress=progress)

    def calibrate(self, texts: Iterable[str | Sequence[int]], *, gram: bool = False,
                  progress: Callable[[str, int, int], None] | None = None) -> Stats:
        """Statistics of every linear's inputs over texts: see `edgewise.engine.calibrate.calibrate`."""
        self._need(("decoder", "encoder"), "calibrate")
        from edgewise.engine import calibrate as calibration

        with native_errors():
            return calibration.calibrate(self, texts, gram=gram, progress=progress)

    def reset(self, slot: int = 0) -> None:
        """Forget a sequence."""
        self.session.truncate(slot, 0)
        if slot == 0:
            self._cached_ids.clear()
            self._current = None

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UnsupportedError(f"{self.checkpoint.source}: this model carries no tokenizer; pass token ids")
        return self.tokenizer

    def _need(self, kinds: tuple[str, ...], what: str) -> None:
        if self.kind not in kinds:
            instead = {"encoder": "use embed()", "decoder": "use generate() or forward()",
                       "encoder-decoder": "use generate(), or forward(ids, decoder_ids) for logits"}[self.kind]
            def named(kind: str) -> str:
                return f"{'a' if kind == 'decoder' else 'an'} {kind}"

            raise UnsupportedError(f"{what} needs {named(kinds[0])}; {self.checkpoint.source} is {named(self.kind)} "
                                   f"({self.checkpoint.arch}); {instead}")

    def __repr__(self) -> str:
        positions = f"attention {self.attention}" if self.endless else f"context {self.context}"
        return (f"LanguageModel({self.checkpoint.arch}, {self.packed.nbytes / 1e6:.1f} MB, {positions}, "
                f"KV {self.kv}, {self.session.threads} threads, {self.tier})")


def read_share(session: Any, shapes: Sequence[Sequence[tuple[int, int]]]) -> float:
    """Share of weights that decoded tokens touched, of layers that read only some inputs. shapes: as a model's."""
    sizes, read = np.asarray(shapes, np.float64), np.asarray(session.inputs_read, np.float64)
    thin = read.any(axis=1)
    return float((read[thin] * sizes[thin, :, 0]).sum() / max(sizes[thin].prod(axis=2).sum(), 1.0))


@contextmanager
def native_errors() -> Iterator[None]:
    """Errors of the native core as errors of edgewise."""
    try:
        yield
    except _core.ContextOverflow as error:
        raise ContextOverflowError(f"{error}; shorten the text or load the model with a longer context") from error
    except ValueError as error:
        if isinstance(error, InvalidValueError):
            raise
        raise InvalidValueError(str(error)) from error
