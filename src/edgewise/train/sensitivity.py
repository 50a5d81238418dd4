"""How much each layer minds being rounded: XR-NPE's score, and formats chosen by it.

XR-NPE (arXiv:2508.13049), "layer-adaptive hybrid-algorithmic" precision, and its repository. For every layer:

    Fisher       mean of the squared gradient of the loss by the weight, over up to 20 samples in batches of 4
    gradient     mean magnitude of that gradient, over 5 samples
    rounding     mean squared error of the weight in the narrow format, over its mean square
    score        0.5 Fisher + 0.3 gradient + 0.2 rounding, each first brought to [0, 1] over the layers

The paper makes the 18 % of the layers with the highest scores wide (`widest_first`). `under_budget` generalises it to
any set of formats under a bit budget: with F_l the Fisher information of a weight of layer l and e_l(f) its summed
squared rounding error in format f, sum_l F_l e_l(f) / 2 is the second-order estimate of what rounding adds to the loss;
the exact choice that minimises it is taken.

Differs from the paper: its code normalises only the sum of the three terms, which leaves one of them in charge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from edgewise.compress.allocate import front_of
from edgewise.core.elements import NumberFormat
from edgewise.core.errors import BudgetError, InvalidValueError
from edgewise.core.numbers import dequantize, quantize
from edgewise.train.qat import quantisable, weight_format

__all__ = ["Sensitivity", "layer_fisher", "layer_scores", "under_budget", "widest_first"]


@dataclass(frozen=True)
class Sensitivity:
    """Weights of the three terms and samples of the first two; the repository's."""

    fisher: float = 0.5
    gradient: float = 0.3
    rounding: float = 0.2
    fisher_batches: int = 5   # of 4: "<= 20 calibration samples"
    gradient_batches: int = 1  # "5 samples", here one batch


def layer_scores(model: nn.Module, batches: Sequence[tuple[Any, ...]], loss: Callable[[nn.Module, Any], Tensor],
                 narrow: NumberFormat, config: Sensitivity | None = None) -> dict[str, float]:
    """The score of every Linear and convolution of a float model, by name. batches: of a few samples each."""
    config = config or Sensitivity()
    fisher = layer_fisher(model, batches[:config.fisher_batches], loss)
    sizes = _gradients(model, batches[:config.gradient_batches], loss, lambda gradient: float(gradient.abs().mean()))
    rounding = {name: weight_error(layer, narrow) for name, layer in quantisable(model).items()}
    parts = [(config.fisher, _unit(fisher)), (config.gradient, _unit(sizes)), (config.rounding, _unit(rounding))]
    return {name: sum(share * part[name] for share, part in parts) for name in fisher}


def layer_fisher(model: nn.Module, batches: Sequence[tuple[Any, ...]],
                 loss: Callable[[nn.Module, Any], Tensor]) -> dict[str, float]:
    """Mean squared gradient by a weight of every Linear and convolution, over the batches."""
    return _gradients(model, batches, loss, lambda gradient: float(gradient.square().mean()))


def _gradients(model: nn.Module, batches: Sequence[tuple[Any, ...]], loss: Callable[[nn.Module, Any], Tensor],
               of: Callable[[Tensor], float]) -> dict[str, float]:
    layers = quantisable(model)
    if not layers or not batches:
        raise InvalidValueError("a sensitivity needs at least one layer and one batch")
    model.eval()
    sums = dict.fromkeys(layers, 0.0)
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss(model, batch).backward()
        for name, layer in layers.items():
            sums[name] += of(layer.weight.grad) / len(batches)
    model.zero_grad(set_to_none=True)
    return sums


def _unit(part: Mapping[str, float]) -> dict[str, float]:
    """Brought to [0, 1]; zero where all are equal."""
    low, high = min(part.values()), max(part.values())
    return {name: (value - low) / (high - low) if high > low else 0.0 for name, value in part.items()}


def weight_error(layer: nn.Module, element: NumberFormat) -> float:
    """Mean squared error of a layer's weight in a format, one scale per output channel, over its mean square."""
    weight = layer.weight.detach().flatten(1).numpy()
    fmt = weight_format(layer, element)
    codes, scales, _ = quantize(weight, fmt)
    error = np.square(dequantize(codes, scales, fmt) - weight).mean()
    return float(error / max(float(np.square(weight).mean()), 1e-30))


def widest_first(scores: Mapping[str, float], wide: NumberFormat, narrow: NumberFormat,
                 share: float = 0.18) -> dict[str, NumberFormat]:
    """The paper's rule: the layers with the highest scores, `share` of them by count and at least one, are wide."""
    count = max(1, round(share * len(scores)))
    ranked = sorted(scores, key=lambda name: -scores[name])
    return {name: wide if name in ranked[:count] else narrow for name in scores}


def under_budget(model: nn.Module, fisher: Mapping[str, float], elements: Iterable[NumberFormat],
                 mean_bits: float) -> dict[str, NumberFormat]:
    """For every layer one of `elements`: the least sum fisher * summed squared error at most at `mean_bits` bits per
    weight. fisher: of `layer_fisher`."""
    layers, offered = quantisable(model), list(elements)
    sizes = [[layers[name].weight.numel() * element.bits for element in offered] for name in fisher]
    power = {name: float(layers[name].weight.detach().square().sum()) for name in fisher}
    costs = [[fisher[name] * power[name] * weight_error(layers[name], element) for element in offered]
             for name in fisher]
    budget = math.floor(mean_bits * sum(layers[name].weight.numel() for name in fisher))
    front = front_of(sizes, costs)
    place = front.at_most(budget)
    if place is None:
        raise BudgetError(f"the narrowest choice takes {front.sizes[-1]} bits, the budget of {mean_bits:g} bits per "
                          f"weight is {budget}")
    return {name: offered[int(pick)] for name, pick in zip(fisher, front.picks[place], strict=True)}
