"""Measurements of a model as Reports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgewise.core.errors import InvalidValueError
from edgewise.core.report import Quantity, Report
from edgewise.engine.score import windows_of
from edgewise.measure.quality import WINDOW

if TYPE_CHECKING:
    from edgewise.data.texts import Text
    from edgewise.engine.model import LanguageModel

__all__ = ["perplexity_report"]


def perplexity_report(model: LanguageModel, text: Text, *, windows: int | None = None, window: int = WINDOW,
                      progress: Callable[[str, int, int], None] | None = None) -> Report:
    """`model.perplexity` of a text, with what it was measured on: the text's SHA-256, tokens, windows, and the time.

    windows: only the first so many of `window` tokens. The value holds for this text, window and number of windows.
    """
    if windows is not None and windows < 1:
        raise InvalidValueError(f"perplexity needs at least one window; given {windows}")
    if model.context < window:
        raise InvalidValueError(f"a window of {window} tokens does not fit the context of {model.context} positions; "
                                "take a smaller window, which gives another (higher) perplexity")
    ids = model.encode(text.content, add_special=False) if model.kind == "decoder" else []
    started = time.perf_counter()
    value = model.perplexity(ids, windows=windows, window=window, progress=progress)
    seconds = time.perf_counter() - started
    count = len(windows_of(model, ids, window=window, windows=windows))
    return Report(f"Perplexity of {model.checkpoint.metadata.get('name') or model.checkpoint.source}", (
        Quantity("perplexity", value),
        Quantity("mean_negative_log_probability", math.log(value), "nat"),
        Quantity("text", text.name),
        Quantity("text_sha256", text.sha256),
        Quantity("text_tokens", len(ids)),
        Quantity("windows", count),
        Quantity("window_tokens", window),
        Quantity("predicted_tokens", count * (window - 1)),
        Quantity("time", seconds, "s"),
        Quantity("tokens_per_s", count * window / seconds),
    ), environment={
        "model": model.checkpoint.source, "weights_bytes": model.memory.weights_bytes, "kv": model.kv,
        "attention": model.attention,
        "tier": model.tier, "threads": int(model.session.threads)})
