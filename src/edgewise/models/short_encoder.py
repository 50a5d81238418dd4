"""An encoder for sequences of vectors whose linears may be thin pairs and whose attention may be Linformer's.

Low-Rank Transformer: Winata et al., ICASSP 2020, arXiv:1910.13923; Cahyawijaya, "Greenformers", 2021,
arXiv:2108.10808: every projection of attention and feed-forward is y = (x E) D + b, E (in, rank), D (rank, out).
Linformer: Wang et al., arXiv:2006.04768: keys and values are projected along the sequence, K' = P K, V' = F V with P
and F (k, longest), so that attention costs 2 n k d in place of 2 n^2 d.

Differs from the papers: P and F are shared by the heads of a layer. A sequence shorter than the longest takes the first
columns of P and F.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewise.core.errors import InvalidValueError
from edgewise.core.plain import Plain

__all__ = ["Encoder", "ShortEncoder", "ThinPair"]


@dataclass(frozen=True)
class ShortEncoder(Plain):
    """inputs: of each vector. rank: of every linear inside the layers, 0 for dense. projected: k of Linformer, 0 for
    attention to every position. longest: sequence that positions and projections are made for."""

    inputs: int = 32
    dim: int = 128
    depth: int = 2
    heads: int = 4
    hidden: int = 512
    classes: int = 10
    longest: int = 128
    rank: int = 0
    projected: int = 0

    def build(self) -> Encoder:
        return Encoder(self)


class ThinPair(nn.Module):
    """x -> (x E) D + b: a linear of a rank, which costs rank (in + out) in place of in out."""

    def __init__(self, inputs: int, out: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        if not 0 < rank * (inputs + out) < inputs * out:
            limit = inputs * out / (inputs + out)
            raise InvalidValueError(f"a thin pair of {inputs} x {out} saves below rank {limit:.1f}; given {rank}")
        self.first, self.second = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, out, bias=bias)
        nn.init.normal_(self.first.weight, std=inputs**-0.5)
        nn.init.normal_(self.second.weight, std=(rank * 3) ** -0.5)  # the spread that torch gives a dense linear

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def _linear(inputs: int, out: int, rank: int) -> nn.Module:
    return ThinPair(inputs, out, rank) if rank else nn.Linear(inputs, out)


class Layer(nn.Module):
    """Pre-norm: attention, then feed-forward."""

    def __init__(self, config: ShortEncoder) -> None:
        super().__init__()
        dim, rank = config.dim, config.rank
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (_linear(dim, dim, rank) for _ in range(4))
        self.up, self.down = _linear(dim, config.hidden, rank), _linear(config.hidden, dim, rank)
        self.projected = bool(config.projected)
        if config.projected:
            shape = config.projected, config.longest
            self.project_keys = nn.Parameter(torch.randn(shape) * config.longest**-0.5)
            self.project_values = nn.Parameter(torch.randn(shape) * config.longest**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        query, key, value = self.query(normed), self.key(normed), self.value(normed)
        if self.projected:
            length = x.shape[1]
            key, value = self.project_keys[:, :length] @ key, self.project_values[:, :length] @ value
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """(batch, n, inputs), n up to `longest`, -> logits (batch, classes) of the mean position."""

    def __init__(self, config: ShortEncoder) -> None:
        super().__init__()
        if config.dim % config.heads:
            raise InvalidValueError(f"{config.heads} heads do not divide a width of {config.dim}")
        self.longest = config.longest
        self.inside = nn.Linear(config.inputs, config.dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, config.longest, config.dim))
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.depth)])
        self.norm, self.classes = nn.LayerNorm(config.dim), nn.Linear(config.dim, config.classes)

    def forward(self, x: Tensor) -> Any:
        if x.shape[1] > self.longest:
            raise InvalidValueError(f"a sequence of {x.shape[1]} is longer than {self.longest}, for which positions "
                                    "and projections are made")
        x = self.inside(x) + self.position[:, :x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.classes(self.norm(x).mean(dim=1))
