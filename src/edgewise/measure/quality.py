"""How well a model predicts, and how far one model's predictions are from another's.

A model is a function: token ids (n,) -> logits (n, vocab), row i predicting token i + 1.
Perplexity: tokens of the whole text without BOS, windows side by side, positions 1 to window - 1 of each, exp of the
mean negative log-likelihood in nats. Quality: exp(-mean KL(reference || model)) over the same positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError, notice
from edgewise.core.report import Quantity

__all__ = ["WINDOW", "Divergence", "Forward", "Perplexity", "divergence", "kl_divergence", "log_softmax", "perplexity",
           "windows"]

Ids = NDArray[np.int64]
Float64 = NDArray[np.float64]
Forward = Callable[[Ids], NDArray[Any]]
WINDOW = 512
_Z95 = 1.959963984540054


def log_softmax(logits: NDArray[Any]) -> Float64:
    """logits (..., vocab) -> natural log-probabilities, float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    result: Float64 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def kl_divergence(reference: NDArray[Any], model: NDArray[Any]) -> Float64:
    """KL(reference || model) in nats of each position. Both are logits (..., vocab)."""
    if np.shape(reference) != np.shape(model):
        raise InvalidValueError(f"logits of one shape are compared; given {np.shape(reference)} and {np.shape(model)}")
    p, q = log_softmax(reference), log_softmax(model)
    with np.errstate(invalid="ignore"):
        terms = np.where(p == -np.inf, 0.0, np.exp(p) * (p - q))
    result: Float64 = terms.sum(axis=-1)
    return result


def windows(ids: NDArray[Any], window: int = WINDOW, limit: int | None = None) -> Iterator[Ids]:
    """The first `limit` full windows of the ids (n,). What does not fill a window is left out, and said."""
    ids = np.asarray(ids, np.int64)
    if ids.ndim != 1 or window < 2 or (limit is not None and limit < 1):
        raise InvalidValueError(f"ids are (n,), a window has at least 2 tokens, limit is at least 1; given shape "
                                f"{ids.shape}, window {window}, limit {limit}")
    full = len(ids) // window
    if full == 0:
        raise InvalidValueError(f"the text has {len(ids)} tokens, fewer than one window of {window}; give a longer "
                                "text or a shorter window")
    if limit is not None and limit > full:
        notice("clamp", f"{limit} windows of {window} tokens asked for; the text has {full}", where="quality")
    if len(ids) % window and (limit is None or limit > full):
        notice("info", f"the last {len(ids) % window} tokens do not fill a window of {window} and are left out",
               where="quality")
    for i in range(min(full, limit or full)):
        yield ids[i * window:(i + 1) * window]


@dataclass(frozen=True)
class Perplexity:
    """nll: mean negative log-likelihood in nats; error: its standard error over positions."""

    nll: float
    error: float
    positions: int
    windows: int

    @property
    def value(self) -> float:
        return math.exp(self.nll)

    def quantity(self, name: str = "perplexity") -> Quantity:
        """With the 95 % interval that the positions, taken as independent, would give."""
        return Quantity(name, self.value, "", (math.exp(self.nll - _Z95 * self.error),
                                               math.exp(self.nll + _Z95 * self.error)))


def perplexity(forward: Forward, ids: NDArray[Any], *, window: int = WINDOW, limit: int | None = None,
               progress: Callable[[int], None] | None = None) -> Perplexity:
    """Perplexity of a model on token ids (n,). limit: windows. progress is told the number of windows done."""
    losses: list[Float64] = []
    for part in windows(ids, window, limit):
        logits = _forward(forward, part)
        rows = log_softmax(logits[:-1])
        losses.append(-rows[np.arange(len(part) - 1), part[1:]])
        if progress is not None:
            progress(len(losses))
    every = np.concatenate(losses)
    return Perplexity(float(every.mean()), float(every.std() / math.sqrt(len(every))), len(every), len(losses))


@dataclass(frozen=True)
class Divergence:
    """kl: mean KL(reference || model) in nats; error: its standard error; agreement: share of equal first choices."""

    kl: float
    error: float
    agreement: float
    positions: int

    @property
    def quality(self) -> float:
        """exp(-kl): 1 is the same distribution everywhere."""
        return math.exp(-self.kl)

    def quantity(self, name: str = "quality") -> Quantity:
        """With the 95 % interval that the positions, taken as independent, would give."""
        low, high = self.kl - _Z95 * self.error, self.kl + _Z95 * self.error
        return Quantity(name, self.quality, "", (math.exp(-high), math.exp(-max(low, 0.0))))


def divergence(reference: Forward, model: Forward, ids: NDArray[Any], *, window: int = WINDOW,
               limit: int | None = None) -> Divergence:
    """How far `model` is from `reference` on the positions that `perplexity` uses."""
    parts: list[Float64] = []
    agreed = 0
    for part in windows(ids, window, limit):
        ours, theirs = _forward(model, part)[:-1], _forward(reference, part)[:-1]
        parts.append(kl_divergence(theirs, ours))
        agreed += int((ours.argmax(axis=-1) == theirs.argmax(axis=-1)).sum())
    every = np.concatenate(parts)
    return Divergence(float(every.mean()), float(every.std() / math.sqrt(len(every))), agreed / len(every), len(every))


def _forward(forward: Forward, ids: Ids) -> NDArray[Any]:
    logits = np.asarray(forward(ids))
    if logits.ndim != 2 or len(logits) != len(ids):
        raise InvalidValueError(
            f"a forward function returns logits (n, vocab); given {logits.shape} for {len(ids)} ids")
    if not np.isfinite(logits).all():
        row = int(np.argwhere(~np.isfinite(logits))[0][0])
        raise InvalidValueError(f"a forward function returns finite logits; position {row} has one that is not")
    return logits
