"""Generation: sampling options, stop strings, and what to do when the context is full. Nothing is cut silently."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgewise.core.errors import ContextOverflowError, InvalidValueError, notice
from edgewise.core.values import dataclass
from edgewise.data.stops import StopMatcher
from edgewise.native import _core  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from edgewise.engine.model import LanguageModel

__all__ = ["Generation", "GenerationOptions", "Token", "generate"]

Overflow = Literal["error", "stop", "restart"]


@dataclass(frozen=True)
class GenerationOptions:
    """max_tokens: None goes on until the model stops. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off.

    Filters apply in the order repetition penalty, temperature, top-k, top-p, min-p. seed: the same seed gives the same
    tokens on one instruction tier. stop: strings that end the text and are not part of it. logprobs: how many
    alternatives each token reports. ignore_eos: go on past end-of-text tokens, for benchmarks.
    overflow: when the context is full, raise ContextOverflowError ("error"), end with a notice ("stop"), or keep the
    prompt's first `keep` tokens and the newest half of the rest, read them again, and go on with a notice ("restart").
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    penalty_window: int = 64
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int = 0
    ignore_eos: bool = False
    overflow: Overflow = "error"
    keep: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0, 100), ("top_p", 0, 1), ("min_p", 0, 1),
                                ("repetition_penalty", 1e-3, 1e3), ("logprobs", 0, 100), ("keep", 0, 1 << 30),
                                ("top_k", 0, 1 << 30), ("penalty_window", 0, 1 << 20), ("seed", 0, 2**64 - 1)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidValueError(f"{name} is between {low} and {high}; given {value}")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise InvalidValueError(f"max_tokens is at least 0; given {self.max_tokens}")
        if self.overflow not in ("error", "stop", "restart"):
            raise InvalidValueError(f"overflow is error, stop or restart; given {self.overflow!r}")
        if any(not s for s in self.stop):
            raise InvalidValueError("a stop string is not empty")

    def with_changes(self, **changes: Any) -> GenerationOptions:
        """A copy with other values; an unknown name is an InvalidValueError."""
        known = {f.name for f in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise InvalidValueError(
                f"unknown generation option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if isinstance(changes.get("stop"), str):
            changes["stop"] = (changes["stop"],)
        elif "stop" in changes:
            changes["stop"] = tuple(changes["stop"] or ())
        return replace(self, **changes)


@dataclass(frozen=True)
class Token:
    """One generated token. text: what became certain with it, possibly nothing. logprob: natural, of the model itself.

    id: None for text that was held back until the end, when no token comes with it.
    alternatives: (id, logprob) of the most likely tokens, when asked for.
    """

    id: int | None
    text: str
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


class Generation:
    """An iterator of Tokens. Afterwards: text, ids, finish_reason (stop, length, context), and timings.

    prompt_tokens; prefill_s: reading the prompt; decode_s: sampling and reading the tokens after it;
    reused_tokens: how much of the prompt the model still held.
    """

    def __init__(self, model: LanguageModel, ids: Sequence[int], options: GenerationOptions) -> None:
        self.options = options
        self.prompt_tokens = len(ids)
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self.reused_tokens = 0
        self._steps = self._run(model, list(ids))

    def __iter__(self) -> Iterator[Token]:
        return self._steps

    def __next__(self) -> Token:
        return next(self._steps)

    def result(self) -> Generation:
        """Run to the end."""
        for _ in self._steps:
            pass
        return self

    def _run(self, model: LanguageModel, prompt: list[int]) -> Iterator[Token]:
        options = self.options
        _check_prompt(model, prompt, options)
        if options.max_tokens == 0:
            self.finish_reason = "length"
            return
        started = time.perf_counter()
        if model.start is None:
            self.reused_tokens = _prefill(model, prompt)
        else:  # the text is read by the encoder, and the answer begins with a token of its own
            self.reused_tokens = model.read_source(prompt)
            prompt = [model.start]
            _prefill(model, prompt)
        self.prefill_s = time.perf_counter() - started
        sampler = _core.Sampler(
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p,
            repetition_penalty=options.repetition_penalty, penalty_window=options.penalty_window, seed=options.seed,
            logprobs=options.logprobs)
        sampler.observe(np.asarray(prompt, np.int32))
        tokenizer = model.tokenizer
        ends = frozenset() if options.ignore_eos or tokenizer is None else tokenizer.eos_ids
        stream = None if tokenizer is None else tokenizer.stream()
        matcher = StopMatcher(options.stop)
        model._current = self
        while True:
            if options.max_tokens is not None and len(self.ids) >= options.max_tokens:
                self.finish_reason = "length"
                break
            if model._current is not self:
                raise InvalidValueError("this generation cannot go on: the model has read another sequence since; "
                                        "run one to its end before the next")
            if self.ids and model.session.length(0) + 1 > model.context and not self._make_room(model):
                break
            started = time.perf_counter()
            choice = model.session.generate(0, sampler, 1, [])[0]
            self.decode_s += time.perf_counter() - started
            if choice.token in ends:
                self.finish_reason = "stop"
                break
            self.ids.append(choice.token)
            # One more than the sequence holds until the next step feeds it; _prefill looks at the sequence's length.
            model._cached_ids.append(choice.token)
            text, stopped = matcher.push(stream.push(choice.token)) if stream is not None else ("", False)
            self.text += text
            yield Token(choice.token, text, choice.logprob, tuple(choice.alternatives))
            if stopped:
                self.finish_reason = "stop"
                return
        if stream is not None:
            text = matcher.push(stream.finish())[0] + matcher.finish()
            if matcher.stopped is not None:
                self.finish_reason = "stop"
            self.text += text
            if text and self.ids:
                yield Token(None, text, 0.0)

    def _make_room(self, model: LanguageModel) -> bool:
        """What `overflow` says. True when generation goes on."""
        if self.options.overflow == "error":
            raise ContextOverflowError(
                f"the context of {model.context} positions is full after {len(self.ids)} new tokens; load the model "
                "with a longer context, or choose overflow='stop' or 'restart'")
        if self.options.overflow == "stop":
            notice("truncation", f"generation ended: the context of {model.context} positions is full", where="context")
            self.finish_reason = "context"
            return False
        keep = min(max(self.options.keep, 0 if model.start is None else 1), model.context // 2)
        newest = max((model.context - keep) // 2, 1)
        sequence = model._cached_ids
        kept = sequence[:keep] + sequence[-newest:]
        notice("truncation", f"the context was full: {len(sequence) - len(kept)} tokens after the first {keep} were "
               "dropped, and the rest was read again", where="context")
        model.session.truncate(0, 0)
        model.session.prefill(0, np.asarray(kept, np.int32))
        model._cached_ids[:] = kept
        return True


def generate(model: LanguageModel, ids: Sequence[int], options: GenerationOptions) -> Generation:
    """Continue `ids` on the model's first slot."""
    return Generation(model, ids, options)


def _check_prompt(model: LanguageModel, prompt: list[int], options: GenerationOptions) -> None:
    if not prompt:
        raise InvalidValueError("the prompt is empty; give at least one token")
    for token in prompt:
        if not 0 <= token < model.vocab:
            raise InvalidValueError(f"token {token} is outside the vocabulary of {model.vocab}")
    if len(prompt) > model.context:
        raise ContextOverflowError(
            f"the prompt has {len(prompt)} tokens, the context {model.context} positions; shorten it, or load the "
            "model with a longer context")
    # The last new token is never fed back, so it needs no position.
    held = len(prompt) if model.start is None else 1
    room = model.context + 1 - held
    if options.overflow == "error" and options.max_tokens is not None and options.max_tokens > room:
        raise ContextOverflowError(
            f"{held} tokens of prompt and {options.max_tokens} new ones do not fit the context of "
            f"{model.context} positions; ask for fewer, load the model with a longer context, or choose "
            "overflow='stop' or 'restart'")


def _prefill(model: LanguageModel, prompt: list[int]) -> int:
    """Read the prompt, but for the part that the sequence already holds. Returns how many tokens that spared."""
    held = model._cached_ids
    common = 0
    # The last token is always read: its logits are what generation starts from.
    for a, b in zip(held, prompt[:-1], strict=False):
        if a != b:
            break
        common += 1
    # In four bits, or behind a window, it may be able to go on from an earlier position only.
    common = int(model.session.resumable(0, min(common, int(model.session.length(0)))))
    model.session.truncate(0, common)
    model.session.prefill(0, np.asarray(prompt[common:], np.int32))
    model._cached_ids[:] = prompt
    return common
