"""The vehicle's course: composition, what its sensors show, and what drift measures."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.worlds import compose, drift, drive, windows
from edgewise.worlds.odometry import relative


@pytest.fixture(scope="module")
def made():
    return drive(3, frames=300)


def matrix(pose):
    x, y, heading = pose
    return np.array([[np.cos(heading), -np.sin(heading), x], [np.sin(heading), np.cos(heading), y], [0, 0, 1]])


def test_motions_are_relative_poses_and_compose_back(made):
    for place in range(0, 300, 37):
        step = np.linalg.inv(matrix(made.poses[place])) @ matrix(made.poses[place + 1])
        np.testing.assert_allclose(matrix(made.motions[place]), step, atol=1e-9)
    np.testing.assert_allclose(compose(made.poses[0], made.motions), made.poses, atol=1e-9)
    np.testing.assert_allclose(relative(made.poses), made.motions)


def test_the_same_seed_is_the_same_drive_and_another_is_not(made):
    again, other = drive(3, frames=300), drive(4, frames=300)
    assert np.array_equal(again.camera, made.camera)
    assert np.array_equal(again.inertial, made.inertial)
    assert not np.allclose(other.poses, made.poses)
    assert np.isfinite(other.camera).all()


def test_the_gyroscope_turns_with_a_bias_of_its_own(made):
    turned = made.inertial[:, 0].mean(axis=1) * 0.1
    gap = turned - made.motions[:, 2]
    assert np.corrcoef(turned, made.motions[:, 2])[0, 1] > 0.9
    assert abs(gap.mean()) < 0.01
    assert gap.std() < 0.003
    biases = [(one.inertial[:, 0].mean() * 0.1 - one.motions[:, 2].mean()) for one in (made, drive(5), drive(6))]
    assert np.std(biases) > 1e-4


def test_landmarks_ahead_and_abeam_flow_as_geometry_says(made):
    """What turns with the vehicle's turn: every landmark; the mean over the fan is about minus the turn."""
    flow, near = made.camera[:, 0], made.camera[:, 1]
    seen = near > 0
    mean = (flow * seen).sum(axis=1) / seen.sum(axis=1)
    assert np.corrcoef(mean, made.motions[:, 2])[0, 1] < -0.7
    assert near.max() <= 1
    assert near[seen].min() >= 1 / 35


def test_drift_is_zero_for_the_truth_and_grows_with_the_error(made):
    exact = drift(made, made.motions)
    assert exact.translation < 1e-12
    assert exact.rotation_per_m < 1e-12
    found = [drift(made, made.motions * [1, 1, factor]).translation for factor in (0.99, 0.9, 0.5)]
    assert found == sorted(found)
    longer = drift(made, made.motions * [1.02, 1.02, 1])
    assert longer.translation == pytest.approx(
        0.02 * np.mean([np.hypot(*compose(np.zeros(3), made.motions[s:s + 100])[-1][:2])
                        / np.hypot(*made.motions[s:s + 100, :2].T).sum() for s in (0, 100, 200)]), rel=1e-9)
    with pytest.raises(InvalidValueError, match="longer than"):
        drift(made, made.motions, segment=301)


def test_windows_join_drives(made):
    inertial, camera, motions = windows([made, made])
    assert inertial.shape == (600, 3, 8)
    assert camera.shape == (600, 2, 32)
    assert np.array_equal(motions[300:], made.motions)
    with pytest.raises(InvalidValueError, match="at least one frame"):
        drive(0, frames=0)
