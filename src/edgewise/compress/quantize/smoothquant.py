"""SmoothQuant: part of the range of the activations is moved into the weights, so that both fit 8 bits.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023,
arXiv:2211.10438, equations 3 and 4.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha);   Y = (X diag(s)^-1) (diag(s) W)
max|X_j| is over the calibration tokens, max|W_j| over the rows of all linears that read X. X / s is folded into what
produces X: the gain of a norm; and, where they come before a linear, the rows of v_proj and up_proj.

Differs from the paper: the authors smooth the inputs of attention and of the feed-forward (section 4); with `all_pairs`
the inputs of the output and the down projection are smoothed as well, which are linear in v_proj and up_proj. Inputs of
one channel (grouped queries) share the scale of the largest. In the engine the activations are int8 with a scale per 32
inputs and token, finer than the paper's O1 to O3; a static scale per tensor is an activation format of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.quantize.rtn import check
from edgewise.core.errors import InvalidValueError

__all__ = ["SmoothQuant", "scales_of"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
_LEAST = 1e-5
"""Of a weight's or an activation's peak: what is smaller counts as this, as in the authors' code."""


@dataclass(frozen=True)
class SmoothQuant:
    """The method's settings; alpha as in the paper for OPT and BLOOM."""

    alpha: float = 0.5       # migration strength; equation 4
    all_pairs: bool = False  # v_proj > o_proj and up_proj > down_proj as well

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InvalidValueError(f"alpha is in [0, 1]; given {self.alpha}")


def scales_of(weights: Sequence[Float32], peaks: NDArray[np.floating], config: SmoothQuant = SmoothQuant()) -> Float64:
    """s of equation 4, (in,). weights: (out, in) each, of all linears that read the input; peaks: (in,), max|X_j|."""
    peaks = np.asarray(peaks, np.float64)
    if not weights:
        raise InvalidValueError("smoothing needs at least one weight")
    for weight in weights:
        check(weight)
        if weight.shape[1:] != peaks.shape:
            raise InvalidValueError(f"a weight {weight.shape} and peaks {peaks.shape} are not of the same inputs")
    if not np.isfinite(peaks).all() or (peaks < 0).any():
        raise InvalidValueError("peaks are finite and not negative")
    columns = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0).astype(np.float64)
    columns = np.maximum(columns, _LEAST)
    return np.asarray(np.maximum(np.maximum(peaks, _LEAST)**config.alpha / columns**(1 - config.alpha), _LEAST))
