"""AWQ: the weights that meet large activations are scaled up before rounding, and the activations down by as much.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", MLSys 2024,
arXiv:2306.00978, section 3.2, equations 4 and 5.

W (out, in) are the linears that read X (tokens, in); a is the mean size of each input.
    s = a^alpha / sqrt(max(a^alpha) min(a^alpha));   W' = quantize(W diag(s)) diag(1/s);   alpha in 0, 1/20, ..., 19/20
The alpha whose sum over the linears of ||(W' - W) X||^2 is least is taken; X / s is folded into what produces X.
Clipping: per group, the span is cut at max|w| * share for the share with the least ||(q(clip(w)) - w) X_group||^2.

Differs from the paper:
- ||D X||^2 is taken from the Gram matrix, tr(D X^T X D^T), and so over all tokens instead of a sample, and of each
  linear instead of the output of the block; the authors' code runs the block (section 3.2 words it as a linear).
- a is the root mean square of an input, which the statistics hold, and not the mean of |x|.
- Inputs that come from one channel (values under grouped queries) have one scale, from the largest of their a; the
  authors' code leaves such pairs out.
- alpha = 0 is among the candidates, so that the search can only win on what it measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.quantize.ranges import assembled, codes_of, from_groups, grid_of, to_groups
from edgewise.compress.quantize.rtn import Rtn, check, quantize_layer
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import QuantizedTensor

__all__ = ["Awq", "clipped_layer", "product_error", "scales_of"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True)
class Awq:
    """The method's settings, as in the authors' code."""

    steps: int = 20         # values of alpha: 0, 1/steps, ...
    clip: bool = True       # search for the span of each group
    clip_steps: int = 20    # shares 1, 1 - 1/clip_steps, ...
    clip_most: float = 0.5  # of the span that may be cut off

    def __post_init__(self) -> None:
        if self.steps < 1 or self.clip_steps < 1 or not 0 <= self.clip_most < 1:
            raise InvalidValueError(f"steps are at least 1 and clip_most is in [0, 1); given {self}")


def product_error(change: NDArray[np.floating], gram: NDArray[np.floating]) -> float:
    """||D X||^2 = tr(D G D^T). change D: (out, in); gram G: (in, in)."""
    wide = np.asarray(change, np.float32)
    return float(np.einsum("oi,oi->", wide @ np.asarray(gram, np.float32), wide, dtype=np.float64))


def scales_of(weights: Sequence[Float32], sizes: NDArray[np.floating], gram: NDArray[np.floating], fmt: QuantFormat,
              config: Awq = Awq(), *, shared: Callable[[Float64], Float64] | None = None) -> tuple[Float64, float]:
    """(s, alpha): the scale of each input, (in,), and what it was made with.

    weights: (out, in) each, of all linears that read the input. sizes: (in,), how large each input is. gram: (in, in),
    X^T X. shared: makes one size of those that must have one scale.
    """
    size = np.asarray(sizes, np.float64)
    for weight in weights:
        check(weight)
        if weight.shape[1:] != size.shape or gram.shape != 2 * size.shape:
            raise InvalidValueError(f"weights {weight.shape}, sizes {size.shape} and Gram matrix {gram.shape} are not "
                                    "of the same inputs")
    size = np.maximum(size if shared is None else shared(size), 1e-4 * max(float(size.mean()), 1e-30))
    best, least, best_alpha = np.ones_like(size), np.inf, 0.0
    for step in range(config.steps):
        alpha = step / config.steps
        s = size**alpha
        s = s / np.sqrt(s.max() * s.min())
        scale = s.astype(np.float32)
        error = sum(product_error(quantize_layer(weight * scale, fmt, Rtn(search=False)).dense() / scale - weight, gram)
                    for weight in weights)
        if error < least:
            best, least, best_alpha = s, error, alpha
    return best, best_alpha


def clipped_layer(weight: Float32, gram: NDArray[np.floating], fmt: QuantFormat,
                  config: Awq = Awq()) -> QuantizedTensor:
    """The weight rounded with the clipping of each group that costs its own part of the product least.

    weight: (out, in) float32. gram: (in, in), of inputs that are scaled already, where scales were folded.
    """
    weight = np.asarray(weight, np.float32)
    check(weight)
    if gram.shape != 2 * weight.shape[1:]:
        raise InvalidValueError(f"a weight {weight.shape} and a Gram matrix {gram.shape} are not of the same inputs")
    if not config.clip or fmt.granularity.kind == "tensor":
        return quantize_layer(weight, fmt, Rtn(search=False))
    size = fmt.granularity.group if fmt.granularity.kind == "group" else weight.shape[1]
    limits = np.concatenate([_limits(weight[:, start:start + size], gram[start:start + size, start:start + size], fmt,
                                     config)[:, None] for start in range(0, weight.shape[1], size)], axis=1)
    spread = np.repeat(limits, size, axis=1)[:, :weight.shape[1]]
    return quantize_layer(np.clip(weight, -spread, spread), fmt, Rtn(search=False))


def _limits(part: Float32, gram: NDArray[np.floating], fmt: QuantFormat, config: Awq) -> Float32:
    """Where the values of one group of each row are cut, (out,). part: (out, size); gram: (size, size)."""
    peak = np.abs(part).max(axis=1)
    small = np.asarray(gram, np.float32)
    best, least = peak, np.full(len(part), np.inf)
    own = QuantFormat(fmt.element, _AXIS, fmt.scale, fmt.zero)
    for step in range(max(int(config.clip_most * config.clip_steps), 1)):
        limit = (peak * np.float32(1 - step / config.clip_steps)).astype(np.float32)
        cut = np.clip(part, -limit[:, None], limit[:, None])
        values = to_groups(cut, _AXIS)
        grid = grid_of(values, own, search=False)
        change = assembled(from_groups(codes_of(values, grid, own), part.shape), grid, own).dense() - part
        error = np.einsum("oi,oi->o", change @ small, change)
        better = error < least
        least, best = np.where(better, error, least), np.where(better, limit, best)
    return np.asarray(best, np.float32)


_AXIS = QuantFormat.parse("int8/axis").granularity
