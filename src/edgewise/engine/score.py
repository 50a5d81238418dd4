"""Quality measures that need the model: log-probabilities and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgewise.measure.quality import WINDOW
from edgewise.measure.quality import windows as cut_windows

if TYPE_CHECKING:
    from edgewise.engine.model import LanguageModel

__all__ = ["log_probs", "perplexity", "windows_of"]

def windows_of(model: LanguageModel, text: str | Sequence[int], *, window: int = WINDOW,
               windows: int | None = None) -> NDArray[np.int32]:
    """Token ids of a text without BOS, cut as `measure.quality.windows` cuts them, (windows, window)."""
    ids = np.asarray(model.encode(text, add_special=False) if isinstance(text, str) else text, np.int32)
    return np.stack([np.asarray(part, np.int32) for part in cut_windows(ids, window, windows)])


def log_probs(model: LanguageModel, ids: Sequence[int] | NDArray[np.int32]) -> NDArray[np.float64]:
    """Natural log-probability of ids[1:], each given all before it, (len(ids) - 1,)."""
    tokens = np.ascontiguousarray(ids, np.int32)
    model.reset()
    parts, start = [], 0
    for rows in model.passes(tokens):
        rows = rows[:len(tokens) - 1 - start]
        if len(rows):
            parts.append(np.asarray(model.session.log_probs(rows, tokens[start + 1:start + 1 + len(rows)])))
        start += len(rows)
    model.reset()
    return np.concatenate(parts) if parts else np.zeros(0)


def perplexity(model: LanguageModel, text: str | Sequence[int], *, windows: int | None = None, window: int = WINDOW,
               progress: Callable[[str, int, int], None] | None = None) -> float:
    """exp of the mean negative log-probability: the whole text without BOS, windows of 512 tokens side by side,
    positions 1..511 of each, natural mean. windows: only the first so many."""
    cut = windows_of(model, text, window=window, windows=windows)
    total = 0.0
    for done, ids in enumerate(cut):
        total += float(log_probs(model, ids).sum())
        if progress is not None:
            progress("perplexity", done + 1, len(cut))
    return math.exp(-total / (len(cut) * (window - 1)))
