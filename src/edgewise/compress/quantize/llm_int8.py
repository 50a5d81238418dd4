"""LLM.int8(): the few inputs that hold outliers stay in 16 bits, all others are multiplied in 8.

Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS 2022, arXiv:2208.07339,
section 3, equation 8.

    Y = X_O W_O^T + s_x s_w (X8 W8^T),   O = {j : some |X_j| > threshold}
X8 and W8 are rounded per row of X and row of W (vector-wise, section 3.1) without the columns of O.

Differs from the paper: O is found once, on calibration tokens, instead of in every product; the weight is then the sum
of an int8 part whose columns of O are zero and of an outlier part, the columns of O in half precision times a selection
of inputs. The int8 part may take any QuantFormat with an exact zero. `most` bounds the share of inputs in O; the
largest stay, with a notice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.quantize.rtn import Rtn, check
from edgewise.compress.quantize.rtn import quantize_layer as rounded_layer
from edgewise.core.errors import InvalidValueError, notice
from edgewise.core.numbers import FP16, QuantFormat
from edgewise.core.storage import Dense, Factored, QuantizedTensor, Sparse, Sum

__all__ = ["LlmInt8", "outliers_of", "quantize_layer"]

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class LlmInt8:
    """The method's settings; threshold as in section 3.2."""

    threshold: float = 6.0  # size of an input from which on it is an outlier
    most: float = 0.05      # share of inputs that may be outliers; the paper sees at most 0.1 % in large models
    search: bool = False    # for the grid of the int8 part

    def __post_init__(self) -> None:
        if not self.threshold >= 0 or not 0 <= self.most <= 1:
            raise InvalidValueError(f"threshold is at least 0 and most in [0, 1]; given {self}")


def outliers_of(peaks: NDArray[np.floating], config: LlmInt8 = LlmInt8()) -> NDArray[np.int64]:
    """The inputs that are outliers, ascending. peaks: (in,), max|X_j|."""
    found = np.flatnonzero(np.asarray(peaks) > config.threshold)
    most = int(config.most * len(peaks))
    if len(found) > most:
        notice("clamp", f"{len(found)} of {len(peaks)} inputs exceed {config.threshold:g}; the {most} largest stay in "
               "16 bits", where="llm_int8")
        found = np.sort(found[np.argsort(-np.asarray(peaks)[found], kind="stable")[:most]])
    return np.asarray(found, np.int64)


def quantize_layer(weight: Float32, peaks: NDArray[np.floating], fmt: QuantFormat,
                   config: LlmInt8 = LlmInt8()) -> QuantizedTensor | Sum:
    """weight: (out, in) float32. peaks: (in,), max|X_j| of its inputs. Without outliers, the rounded weight alone."""
    weight = np.asarray(weight, np.float32)
    check(weight)
    if np.shape(peaks) != weight.shape[1:]:
        raise InvalidValueError(f"peaks are one number per input, {weight.shape[1:]}; given {np.shape(peaks)}")
    if fmt.zero == "min":
        raise InvalidValueError(f"{fmt} has no exact zero for the columns of outliers; take a symmetric format, such "
                                "as int8/axis")
    columns = outliers_of(peaks, config)
    rest = weight.copy()
    rest[:, columns] = 0
    rounded = rounded_layer(rest, fmt, Rtn(config.search))
    if not len(columns):
        return rounded
    high = float(np.abs(weight[:, columns]).max())
    if high > FP16.max_value:
        raise InvalidValueError(f"an outlier column holds {high:.4g}, which fp16 ends before")
    # Each row of the selection holds a single one, at the input that it takes.
    selection = Sparse("csr", columns.astype(np.int32), Dense(np.ones((1, len(columns)), np.float16), FP16),
                       (len(columns), weight.shape[1]), row_starts=np.arange(len(columns) + 1, dtype=np.int32))
    kept = Dense(np.ascontiguousarray(weight[:, columns]).astype(np.float16), FP16)
    return Sum((rounded, Factored(kept, selection)))
