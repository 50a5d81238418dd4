"""Learning from two forward passes: simultaneous perturbation with the noise drawn anew from its seed.

Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (MeZO), arXiv:2305.17333, Algorithm 1; ZeroQAT
(arXiv:2509.00031, equations 2 and 3) takes it through the quantised forward pass.

    u ~ N(0, I);   g = (L(W + eps u) - L(W - eps u)) / (2 eps);   W <- W - (lr / q) sum over directions of g u

Parameters are moved in place, + eps u, - 2 eps u, + eps u, and u is made again from the seed each time: memory is that
of a forward pass and of one parameter's noise. float32 drifts by rounding on that way; `exact` keeps a copy instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgewise.core.errors import InvalidValueError

__all__ = ["Moved", "ZerothOrder", "step"]


@dataclass(frozen=True)
class ZerothOrder:
    """clip: of |L+ - L-| / 2, as in ZeroQAT's trainer of language models; None lets any difference pass."""

    epsilon: float = 1e-3
    learning_rate: float = 1e-6
    directions: int = 1
    clip: float | None = 0.2
    exact: bool = False

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and self.learning_rate >= 0 and self.directions >= 1
                and (self.clip is None or self.clip > 0)):
            raise InvalidValueError("a step has a positive epsilon and clip, a rate that is not negative and at least "
                                    f"one direction; given {self}")


@dataclass(frozen=True, eq=False)
class Moved:
    """Parameters that move together, by name, and how far: epsilon and rate times these factors."""

    parameters: Mapping[str, Tensor]
    epsilon_factor: float = 1.0
    rate_factor: float = 1.0


def _noise(groups: Sequence[Moved], seed: int) -> Sequence[tuple[Tensor, Moved, Callable[[], Tensor]]]:
    """Every parameter in the order of its name, and the function that draws its noise; called in that order."""
    generator = torch.Generator().manual_seed(seed)
    return [(group.parameters[name], group,
             lambda shape=group.parameters[name].shape: torch.randn(shape, generator=generator))
            for group in groups for name in sorted(group.parameters)]


def move(groups: Sequence[Moved], seed: int, factor: float, rates: bool = False) -> None:
    """W += factor * (epsilon or rate factor of its group) * u(seed), in place."""
    with torch.no_grad():
        for parameter, group, draw in _noise(groups, seed):
            parameter.add_(draw(), alpha=factor * (group.rate_factor if rates else group.epsilon_factor))


def step(groups: Sequence[Moved], loss: Callable[[], float], config: ZerothOrder, seed: int) -> float:
    """One update in place; the mean of the losses seen. loss: deterministic, of the parameters as they are.

    Raises InvalidValueError for a loss that is not finite; the parameters are then as before.
    """
    seen, found = [], []
    for direction in range(config.directions):
        own = seed + direction
        every = [parameter for group in groups for parameter in group.parameters.values()]
        kept = [parameter.clone() for parameter in every] if config.exact else []
        move(groups, own, config.epsilon)
        higher = loss()
        move(groups, own, -2 * config.epsilon)
        lower = loss()
        move(groups, own, config.epsilon)
        if config.exact:
            with torch.no_grad():
                for parameter, before in zip(every, kept, strict=True):
                    parameter.copy_(before)
        if not (math.isfinite(higher) and math.isfinite(lower)):
            raise InvalidValueError(f"a loss of a perturbed model is not finite ({higher}, {lower}); lower epsilon, "
                                    f"which is {config.epsilon:g}, or the rate, {config.learning_rate:g}")
        difference = (higher - lower) / 2
        if config.clip is not None:
            difference = min(max(difference, -config.clip), config.clip)
        found.append((own, difference / config.epsilon))
        seen.append((higher + lower) / 2)
    for own, slope in found:
        move(groups, own, -config.learning_rate * slope / config.directions, rates=True)
    return sum(seen) / len(seen)
