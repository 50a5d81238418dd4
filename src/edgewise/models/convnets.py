"""Small convolutional networks: plain stacks (LeNet, VGG) and residual ones (ResNet-20 and its kin).

LeCun et al., 1998; Simonyan and Zisserman, arXiv:1409.1556; He et al., arXiv:1512.03385, section 4.2. A forward pass
reads no width from the configuration, so that a network whose channels were cut (train/surgery.py) still runs.

Differs from the papers: batch normalisation in every stack that asks for it; a residual network passes a stride by a
1 x 1 convolution (He's option B) where the paper's for small pictures pads by zero channels (option A).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewise.core.errors import InvalidValueError
from edgewise.core.plain import Plain

__all__ = ["ResNet", "Residual", "Stack"]


@dataclass(frozen=True)
class Stack(Plain):
    """convolutions: (filters, kernel, pooled) each, padded to keep the size when `padded`; pooled: halved after it.

    hidden: widths of the fully connected layers before the classes. flat: they see every position; else the mean.
    """

    convolutions: tuple[tuple[int, int, bool], ...] = ((20, 5, True), (50, 5, True))
    hidden: tuple[int, ...] = (500,)
    classes: int = 10
    channels: int = 1
    size: int = 28
    norm: bool = False
    padded: bool = False
    flat: bool = True

    def build(self) -> nn.Sequential:
        """The network in torch's initialisation. Its input is (batch, channels, size, size)."""
        layers: list[nn.Module] = []
        width, size = self.channels, self.size
        for filters, kernel, pooled in self.convolutions:
            layers.append(nn.Conv2d(width, filters, kernel, padding=kernel // 2 if self.padded else 0,
                                    bias=not self.norm))
            if self.norm:
                layers.append(nn.BatchNorm2d(filters))
            layers.append(nn.ReLU())
            size -= 0 if self.padded else kernel - 1
            if pooled:
                layers.append(nn.MaxPool2d(2))
                size //= 2
            width = filters
            if size < 1:
                raise InvalidValueError(f"nothing is left of a picture of {self.size} pixels after {len(layers)} "
                                        f"layers of {self.convolutions}; take a larger one or fewer layers")
        layers += [] if self.flat else [nn.AdaptiveAvgPool2d(1)]
        layers.append(nn.Flatten())
        width *= size**2 if self.flat else 1
        for hidden in self.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        return nn.Sequential(*layers, nn.Linear(width, self.classes))


@dataclass(frozen=True)
class ResNet(Plain):
    """depth: blocks of two convolutions per stage; ResNet-20 has 3, ResNet-56 9. Stages after the first halve."""

    depth: int = 3
    widths: tuple[int, ...] = (16, 32, 64)
    classes: int = 10
    channels: int = 3
    size: int = 32

    def build(self) -> Residual:
        return Residual(self)


class Block(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))); x through a 1 x 1 convolution where its shape changes."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.passed = self.removable = before == width and stride == 1
        if not self.passed:
            self.conv3 = nn.Conv2d(before, width, 1, stride, bias=False)
            self.norm3 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(inside + (x if self.passed else self.norm3(self.conv3(x))))


class Residual(nn.Module):
    """(batch, channels, height, width) -> logits (batch, classes)."""

    def __init__(self, config: ResNet) -> None:
        super().__init__()
        if config.depth < 1 or not config.widths:
            raise InvalidValueError(f"a residual network has a stage and a block in it; given {config}")
        before = config.widths[0]
        self.stem = nn.Conv2d(config.channels, before, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(before)
        blocks = []
        for stage, width in enumerate(config.widths):
            for place in range(config.depth):
                blocks.append(Block(before, width, 2 if stage and not place else 1))
                before = width
        self.blocks = nn.ModuleList(blocks)
        self.classes = nn.Linear(before, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.classes(torch.mean(x, dim=(2, 3)))
