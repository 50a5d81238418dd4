"""A vehicle on a closed course, seen by its own camera and inertial sensor: where it is, is known.

The course is a closed curve in the plane with Fourier terms in its radius; the vehicle runs along it at a speed that
varies slowly. A pose is (x, y, heading), an element of SE(2); the motion between two instants is
T_i^-1 T_{i+1}, and composing motions gives the trajectory back.

    inertial   between two frames, `ticks` readings of (turn rate, forward acceleration, sideways acceleration), with
               white noise and a constant bias per drive
    camera     landmarks around the course, and what two successive frames see of them: over a fan of directions, the
               change of bearing (optical flow) and the inverse distance of the landmarks in each, zero where none is

The relative pose has to be read from both: the gyroscope turns, but does not know its bias; the flow knows the
translation only through the distances.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError

__all__ = ["Drift", "Drive", "compose", "drift", "drive", "windows"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Drive:
    """frames + 1 poses (x, y in metres, heading in radians); per frame the motion to the next pose, (frames, 3) in the
    frame of the earlier one; inertial: (frames, 3, ticks); camera: (frames, 2, sectors)."""

    poses: Array
    motions: Array
    inertial: Array
    camera: Array


def compose(start: Array, motions: Array) -> Array:
    """Poses (n + 1, 3) from a first pose (3,) and motions (n, 3), each in the frame of the pose before it."""
    poses = np.empty((len(motions) + 1, 3))
    poses[0] = start
    for place, (forward, left, turn) in enumerate(motions):
        x, y, heading = poses[place]
        c, s = np.cos(heading), np.sin(heading)
        poses[place + 1] = x + c * forward - s * left, y + s * forward + c * left, heading + turn
    return poses


def relative(poses: Array) -> Array:
    """The motions between successive poses: T_i^-1 T_{i+1}, with turns in (-pi, pi]."""
    step = np.diff(poses, axis=0)
    c, s = np.cos(poses[:-1, 2]), np.sin(poses[:-1, 2])
    turn = (step[:, 2] + np.pi) % (2 * np.pi) - np.pi
    return np.stack([c * step[:, 0] + s * step[:, 1], -s * step[:, 0] + c * step[:, 1], turn], axis=1)


def drive(seed: int, *, frames: int = 600, ticks: int = 8, sectors: int = 32, landmarks: int = 400,
          frame_s: float = 0.1) -> Drive:
    """A drive around a course of its own. Everything about it follows from the seed."""
    if min(frames, ticks, sectors, landmarks) < 1:
        raise InvalidValueError("a drive has at least one frame, tick, sector and landmark")
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, 4001)[:-1]
    radius = 40.0 + sum(rng.normal(0, 9 / n) * np.cos(n * angle + rng.uniform(0, 2 * np.pi)) for n in range(2, 6))
    course = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1) * rng.uniform(0.8, 1.2)
    course = np.concatenate([course, course[:1]])
    length = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(course, axis=0).T))])

    # Position at every tick, and one before and after for differences.
    count = frames * ticks + 1
    tick_s = frame_s / ticks
    time = np.arange(-1, count + 1) * tick_s
    speed = 9 + 4 * np.sin(2 * np.pi * time / rng.uniform(15, 40) + rng.uniform(0, 6))
    speed += np.sin(time * rng.uniform(1, 2))
    along = (np.cumsum(speed) * tick_s + rng.uniform(0, length[-1])) % length[-1]
    place = np.stack([np.interp(along, length, course[:, axis]) for axis in (0, 1)], axis=1)
    kernel = np.hanning(2 * ticks + 1) / np.hanning(2 * ticks + 1).sum()  # the corners of the polygon, rounded off
    place = np.stack([np.convolve(np.pad(place[:, axis], ticks, mode="reflect", reflect_type="odd"), kernel, "valid")
                      for axis in (0, 1)], axis=1)
    velocity = (place[2:] - place[:-2]) / (2 * tick_s)
    heading = np.unwrap(np.arctan2(velocity[:, 1], velocity[:, 0]))
    ticked = np.concatenate([place[1:-1], heading[:, None]], axis=1)  # (count, 3)
    poses = ticked[::ticks]

    rate = np.gradient(heading, tick_s)
    pace = np.hypot(*velocity.T)
    readings = np.stack([rate, np.gradient(pace, tick_s), pace * rate], axis=1)[:-1]
    readings += rng.normal(0, [0.02, 0.15, 0.15]) + rng.normal(0, [0.03, 0.4, 0.4], readings.shape)
    inertial = readings.reshape(frames, ticks, 3).transpose(0, 2, 1)

    around = rng.uniform(0, len(course) - 1, landmarks).astype(int)
    marks = course[around] + rng.normal(0, 12, (landmarks, 2))
    return Drive(poses, relative(poses), inertial, _camera(poses, marks, sectors, rng))


def _camera(poses: Array, marks: Array, sectors: int, rng: np.random.Generator) -> Array:
    """(frames, 2, sectors): mean change of bearing and mean inverse distance of the landmarks in each sector."""
    gap = marks[None] - poses[:, None, :2]
    distance = np.hypot(gap[..., 0], gap[..., 1])
    bearing = (np.arctan2(gap[..., 1], gap[..., 0]) - poses[:, None, 2] + np.pi) % (2 * np.pi) - np.pi
    flow = (bearing[1:] - bearing[:-1] + np.pi) % (2 * np.pi) - np.pi + rng.normal(0, 0.004, bearing[1:].shape)
    near = 1 / np.maximum(distance[:-1], 1.0)
    seen = distance[:-1] < 35
    sector = ((bearing[:-1] + np.pi) / (2 * np.pi) * sectors).astype(int) % sectors
    view = np.zeros((len(poses) - 1, 2, sectors))
    for frame in range(len(view)):
        where = sector[frame][seen[frame]]
        hits = np.maximum(np.bincount(where, minlength=sectors), 1)
        for channel, value in enumerate((flow[frame], near[frame])):
            view[frame, channel] = np.bincount(where, value[seen[frame]], minlength=sectors) / hits
    return view


def windows(drives: list[Drive]) -> tuple[Array, Array, Array]:
    """Inertial (n, 3, ticks), camera (n, 2, sectors) and motions (n, 3) of all frames of several drives."""
    return (np.concatenate([one.inertial for one in drives]), np.concatenate([one.camera for one in drives]),
            np.concatenate([one.motions for one in drives]))


@dataclass(frozen=True)
class Drift:
    """Of a trajectory, over its segments: error of the end as a share of the way, and radians per metre."""

    translation: float
    rotation_per_m: float


def drift(truth: Drive, motions: Array, *, segment: int = 100) -> Drift:
    """Composed motions (frames, 3) against the known trajectory, over segments of so many frames (KITTI's measure)."""
    shares, turns = [], []
    for start in range(0, len(motions) - segment + 1, segment):
        part = slice(start, start + segment)
        origin = np.zeros(3)
        true, found = compose(origin, truth.motions[part])[-1], compose(origin, motions[part])[-1]
        way = float(np.hypot(*truth.motions[part, :2].T).sum())
        shares.append(float(np.hypot(*(true - found)[:2])) / way)
        turns.append(abs(float((true - found)[2] + np.pi) % (2 * np.pi) - np.pi) / way)
    if not shares:
        raise InvalidValueError(f"a segment of {segment} frames is longer than the {len(motions)} motions given")
    return Drift(float(np.mean(shares)), float(np.mean(turns)))
