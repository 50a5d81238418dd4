"""Pictures of a mark on skin whose kind is known because it was drawn, in any proportion of kinds.

    0 even      a smooth outline, one colour
    1 ragged    an outline of many small lobes, one colour
    2 mottled   a smooth outline, a second colour in a part of it

Skin, size, place, outline, light, colour, hairs and noise vary and say nothing about the kind. It stands in for the
sets of dermatoscopic and fundus pictures that papers on imbalanced data use, which cannot be had offline.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError

__all__ = ["KINDS", "lesions"]

KINDS = ("even", "ragged", "mottled")
_SLOW, _FAST = (2, 3), (6, 7, 8, 9, 10)
"""Lobes of an outline: every mark has the first, a ragged one the second too."""


def lesions(count: int, seed: int, *, size: int = 32, shares: Sequence[float] = (1.0, 1.0, 1.0),
            noise: float = 0.06) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(pictures (count, 3, size, size) in about [-1, 1], kinds (count,)), shuffled.

    shares: of each kind; the counts follow them as closely as whole numbers can, each kind has one at least.
    """
    weights = np.asarray(shares, np.float64)
    if count < len(KINDS) or size < 8 or weights.shape != (len(KINDS),) or not (weights > 0).all():
        raise InvalidValueError(f"three pictures or more of 8 pixels or more, and three positive shares; given {count} "
                                f"of {size}, {shares}")
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(np.repeat(np.arange(len(KINDS)), _counts(count, weights / weights.sum())))
    grid = (np.arange(size) + 0.5) / size * 2 - 1
    right, down, radius = (rng.uniform(low, high, (count, 1, 1)) for low, high in ((-0.2, 0.2), (-0.2, 0.2),
                                                                                   (0.4, 0.65)))
    x, y = grid[None, None, :] - right, grid[None, :, None] - down
    angle, beside = np.arctan2(y, x), np.hypot(x, y)
    wave = np.zeros((count, size, size))
    for lobes in (*_SLOW, *_FAST):
        high = 0.1 if lobes in _SLOW else 0.12
        strength = rng.uniform(0.3 * high, high, (count, 1, 1)) * np.where(
            (kinds == 1) | (lobes in _SLOW), 1.0, 0.0)[:, None, None]
        wave += strength * np.cos(lobes * angle + rng.uniform(0, 2 * np.pi, (count, 1, 1)))
    soft = 2.5 / size
    mark = _inside((radius * (1 + wave) - beside) / soft)
    turn, out, spread = rng.uniform(0, 2 * np.pi, (count, 1, 1)), rng.uniform(0.3, 0.6, (count, 1, 1)), rng.uniform(
        0.3, 0.5, (count, 1, 1))
    blot = np.hypot(x - out * radius * np.cos(turn), y - out * radius * np.sin(turn))
    second = mark * _inside((spread * radius - blot) / soft) * (kinds == 2)[:, None, None]
    skin = rng.uniform((0.55, 0.3, 0.15), (0.9, 0.6, 0.45), (count, 3))
    colour = skin * rng.uniform(0.35, 0.7, (count, 1)) + rng.normal(0, 0.04, (count, 3))
    other = colour + rng.choice((-1.0, 1.0), (count, 1)) * rng.uniform(0.12, 0.22, (count, 3))
    light = 1 + rng.uniform(-0.2, 0.2, (count, 1, 1)) * x + rng.uniform(-0.2, 0.2, (count, 1, 1)) * y

    def mixed(over: NDArray[np.float64], below: NDArray[np.float64], share: NDArray[np.float64]) -> NDArray[np.float64]:
        return below + share[:, None] * (over[:, :, None, None] - below)

    picture = mixed(colour, np.broadcast_to(skin[:, :, None, None], (count, 3, size, size)), mark)
    picture = mixed(other, picture, second) * light[:, None]
    for _ in range(2):
        slope, shift = rng.uniform(0, np.pi, (count, 1, 1)), rng.uniform(-0.9, 0.9, (count, 1, 1))
        far = np.abs(grid[None, None, :] * np.cos(slope) + grid[None, :, None] * np.sin(slope) - shift)
        picture = picture * (1 - 0.5 * _inside((0.7 / size - far) * size)[:, None])
    picture = picture * 2 - 1 + rng.normal(0, noise, picture.shape)
    return picture.astype(np.float32), kinds.astype(np.int64)


def _inside(value: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(np.clip(-4 * value, -50, 50)))


def _counts(count: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers that add up to count: one each, the rest by largest remainder."""
    exact = shares * (count - len(shares))
    whole = np.floor(exact).astype(np.int64)
    order = np.argsort(whole - exact, kind="stable")
    whole[order[:count - len(shares) - int(whole.sum())]] += 1
    return whole + 1
