"""A stored weight rounded to a QuantFormat, a few rows at a time, over several threads; see compress.quantize.rtn."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.quantize.rtn import Rtn, quantize_layer
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import Dense, Factored, QuantizedTensor, Sparse, Stored, Sum, rows_of

__all__ = ["every_row_of", "is_sparse", "of_kept", "quantised", "rounded_values", "with_parts"]

Float32 = NDArray[np.float32]
_CHUNK_VALUES = 1 << 17
"""Values worked on at a time: their temporaries stay in the processor's second-level cache."""
_SEARCHED_BITS = 6
"""Up to so many bits the search for the range of a group takes more off the error than it costs in time."""


def rounded_values(values: Float32, fmt: QuantFormat, importance: NDArray[np.floating] | None = None
                   ) -> QuantizedTensor:
    """(out, in) float32 -> the same weight in `fmt`. importance: (in,) weight of each column's error."""
    return quantize_layer(values, fmt, Rtn(search=fmt.element.bits <= _SEARCHED_BITS), importance=importance)


def is_sparse(stored: Stored) -> TypeGuard[Sparse]:
    """Whether a weight keeps n of every m inputs and stores no others."""
    return isinstance(stored, Sparse) and stored.encoding == "n_m"


def of_kept(stored: Sparse, fmt: QuantFormat) -> QuantFormat:
    """The format of the kept values alone, fewer to a group: fmt counts inputs of the dense weight."""
    assert stored.n_m is not None
    kept, of = stored.n_m
    granularity = fmt.granularity
    if granularity.kind == "group":
        granularity = replace(granularity, group=granularity.group * kept // of)
    return replace(fmt, granularity=granularity)


def every_row_of(stored: Stored, step: int) -> Stored:
    """Rows 0, step, 2 step, ... as floats; a weight of n of every m stays one."""
    if is_sparse(stored):
        values = np.ascontiguousarray(stored.values.dense()[::step])
        return replace(stored, index=stored.index[::step], values=Dense(values),
                       logical_shape=(len(values), stored.shape[1]))
    return Dense(np.ascontiguousarray(stored.dense()[::step]))


def with_parts(name: str, stored: Stored, changed: Mapping[str, Stored]) -> Stored:
    """A weight, or what it is made of, exchanged: by its name, or that of its factors, NAME.left and NAME.right."""
    if isinstance(stored, Sum) and len(stored.parts) == 2:
        return Sum((changed.get(name, stored.parts[0]), with_parts(name, stored.parts[1], _without(changed, name))))
    if name in changed:
        return changed[name]
    if isinstance(stored, Factored) and {f"{name}.left", f"{name}.right"} & changed.keys():
        return Factored(changed.get(f"{name}.left", stored.left), changed.get(f"{name}.right", stored.right))
    return stored


def _without(changed: Mapping[str, Stored], name: str) -> dict[str, Stored]:
    return {key: stored for key, stored in changed.items() if key != name}


def quantised(stored: Stored, fmt: QuantFormat, *, importance: NDArray[np.floating] | None = None,
              threads: int = 1) -> QuantizedTensor | Sparse:
    """(out, in) in any storage form -> the same weight in `fmt`. importance: (in,) weight of each column's error.

    Of a weight that keeps n of every m inputs the kept values alone: their columns weigh what their m inputs do on
    average.
    """
    if is_sparse(stored):
        assert stored.n_m is not None
        kept, of = stored.n_m
        if importance is not None:
            importance = np.repeat(np.asarray(importance).reshape(-1, of).mean(axis=1), kept)
        values = quantised(stored.values, of_kept(stored, fmt), importance=importance, threads=threads)
        return replace(stored, values=values)
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
