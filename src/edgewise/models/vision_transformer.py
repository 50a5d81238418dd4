"""A vision transformer: patches as tokens, pre-norm blocks, the mean of the tokens classified.

Dosovitskiy et al., arXiv:2010.11929. Every block may have its own number of heads and its own hidden width; a forward
pass reads them from its weights, so that a network whose heads were cut (train/surgery.py) still runs.

Differs from the paper: no class token, the tokens' mean is classified (its appendix D.3 finds that equal).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewise.core.errors import InvalidValueError
from edgewise.core.plain import Plain

__all__ = ["Attention", "Transformer", "VisionTransformer"]


@dataclass(frozen=True)
class VisionTransformer(Plain):
    """dim: of a token. heads: per block, each of head_dim. hidden: of the feed-forward."""

    size: int = 32
    patch: int = 4
    dim: int = 64
    depth: int = 4
    heads: int = 4
    head_dim: int = 16
    hidden: int = 128
    classes: int = 10
    channels: int = 3

    def build(self) -> Transformer:
        return Transformer(self)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(head_dim)) V over heads of equal size; as many as the projections have room for."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query, self.key, self.value = (nn.Linear(dim, heads * head_dim) for _ in range(3))
        self.out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, dim)."""
        query, key, value = (linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                             for linear in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + down(gelu(up(norm(x))))."""

    removable = True

    def __init__(self, dim: int, heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, head_dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """(batch, channels, size, size) -> logits (batch, classes)."""

    def __init__(self, config: VisionTransformer) -> None:
        super().__init__()
        if config.size % config.patch:
            raise InvalidValueError(f"patches of {config.patch} pixels do not divide a picture of {config.size}")
        self.patches = nn.Conv2d(config.channels, config.dim, config.patch, config.patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (config.size // config.patch) ** 2, config.dim))
        self.blocks = nn.ModuleList([Block(config.dim, config.heads, config.head_dim, config.hidden)
                                     for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.dim)
        self.classes = nn.Linear(config.dim, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.classes(self.norm(x).mean(dim=1))
