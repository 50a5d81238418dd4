"""The three workloads of XR-NPE, small: digits, gaze from pictures of an eye, and visual-inertial odometry.

Each is a float network, its data and its error. torch is imported where a network is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import require
from edgewise.data.eyes import eyes, gaze_vector
from edgewise.worlds.odometry import drift, drive, windows

__all__ = ["WORKLOADS", "Task", "digits", "gaze", "odometry"]

Arrays = tuple[NDArray[np.float32], ...]


@dataclass(frozen=True, eq=False)
class Task:
    """build() -> an untrained network. inputs, targets: of training. loss(outputs, targets) -> a torch number.
    error(predict) -> what is reported, predict: inputs -> outputs of the held-out part; lower is better.

    test_loss(predict) -> the training loss on the held-out part: finer than the error.
    """

    name: str
    unit: str
    build: Callable[[], Any]
    inputs: Arrays
    targets: NDArray[Any]
    test_inputs: tuple[Arrays, ...]
    loss: Callable[[Any, Any], Any]
    error: Callable[[list[NDArray[np.float32]]], float]
    test_targets: NDArray[Any]


def digits(seed: int, *, train: int = 600) -> Task:
    """8x8 handwritten digits of scikit-learn: `train` of the 1,797 to learn from, the rest to test. Error: per cent."""
    datasets = require("sklearn.datasets", extra="eval", purpose="the digits of xr-npe")
    found = datasets.load_digits()
    images = (found.images / 16).astype(np.float32)[:, None]
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = images[order], found.target[order].astype(np.int64)

    def build() -> Any:
        from torch import nn

        def conv(inputs: int, outputs: int) -> list[Any]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        return nn.Sequential(*conv(1, 12), *conv(12, 12), *conv(12, 12), nn.MaxPool2d(2), *conv(12, 24), *conv(24, 24),
                             *conv(24, 24), nn.MaxPool2d(2), *conv(24, 32), *conv(32, 32), nn.Flatten(),
                             nn.Linear(128, 48), nn.ReLU(), nn.Linear(48, 10))

    def loss(outputs: Any, targets: Any) -> Any:
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs, targets)

    def error(outputs: list[NDArray[np.float32]]) -> float:
        return float((outputs[0].argmax(axis=1) != labels[train:]).mean() * 100)

    return Task("digits", "%", build, (images[:train],), labels[:train], ((images[train:],),), loss, error,
                labels[train:])


def gaze(seed: int, *, train: int = 1500, test: int = 600) -> Task:
    """Yaw and pitch from a 24x24 picture of an eye. Error: mean angle between the lines of sight, degrees."""
    images, angles = eyes(train + test, seed)

    def build() -> Any:
        from torch import nn

        def conv(inputs: int, outputs: int, stride: int) -> list[Any]:
            return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs),
                    nn.ReLU()]

        return nn.Sequential(*conv(1, 12, 2), *conv(12, 16, 1), *conv(16, 24, 2), *conv(24, 24, 1), *conv(24, 32, 2),
                             nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(),
                             nn.Linear(32, 2))

    def error(outputs: list[NDArray[np.float32]]) -> float:
        cosine = (gaze_vector(outputs[0]) * gaze_vector(angles[train:])).sum(axis=1)
        return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean())

    return Task("gaze", "degrees", build, (images[:train],), angles[:train], ((images[train:],),), _squares, error,
                angles[train:])


def odometry(seed: int, *, drives: int = 10, frames: int = 600, tests: int = 5) -> Task:
    """Motion of a vehicle from its inertial sensor and camera. Error: drift, per cent of the way."""
    made = [drive(1000 * (seed + 1) + place, frames=frames) for place in range(drives + tests)]
    inertial, camera, motions = windows(made[:drives])
    middle, width = [], []
    for values in (inertial, camera):
        middle.append(values.mean(axis=(0, 2), keepdims=True))
        width.append(values.std(axis=(0, 2), keepdims=True))
    centre, spread = motions.mean(axis=0), motions.std(axis=0)

    def scaled(*parts: NDArray[np.float64]) -> Arrays:
        return tuple(((part - m) / s).astype(np.float32) for part, m, s in zip(parts, middle, width, strict=True))

    def build() -> Any:
        return _odometry_net(made[0].inertial.shape[2], made[0].camera.shape[2])

    def error(outputs: list[NDArray[np.float32]]) -> float:
        return float(np.mean([drift(one, np.asarray(found, np.float64) * spread + centre).translation
                              for one, found in zip(made[drives:], outputs, strict=True)]) * 100)

    targets = ((motions - centre) / spread).astype(np.float32)
    held = np.concatenate([(one.motions - centre) / spread for one in made[drives:]]).astype(np.float32)
    return Task("odometry", "% of the way", build, scaled(inertial, camera), targets,
                tuple(scaled(one.inertial, one.camera) for one in made[drives:]), _squares, error, held)


def _squares(outputs: Any, targets: Any) -> Any:
    return (outputs - targets).square().mean()


def _odometry_net(ticks: int, sectors: int) -> Any:
    """UL-VIO in small: an encoder of the camera, one of the inertial sensor, and the fusion of both."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = nn.Sequential(
                nn.Conv1d(2, 24, 3, padding=1, padding_mode="circular"), nn.ReLU(),
                nn.Conv1d(24, 32, 3, stride=2, padding=1), nn.ReLU(),
                nn.Conv1d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
                nn.Linear(32 * (sectors // 4), 64), nn.ReLU())
            self.inertial = nn.Sequential(
                nn.Conv1d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
                nn.Linear(16 * ticks, 32), nn.ReLU())
            self.fusion = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))

        def forward(self, inertial: Any, camera: Any) -> Any:
            return self.fusion(torch.cat([self.visual(camera), self.inertial(inertial)], dim=1))

    return Net()


WORKLOADS = {"digits": digits, "gaze": gaze, "odometry": odometry}
