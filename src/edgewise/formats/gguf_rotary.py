"""Rotary pairs: GGUF keeps a head's rows interleaved, Hugging Face in two halves. Rows of blocks move whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.storage import Blocks, Dense, QuantizedTensor, Stored

__all__ = ["interleave_rotary", "split_rotary"]

Array = NDArray[Any]


def split_rotary(stored: Stored, heads: int) -> Stored:
    """Rows from interleaved pairs (2j, 2j+1) to rotate-half (j, j + head_dim/2), head by head. (rows, ...)."""
    return _move_rows(stored, lambda rows: rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2))


def interleave_rotary(stored: Stored, heads: int) -> Stored:
    """The inverse of split_rotary."""
    return _move_rows(stored, lambda rows: rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2))


def _move_rows(stored: Stored, move: Callable[[Array], Array]) -> Stored:
    if isinstance(stored, Blocks) and len(stored.shape) > 1:
        return replace(stored, raw=np.ascontiguousarray(move(stored.raw)).reshape(stored.raw.shape))
    if isinstance(stored, Dense):
        return replace(stored, data=np.ascontiguousarray(move(stored.data)).reshape(stored.data.shape))
    if isinstance(stored, QuantizedTensor) and stored.format.granularity.kind != "tensor":
        def moved(rows: Array) -> Array:
            return np.ascontiguousarray(move(rows)).reshape(rows.shape)

        return QuantizedTensor(moved(stored.codes), moved(stored.scales), stored.format,
                               zeros=None if stored.zeros is None else moved(stored.zeros),
                               minima=None if stored.minima is None else moved(stored.minima))
    return Dense(np.ascontiguousarray(move(stored.dense())).reshape(stored.shape))
