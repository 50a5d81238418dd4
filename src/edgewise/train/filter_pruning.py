"""Pruning filters by a rank: one batch through the network, the lowest channels of each unit cut, training on.

The ranks are those of compress/prune/filter_ranks.py; what is cut with a filter is known by train/surgery.py. Where an
addition ties several convolutions, a channel's score is the mean of theirs, each normalised over its layer.

Beta-Rank's program also multiplies the weights it copies by (1 + score), for whatever rank it is given, and starts
normalisations afresh; both are options here and off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewise.compress.prune.filter_ranks import (
    BetaRank,
    beta_scores,
    hrank_scores,
    l1_scores,
    normalised,
    random_scores,
)
from edgewise.core.errors import InvalidValueError
from edgewise.train.surgery import Unit, cut

__all__ = ["FilterPruning", "Rank", "prune_filters", "rank_filters"]

Rank = Literal["l1", "hrank", "beta", "random"]
Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class FilterPruning:
    """rate: of each unit's channels that go; per unit where a mapping is given. beta: its direction and terms; stride
    and padding are taken from each layer. scaled: kept weights times (1 + score); raw: by scores as they are, as the
    authors' program has them for L1 and HRank. fresh_norm: normalisations start anew."""

    rank: Rank = "beta"
    rate: float | Mapping[str, float] = 0.5
    beta: BetaRank = field(default_factory=BetaRank)
    scaled: bool = False
    raw: bool = False
    fresh_norm: bool = False
    seed: int = 0


def rank_filters(model: nn.Module, units: Sequence[Unit], pictures: Tensor, config: FilterPruning) -> Scores:
    """Scores of each unit's channels, by unit; higher is kept longer. pictures: the batch, in evaluation."""
    found: Scores = {}
    seen = _seen(model, units, pictures)
    for place, unit in enumerate(units):
        if config.rank == "random":
            found[unit.name] = random_scores(unit.size, config.seed * 1000 + place)
            continue
        each = []
        for name in _convolutions(model, unit):
            layer = model.get_submodule(name)
            inputs, outputs, maps = seen[name]
            weight = layer.weight.detach().numpy()
            if config.rank == "l1":
                scores = l1_scores(weight)
            elif config.rank == "hrank":
                scores = hrank_scores(maps)
            else:
                scores = beta_scores(weight, inputs, outputs, replace(
                    config.beta, stride=_pair(layer.stride), padding=_pair(layer.padding),
                    dilation=_pair(layer.dilation)))
            each.append(scores if config.raw else normalised(scores))
        found[unit.name] = np.mean(each, axis=0)
    return found


def prune_filters(model: nn.Module, units: Sequence[Unit], pictures: Tensor,
                  config: FilterPruning = FilterPruning()) -> nn.Module:
    """A smaller copy, not trained on. units: which to prune. int(n (1 - rate)) channels of n stay, one at least."""
    chosen = [unit for unit in units if _convolutions(model, unit)]
    scores = rank_filters(model, chosen, pictures, config)
    removed = {}
    for unit in chosen:
        rate = config.rate if isinstance(config.rate, float | int) else config.rate.get(unit.name, 0.0)
        if not 0 <= rate < 1:
            raise InvalidValueError(f"unit {unit.name!r}: a rate from 0 to below 1; given {rate}")
        kept = max(1, int(unit.size * (1 - rate)))
        removed[unit.name] = np.sort(np.argsort(-scores[unit.name], kind="stable")[kept:])
    made = cut(model, units, removed)
    with torch.no_grad():
        for unit in chosen if config.scaled else ():
            left = np.delete(scores[unit.name], removed[unit.name])
            factors = torch.from_numpy(1 + left).float()[:, None, None, None]
            for name in _convolutions(model, unit):
                made.get_parameter(f"{name}.weight").mul_(factors)
    if config.fresh_norm:
        for layer in made.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()
    return made


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, str):
        raise InvalidValueError(f"a convolution padded by a number; given {value!r}")
    return int(value[0]), int(value[1])


def _convolutions(model: nn.Module, unit: Unit) -> list[str]:
    """The convolutions that make a unit's channels."""
    names = [tensor.removesuffix(".weight") for tensor in unit.makers()]
    return [name for name in names if isinstance(model.get_submodule(name), nn.Conv2d)
            and model.get_submodule(name).groups == 1]


def _seen(model: nn.Module, units: Sequence[Unit], pictures: Tensor) -> dict[str, tuple[Any, Any, Any]]:
    """By convolution: its inputs, its outputs, and its maps behind normalisation and ReLU. The normalisation is the
    one that runs next, if one does; what an addition does to the maps is left out."""
    wanted = {name for unit in units for name in _convolutions(model, unit)}
    found: dict[str, tuple[Any, Any, Any]] = {}
    last = ""
    handles = []

    def saw(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal last
        if isinstance(layer, nn.Conv2d):
            last = name if name in wanted else ""
            if last:
                found[name] = inputs[0].numpy(), output.numpy(), torch.relu(output).numpy()
        elif last:
            found[last] = (*found[last][:2], torch.relu(output).numpy())
            last = ""

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            handles.append(layer.register_forward_hook(
                lambda layer, inputs, output, name=name: saw(name, layer, inputs, output)))
    try:
        model.eval()
        with torch.no_grad():
            model(pictures)
    finally:
        for handle in handles:
            handle.remove()
    return found
