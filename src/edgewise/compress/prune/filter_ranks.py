"""How much each filter of a convolution matters: Beta-Rank, and the ranks that it is compared with.

Beta-Rank: Hosseini et al., "Beta-Rank: A Robust Convolutional Filter Pruning Method For Imbalanced Medical Image
Analysis", 2023, arXiv:2304.07461. For filter f_k of a layer, at output position p and over the samples of a batch:
    R(k) = mean |f_k| * beta,   beta from  a_p = std over samples of the output y_k at p,
                                           b_p = std over samples, channels and patch of the input that makes p
    direction "out over in": beta = sum_p a_p / b_p     (the authors' code)
    direction "in over out": beta = sum_p b_p / a_p     (equation 5)
L1: mean |f_k| (Li et al., arXiv:1608.08710). HRank: the mean rank of the maps behind the activation (Lin et al.,
arXiv:2002.10179). Random: what a rank is worth less than.

Differs from the paper: equation and code disagree on the direction; the code's is the default, as it made the tables.
The code reads its inputs with the axes of another layout and without padding; here patches are those the convolution
sees, padding included. A position whose denominator is 0 counts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError

__all__ = ["BetaRank", "beta_scores", "hrank_scores", "l1_scores", "normalised", "random_scores", "stability"]

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class BetaRank:
    """stride, padding, dilation: of the convolution, along both axes. input_term: off leaves b out (b = 1)."""

    direction: Literal["out over in", "in over out"] = "out over in"
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    input_term: bool = True


def beta_scores(weight: NDArray[np.floating], inputs: NDArray[np.floating], outputs: NDArray[np.floating],
                config: BetaRank = BetaRank()) -> Float64:
    """R (filters,), not normalised. weight: (filters, channels, h, w); inputs: (n, channels, H, W) before padding;
    outputs: (n, filters, H', W') of the convolution itself."""
    if weight.ndim != 4 or inputs.ndim != 4 or outputs.ndim != 4 or len(inputs) != len(outputs) \
            or inputs.shape[1] != weight.shape[1] or outputs.shape[1] != len(weight):
        raise InvalidValueError(f"a weight (filters, channels, h, w), inputs (n, channels, H, W), outputs (n, filters, "
                                f"H', W'); given {weight.shape}, {inputs.shape}, {outputs.shape}")
    out = np.std(outputs, axis=0, dtype=np.float64)  # (filters, H', W')
    if config.input_term:
        seen = _patch_std(inputs, weight.shape[2:], outputs.shape[2:], config)
    else:
        seen = np.ones(out.shape[1:])
    above, below = (out, seen[None]) if config.direction == "out over in" else (seen[None], out)
    above, below = np.broadcast_arrays(above, below)
    ratio = np.divide(above, below, out=np.zeros(out.shape), where=below > 0)
    return np.asarray(l1_scores(weight) * ratio.sum(axis=(1, 2)))


def _patch_std(inputs: NDArray[np.floating], kernel: tuple[int, ...], size: tuple[int, ...],
               config: BetaRank) -> Float64:
    """b (H', W'): by sums of x and of its square, shifted by the mean so that they do not cancel."""
    x = np.asarray(inputs, np.float64)
    x = np.pad(x, ((0, 0), (0, 0), *((pad, pad) for pad in config.padding)))
    shift = float(x.mean())
    first, second = (x - shift).sum(axis=(0, 1)), ((x - shift) ** 2).sum(axis=(0, 1))
    totals = np.zeros((2, *size))
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            rows = slice(row * config.dilation[0], None, config.stride[0])
            columns = slice(column * config.dilation[1], None, config.stride[1])
            totals[0] += first[rows, columns][:size[0], :size[1]]
            totals[1] += second[rows, columns][:size[0], :size[1]]
    count = x.shape[0] * x.shape[1] * kernel[0] * kernel[1]
    variance = np.maximum(totals[1] / count - (totals[0] / count) ** 2, 0)
    # What is left of equal values by rounding is no spread.
    variance[variance < 1e-14 * (totals[1] / count + shift**2)] = 0
    return np.asarray(np.sqrt(variance))


def l1_scores(weight: NDArray[np.floating]) -> Float64:
    """mean |f_k|, (filters,)."""
    return np.asarray(np.abs(weight).mean(axis=tuple(range(1, weight.ndim)), dtype=np.float64))


def hrank_scores(maps: NDArray[np.floating]) -> Float64:
    """The mean over samples of each map's rank. maps: (n, filters, H, W) behind the activation."""
    ranks: Any = np.linalg.matrix_rank(np.asarray(maps, np.float64))
    return np.asarray(ranks.mean(axis=0), np.float64)


def random_scores(count: int, seed: int) -> Float64:
    """Without reason, from a seed."""
    return np.random.default_rng(seed).random(count)


def normalised(scores: NDArray[np.floating]) -> Float64:
    """(score - min) / (max - min); 0 where all are equal."""
    low, high = float(np.min(scores)), float(np.max(scores))
    return np.asarray((scores - low) / (high - low) if high > low else np.zeros(len(scores)))


def stability(runs: Sequence[NDArray[np.floating]], share: float) -> float:
    """Of all filters, those that were among the top `share` in any run: `share` itself if every run agrees."""
    count = len(runs[0])
    kept = max(1, round(share * count))
    chosen = {int(place) for scores in runs for place in np.argsort(-scores, kind="stable")[:kept]}
    return len(chosen) / count
