"""Weighted group sparse envelope: the tightest convex stand-in for "at most k groups are not zero".

Refael et al., "Learning k-Level Structured Sparse Neural Networks Using Group Envelope Regularization", 2022,
arXiv:2212.12921; the biconjugate of gs_k after Beck and Refael, "Sparse envelope functions", 2022.

Groups s_1 .. s_m of the weights, z_j = ||theta_sj||, weights d_j > 0.
    gs_k(theta)  = 1/2 sum_j d_j z_j^2 if at most k of the z_j are not zero, else infinite
    gs_k*(y)     = 1/2 of the k largest ||y_sj||^2 / d_j, added
    GS_k(theta)  = gs_k**(theta) = 1/2 min over u of sum_j d_j z_j^2 / u_j,   0 <= u_j <= 1, sum u_j <= k
    prox of t GS_k at y:   u_j = clip(eta sqrt(d_j) z_j - t d_j, 0, 1), sum u_j = k;   x_sj = y_sj u_j / (t d_j + u_j)
t = 0 gives the u of the value. Where k groups or fewer are not zero, their u is 1.

eta is the root of a sum of m clipped lines, which rises from 0 to the number of groups. The median of the bends that
lie between the bounds halves them at each step and settles the lines that have none there, so that a step costs half
of the one before it and all cost O(m).

Differs from the paper: its formulas are not public in full; these are the standard derivation, checked against a slow
convex solution and by Fenchel's equality in the tests.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError

__all__ = ["Kind", "conjugate", "group_lasso_factors", "labels_of", "largest", "prox_factors", "shares", "value"]

Float64 = NDArray[np.float64]
Kind = Literal["filter", "channel", "shape", "layer", "weight"]


def value(norms: NDArray[np.floating], k: int, weights: NDArray[np.floating] | None = None) -> float:
    """GS_k of groups with these norms (m,)."""
    z, d = _checked(norms, k, weights)
    u = shares(z, k, 0.0, d)
    seen = u > 0
    return 0.5 * float((d[seen] * z[seen] ** 2 / u[seen]).sum())


def conjugate(norms: NDArray[np.floating], k: int, weights: NDArray[np.floating] | None = None) -> float:
    """gs_k* of groups with these norms: half the sum of the k largest squares over weights."""
    z, d = _checked(norms, k, weights)
    return 0.5 * float(np.partition(z**2 / d, len(z) - k)[len(z) - k:].sum())


def prox_factors(norms: NDArray[np.floating], k: int, strength: float,
                 weights: NDArray[np.floating] | None = None) -> Float64:
    """By what each group is multiplied: (m,) in [0, 1]. strength: t, the step size times lambda."""
    z, d = _checked(norms, k, weights)
    if not strength > 0:
        raise InvalidValueError(f"the strength of a penalty is positive; given {strength}")
    u = shares(z, k, strength, d)
    return u / (strength * d + u)


def shares(norms: NDArray[np.floating], k: int, strength: float,
           weights: NDArray[np.floating] | None = None) -> Float64:
    """u (m,), of which at most k in sum: 1 kept, 0 given up, between them shrunk further."""
    z, d = _checked(norms, k, weights)
    there = z > 0
    if int(there.sum()) <= k:
        return there.astype(np.float64)
    slope, start = np.sqrt(d) * z, strength * d
    unit = float(slope.max())
    slope = slope / unit
    eta = _root(slope[there], start[there], k)
    return np.asarray(np.clip(eta * slope - start, 0, 1) * there)


def largest(norms: NDArray[np.floating], k: int) -> NDArray[np.bool_]:
    """The k largest groups, of equal ones the earlier: the projection that ends training."""
    kept = np.zeros(len(norms), bool)
    kept[np.argsort(-norms, kind="stable")[:k]] = True
    return kept


def group_lasso_factors(norms: NDArray[np.floating], strength: float,
                        weights: NDArray[np.floating] | None = None) -> Float64:
    """The same for sum_j sqrt(d_j) z_j: Yuan and Lin, 2006."""
    z, d = _checked(norms, len(norms), weights)
    safe = np.where(z > 0, z, 1.0)
    return np.asarray(np.clip(1 - strength * np.sqrt(d) / safe, 0, None) * (z > 0))


def labels_of(shape: tuple[int, ...], kind: Kind) -> NDArray[np.int64]:
    """To which group each weight of one layer belongs, in a shape that broadcasts to the weight's.

    shape: (out, in) or (out, in, height, width). filter: W[o]; channel: W[:, i]; shape: W[:, i, h, w]; layer: all of
    it; weight: each by itself.
    """
    axes = {"filter": (0,), "channel": (1,), "shape": tuple(range(1, len(shape))), "layer": (),
            "weight": tuple(range(len(shape)))}
    if kind not in axes or len(shape) < 2:
        raise InvalidValueError(f"groups of a weight of 2 or more dimensions, by one of {', '.join(axes)}; given "
                                f"{kind!r} of {shape}")
    wide = tuple(size if axis in axes[kind] else 1 for axis, size in enumerate(shape))
    return np.arange(int(np.prod(wide)), dtype=np.int64).reshape(wide)


def _checked(norms: NDArray[np.floating], k: int, weights: NDArray[np.floating] | None) -> tuple[Float64, Float64]:
    z = np.asarray(norms, np.float64)
    d = np.ones(len(z)) if weights is None else np.asarray(weights, np.float64)
    if z.ndim != 1 or d.shape != z.shape or not 1 <= k <= len(z):
        raise InvalidValueError(f"norms and weights of m groups and a level from 1 to m; given {z.shape}, {d.shape}, "
                                f"{k}")
    if not (np.isfinite(z).all() and (z >= 0).all() and (d > 0).all() and np.isfinite(d).all()):
        raise InvalidValueError("norms are finite and not negative, weights finite and positive; a diverged training "
                                "gives others: lower its learning rate")
    return z, d


def _root(slope: Float64, start: Float64, k: int) -> float:
    """eta >= 0 with sum clip(eta slope - start, 0, 1) = k; slope > 0, more than k of them."""
    first, last = start / slope, (1 + start) / slope  # where each line begins to rise, and ends to
    low, high = 0.0, np.inf
    full, rising, offset = 0, 0.0, 0.0  # the settled: at 1, and the sum of the lines that rise all the way between
    while len(first):
        bends = np.concatenate([first, last])
        bends = bends[(bends > low) & (bends < high)]
        if not len(bends):
            break
        middle = float(np.partition(bends, len(bends) // 2)[len(bends) // 2])
        reached = full + rising * middle - offset + float(np.clip(middle * slope - start, 0, 1).sum())
        if reached < k:
            low = middle
        else:
            high = middle
        above, below, between = last <= low, first >= high, (first <= low) & (last >= high)
        full += int(above.sum())
        rising += float(slope[between].sum())
        offset += float(start[between].sum())
        open_ = ~(above | below | between)
        slope, start, first, last = slope[open_], start[open_], first[open_], last[open_]
    if not rising:  # level k is reached exactly where nothing rises: any root will do
        return low if np.isinf(high) else high
    return float(np.clip((k - full + offset) / rising, low, high))
