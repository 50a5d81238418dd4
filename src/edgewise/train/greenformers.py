"""Thin pairs in place of the linears and convolutions of any torch network, and what they save.

Cahyawijaya, "Greenformers", 2021, arXiv:2108.10808, and its library: auto_fact walks over submodules and replaces
    linear        W (out, in)            by E: in -> r, D: r -> out                     (LED)
    convolution   W (out, in, h, w)      by E: in -> r with its kernel, D: r -> out, 1 x 1    (CED)
where the rank is below r_max = out in / (out + in); a fraction p means floor(p r_max). Solvers: random (for training
from scratch), svd.

Layers of length n, width d, feed-forward 4 d, in multiply-accumulates: dense linears 12 n d^2, thin pairs 18 n d r;
attention 2 n^2 d, Linformer's 2 n k d and 2 n k d for its projections. Both save the same at n* = 6 d - 9 r + 2 k.

Differs from the library: svd is exact, and splits its singular values evenly over both factors (they train better so)
where the library leaves them to E (split "left": an orthonormal D); the non-negative solvers are left out, as trained
weights have both signs; r_max of a convolution counts its kernel, as its cost does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from edgewise.compress.lowrank.decompose import svd
from edgewise.core.errors import InvalidValueError, notice
from edgewise.models.short_encoder import ThinPair

__all__ = ["Cost", "Greenformers", "TrainingCost", "crossover", "factorised", "largest_rank", "layer_macs"]


@dataclass(frozen=True)
class Greenformers:
    """rank: absolute, or a fraction of r_max below 1. inside: names of submodules to walk; empty for all of it."""

    rank: float = 0.5
    solver: Literal["svd", "random"] = "svd"
    split: Literal["even", "left"] = "even"
    inside: tuple[str, ...] = ()
    seed: int = 0


def largest_rank(layer: nn.Module) -> float:
    """r_max: below it the pair has fewer numbers than the layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features / (layer.in_features + layer.out_features)
    if isinstance(layer, nn.Conv2d):
        taps = math.prod(layer.kernel_size)
        return layer.in_channels * layer.out_channels * taps / (layer.in_channels * taps + layer.out_channels)
    raise InvalidValueError(f"a linear or a convolution; given {type(layer).__name__}")


def factorised(model: nn.Module, config: Greenformers = Greenformers()) -> nn.Module:
    """A copy whose layers are thin pairs where that saves; the others stay, and a notice says which."""
    made = copy.deepcopy(model)
    if not config.rank > 0:
        raise InvalidValueError(f"a rank of 1 or more, or a fraction between 0 and 1; given {config.rank}")
    left: list[str] = []
    shared = _shared(made)
    for name, layer in list(made.named_modules()):
        within = not config.inside or any(name == part or name.startswith(f"{part}.") for part in config.inside)
        if not within or not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        rank = math.floor(config.rank * largest_rank(layer)) if config.rank < 1 else int(config.rank)
        grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
        if rank < 1 or rank >= largest_rank(layer) or grouped or id(layer.weight) in shared:
            left.append(name)
            continue
        parent, _, last = name.rpartition(".")
        pair = _pair(layer, rank, config)
        setattr(made.get_submodule(parent), last, pair)
    if left:
        notice("ignored", f"{len(left)} layers stay as they are, as no pair of that rank saves there, their channels "
                          f"are grouped or their weight is shared: {', '.join(left[:6])}", where="greenformers")
    return made


def _shared(model: nn.Module) -> Collection[int]:
    """Weights that several modules hold: factors of one would no longer be the other's."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for value in module.parameters(recurse=False):
            seen[id(value)] = seen.get(id(value), 0) + 1
    return {key for key, count in seen.items() if count > 1}


def _pair(layer: nn.Linear | nn.Conv2d, rank: int, config: Greenformers) -> nn.Module:
    pair: nn.Module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if isinstance(layer, nn.Linear):
            pair = ThinPair(layer.in_features, layer.out_features, rank, layer.bias is not None)
            first, second = pair.first, pair.second
        else:
            first = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                              bias=False, padding_mode=layer.padding_mode)
            second = nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None)
            pair = nn.Sequential(first, second)
    with torch.no_grad():
        if config.solver == "svd":
            weight = layer.weight.detach().numpy()
            factors = svd(weight.reshape(len(weight), -1).astype(np.float64), rank, split=config.split)
            second.weight.copy_(torch.from_numpy(factors.left).reshape(second.weight.shape))
            first.weight.copy_(torch.from_numpy(factors.right).reshape(first.weight.shape))
        if layer.bias is not None:
            second.bias.copy_(layer.bias)
    return pair.train(layer.training)


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one layer for a sequence. linears: projections and feed-forward."""

    linears: int
    attention: int

    @property
    def total(self) -> int:
        return self.linears + self.attention


def layer_macs(length: int, dim: int, hidden: int, *, rank: int = 0, projected: int = 0) -> Cost:
    """Of an encoder layer: dense, of thin pairs, with Linformer's attention, or both."""
    if rank:
        linears = 4 * 2 * dim * rank + 2 * (dim + hidden) * rank
    else:
        linears = 4 * dim * dim + 2 * dim * hidden
    seen = projected or length
    attention = 2 * length * seen * dim + (2 * length * projected * dim if projected else 0)
    return Cost(length * linears, attention)


def crossover(dim: int, rank: int, projected: int, hidden: int | None = None) -> float:
    """The length at which thin pairs and Linformer save the same multiply-accumulates: 6 d - 9 r + 2 k for 4 d."""
    wide = 4 * dim if hidden is None else hidden
    saved = (4 * dim * dim + 2 * dim * wide) - (8 * dim * rank + 2 * (dim + wide) * rank)
    return saved / (2 * dim) + 2 * projected


@dataclass(frozen=True)
class TrainingCost:
    """A calculator of Strubell et al., arXiv:1906.02243: hours of training -> kWh, dollars, kg of CO2.

    Its factors date from 2019 and are meant to be replaced: power of the machine, overhead of the building, kg of CO2
    and dollars per kWh.
    """

    hours: float
    power_w: float
    overhead: float = 1.58
    co2_kg_per_kwh: float = 0.954 * 0.45359237
    dollars_per_kwh: float = 0.12

    @property
    def kwh(self) -> float:
        return self.overhead * self.power_w * self.hours / 1000

    @property
    def co2_kg(self) -> float:
        return self.co2_kg_per_kwh * self.kwh

    @property
    def dollars(self) -> float:
        return self.dollars_per_kwh * self.kwh
