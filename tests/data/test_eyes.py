"""Pictures of an eye: the direction is in them."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.data.eyes import REACH_RAD, eyes, gaze_vector


def test_pictures_follow_from_the_seed():
    images, angles = eyes(5, 1)
    assert images.shape == (5, 1, 24, 24)
    assert images.dtype == angles.dtype == np.float32
    assert np.array_equal(images, eyes(5, 1)[0])
    assert not np.array_equal(images, eyes(5, 2)[0])
    assert np.abs(angles).max() <= REACH_RAD
    assert images.min() > -0.2
    assert images.max() < 2


def test_the_dark_spot_is_where_the_eye_looks():
    """The pupil is the darkest part: its centre moves right with yaw and down with pitch."""
    images, angles = eyes(400, 0, size=32)
    grid = np.arange(32)
    flat = images[:, 0]
    weight = np.clip(np.quantile(flat, 0.06, axis=(1, 2))[:, None, None] - flat, 0, None)
    weight /= weight.sum(axis=(1, 2), keepdims=True)
    right, down = (weight * grid).sum(axis=(1, 2)), (weight * grid[:, None]).sum(axis=(1, 2))
    assert np.corrcoef(right, angles[:, 0])[0, 1] > 0.9
    assert np.corrcoef(down, angles[:, 1])[0, 1] > 0.8


def test_gaze_vectors_have_length_one_and_known_directions():
    angles = np.array([[0, 0], [np.pi / 2, 0], [0, np.pi / 2], [0.3, -0.2]])
    vectors = gaze_vector(angles)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1)
    np.testing.assert_allclose(vectors[:3], [[0, 0, 1], [1, 0, 0], [0, 1, 0]], atol=1e-12)


@pytest.mark.parametrize(("count", "size"), [(0, 24), (3, 7)])
def test_sizes_are_checked(count, size):
    with pytest.raises(InvalidValueError, match="at least one picture"):
        eyes(count, 0, size=size)
