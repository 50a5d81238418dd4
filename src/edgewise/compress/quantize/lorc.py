"""LoRC: what rounding did to a weight, as far as a product of two thin matrices says it, is added back.

Yao et al., "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank
Compensation", 2023, arXiv:2303.08302, section 5.

    E = W - quantize(W) = U S V^T;   W' = quantize(W) + (U_m S_m^1/2) (S_m^1/2 V_m^T),   m = rank
By Eckart and Young no matrix of rank m is closer to E:
||W - W'||_F^2 is the sum of the squared singular values dropped.

Differs from the paper: with `importance`, E's columns are weighed by the root mean square of their inputs before the
decomposition and unweighed after it, which minimises the error of the product (but for correlations) instead of that
of the weight. The factors are stored in `factors`: fp16, or a QuantFormat; the paper finds 8 bits to cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.quantize.rtn import Rtn, check
from edgewise.compress.quantize.rtn import quantize_layer as rounded_layer
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import FP16, QuantFormat
from edgewise.core.storage import Dense, Factored, QuantizedTensor, Stored, Sum

__all__ = ["Lorc", "compensated"]

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Lorc:
    """The method's settings; rank as in the paper's table 6."""

    rank: int = 8          # of the correction
    factors: str = "fp16"  # how it is stored: fp16, or a QuantFormat such as int8/axis
    search: bool = False   # for the grid of the rounded weight

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InvalidValueError(f"a correction has at least rank 1; given {self.rank}")
        if self.factors != "fp16":
            QuantFormat.parse(self.factors)


def compensated(weight: Float32, fmt: QuantFormat, config: Lorc = Lorc(), *,
                importance: NDArray[np.floating] | None = None, rounded: QuantizedTensor | None = None) -> Sum:
    """weight: (out, in) float32. importance: (in,), positive: the mean square of each input. rounded: the weight as a
    method of choice quantised it, by default to nearest."""
    weight = np.asarray(weight, np.float32)
    check(weight)
    if config.rank >= min(weight.shape):
        raise InvalidValueError(f"a correction of rank {config.rank} is no smaller than the weight {weight.shape}")
    if rounded is None:
        rounded = rounded_layer(weight, fmt, Rtn(config.search), importance=importance)
    elif rounded.shape != weight.shape:
        raise InvalidValueError(f"the rounded weight is {rounded.shape}, the weight {weight.shape}")
    root = np.ones(weight.shape[1])
    if importance is not None:
        if importance.shape != weight.shape[1:] or not (np.asarray(importance) > 0).all():
            raise InvalidValueError(f"importance is one positive number per input, {weight.shape[1:]}")
        root = np.sqrt(np.asarray(importance, np.float64))
    residual = (weight.astype(np.float64) - rounded.dense()) * root
    u, s, vt = np.linalg.svd(residual, full_matrices=False)
    share = np.sqrt(s[:config.rank])
    return Sum((rounded, Factored(_factor(u[:, :config.rank] * share, config),
                                  _factor(share[:, None] * vt[:config.rank] / root, config))))


def _factor(values: NDArray[np.float64], config: Lorc) -> Stored:
    if config.factors == "fp16":
        return Dense(np.clip(values, -FP16.max_value, FP16.max_value).astype(np.float16), FP16)
    return rounded_layer(values.astype(np.float32), QuantFormat.parse(config.factors), Rtn(search=False))
