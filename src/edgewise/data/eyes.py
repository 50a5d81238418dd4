"""Pictures of an eye that looks in a known direction, drawn from a seed.

A ball of radius 1 behind an opening between two lids. The iris is the cap of the ball around the line of sight, so that
looking aside moves it and makes it narrow; the pupil is a smaller cap. Skin, sclera and iris have their own brightness,
a light leaves a glint that moves less than the iris, and the whole is shifted, scaled, shaded and noisy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError

__all__ = ["REACH_RAD", "eyes", "gaze_vector"]

REACH_RAD = 0.6
"""Largest yaw and pitch."""


def gaze_vector(angles: NDArray[np.floating]) -> NDArray[np.float64]:
    """Unit vectors (n, 3) of yaw and pitch (n, 2) in radians; +z towards the camera, +x right, +y down."""
    yaw, pitch = np.asarray(angles, np.float64).T
    return np.stack([np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)], axis=1)


def eyes(count: int, seed: int, *, size: int = 24) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(images (count, 1, size, size) in about [0, 1], yaw and pitch (count, 2) in radians)."""
    if count < 1 or size < 8:
        raise InvalidValueError(f"at least one picture of at least 8 pixels a side; given {count} of {size}")
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-REACH_RAD, REACH_RAD, (count, 2))
    sight = gaze_vector(angles)

    def each(low: float, high: float) -> NDArray[np.float64]:
        return rng.uniform(low, high, (count, 1, 1))

    grid = (np.arange(size) + 0.5) / size * 2 - 1
    zoom, right, down = each(0.95, 1.15), each(-0.12, 0.12), each(-0.12, 0.12)
    x = np.broadcast_to((grid[None, None, :] - right) * 1.15 * zoom, (count, size, size))
    y = np.broadcast_to((grid[None, :, None] - down) * 1.15 * zoom, (count, size, size))
    beside = x**2 + y**2
    z = np.sqrt(np.clip(1 - beside, 0, None))
    along = x * sight[:, 0, None, None] + y * sight[:, 1, None, None] + z * sight[:, 2, None, None]
    soft = 3.0 / size  # the width of an edge, in units of the ball

    def inside(value: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1 / (1 + np.exp(np.clip(-value / soft * 4, -50, 50)))

    picture = np.broadcast_to(each(0.75, 0.95), x.shape) - 0.15 * beside
    iris = inside(along - np.cos(each(0.42, 0.5)))
    picture = picture * (1 - iris) + iris * each(0.25, 0.5)
    pupil = inside(along - np.cos(each(0.16, 0.26)))
    picture = picture * (1 - pupil) + pupil * 0.05
    lit = np.exp(-((x - 0.35 * sight[:, 0, None, None] - each(-0.15, 0.15)) ** 2
                   + (y - 0.35 * sight[:, 1, None, None] - each(-0.25, 0.0)) ** 2) / 0.008)
    picture = picture + lit * each(0.3, 0.8)
    # The lids follow the pitch: looking down closes the upper one.
    upper = -each(0.45, 0.7) + 0.35 * sight[:, 1, None, None] + 0.35 * x**2
    lower = each(0.5, 0.75) + 0.15 * sight[:, 1, None, None] - 0.35 * x**2
    opening = inside(y - upper) * inside(lower - y) * inside(1 - beside)
    skin = each(0.45, 0.7) * (1 + each(-0.15, 0.15) * x + each(-0.15, 0.15) * y)
    picture = picture * opening + skin * (1 - opening)
    picture = picture * each(0.8, 1.15) + rng.normal(0, 0.02, picture.shape)
    return picture[:, None].astype(np.float32), angles.astype(np.float32)
