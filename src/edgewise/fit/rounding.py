"""A stored weight rounded to a QuantFormat, a few rows at a time, over several threads; see compress.quantize.rtn."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.quantize.rtn import Rtn, quantize_layer
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import QuantizedTensor, Stored, rows_of

__all__ = ["quantised", "rounded_values"]

Float32 = NDArray[np.float32]
_CHUNK_VALUES = 1 << 17
"""Values worked on at a time: their temporaries stay in the processor's second-level cache."""
_SEARCHED_BITS = 6
"""Up to so many bits the search for the range of a group takes more off the error than it costs in time."""


def rounded_values(values: Float32, fmt: QuantFormat, importance: NDArray[np.floating] | None = None
                   ) -> QuantizedTensor:
    """(out, in) float32 -> the same weight in `fmt`. importance: (in,) weight of each column's error."""
    return quantize_layer(values, fmt, Rtn(search=fmt.element.bits <= _SEARCHED_BITS), importance=importance)


def quantised(stored: Stored, fmt: QuantFormat, *, importance: NDArray[np.floating] | None = None,
              threads: int = 1) -> QuantizedTensor:
    """(out, in) in any storage form -> the same weight in `fmt`. importance: (in,) weight of each column's error."""
    rows = stored.shape[0]
    step = rows if fmt.granularity.kind == "tensor" else max(1, _CHUNK_VALUES // stored.shape[1])
    whole = rows_of(stored, slice(0, rows))  # a file's own blocks are opened once, and not for every piece of them

    def one(start: int) -> QuantizedTensor:
        return rounded_values(rows_of(whole, slice(start, min(start + step, rows))).dense(), fmt, importance)

    starts = range(0, rows, step)
    if threads > 1 and len(starts) > 1:
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(one, starts))
    else:
        parts = [one(start) for start in starts]
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> Float32 | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else np.concatenate(found)

    scales = joined("scales")
    assert scales is not None
    return QuantizedTensor(np.concatenate([part.codes for part in parts]), scales, fmt, zeros=joined("zeros"),
                           minima=joined("minima"))
