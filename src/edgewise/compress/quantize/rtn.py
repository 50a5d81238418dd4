"""Round to nearest: every weight by itself, on a grid per group.

The baseline of every other method, as in Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877, section 2.1:  q = clip(round(w / s) + z).

Differs from the paper: with `search` the span of a group is not taken as it is, but the grid with the least (weighted)
squared error among several is; see `ranges`. With it, importance weighs the error of each column, as importance
matrices do in llama.cpp: the mean square of the column's input makes it the error of the product, but for correlations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.quantize.ranges import assembled, codes_of, from_groups, grid_of, to_groups, weights_of
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import QuantizedTensor

__all__ = ["Rtn", "quantize_layer"]

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Rtn:
    """search: for the grid of each group; off, the plain span, to the bit as core.numbers.quantize."""

    search: bool = True


def quantize_layer(weight: Float32, fmt: QuantFormat, config: Rtn = Rtn(), *,
                   importance: NDArray[np.floating] | None = None) -> QuantizedTensor:
    """weight: (out, in) float32. importance: (in,), not negative, of each column's squared error; for the search.

    Pure: inputs are not modified. Raises InvalidValueError for values that are not finite.
    """
    weight = np.asarray(weight, np.float32)
    check(weight)
    values = to_groups(weight, fmt.granularity)
    weights = weights_of(importance, weight.shape, fmt.granularity) if config.search else None
    grid = grid_of(values, fmt, weights, search=config.search)
    codes = from_groups(codes_of(values, grid, fmt), weight.shape)
    return assembled(codes, grid, fmt)


def check(weight: NDArray[np.floating]) -> None:
    """Raises InvalidValueError where a weight is not a finite (out, in) array of at least one value."""
    if weight.ndim != 2 or weight.size == 0:
        raise InvalidValueError(f"a weight is (out, in) with at least one value; given shape {weight.shape}")
    if not np.isfinite(weight).all():
        row, column = np.argwhere(~np.isfinite(weight))[0]
        raise InvalidValueError(f"a weight has finite values; element ({row}, {column}) is {weight[row, column]}")
