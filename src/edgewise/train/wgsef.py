"""Training under WGSEF: stochastic proximal steps until at most k groups of each level are not zero.

Refael et al., arXiv:2212.12921 (the penalty: compress/prune/wgsef.py). Half-space steps: Chen et al., "Orthant based
proximal stochastic gradient method for l1-regularized optimization" and HSPG, arXiv:2009.12078.

    theta <- prox of a lambda GS_k at (theta - a g),  a the learning rate, g a mini-batch gradient with momentum
    half-space: of the groups that are not zero, those with <x_g - a (g + lambda d x_g / u), x_g> < eps |x_g|^2 go

Three stretches: plain training; proximal steps, lambda growing while a level has more groups than it may; and from
where it has about k, or at the end of the stretch, training on with the k largest, the others zero (debias). A group is
any set of weights, given by labels: filters with their normalisation, input channels, shapes, layers, single weights.

A filter that is normalised says the same at every size, and a smaller one is turned further by each step of the
gradient: shrunk by the penalty for some epochs, it forgets what it had learnt, and its norm means nothing. So the group
of such a channel is the scale and the shift of its normalisation, and the filter becomes zero with them, unshrunk.

Differs from the paper: the growth of lambda and the debias are ours, as its schedule is not public, and so are groups
that leave a normalised filter's size alone. Momentum of a group that has become zero is cleared. A half-space step
leaves the k largest. No weight decay on grouped tensors: GS_k contains it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewise.compress.prune.wgsef import Kind, group_lasso_factors, labels_of, largest, prox_factors, shares
from edgewise.core.errors import InvalidValueError
from edgewise.train.pictures import Epochs, learn
from edgewise.train.surgery import Unit

__all__ = ["Level", "Trained", "Wgsef", "block_level", "norms_of", "tensor_level", "train_wgsef", "unit_levels",
           "zeros"]

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Level:
    """Groups of which at most k are not zero. labels: by tensor, the group of each entry, broadcast; -1 for none.

    weights: d_j of each group; None for 1. hidden: tensors whose size a normalisation hides, labelled in the same way:
    they become zero with their group and have no part in its norm.
    """

    name: str
    labels: Mapping[str, Labels]
    k: int
    weights: NDArray[np.float64] | None = None
    hidden: Mapping[str, Labels] = field(default_factory=dict)
    count: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", 1 + max(int(labels.max()) for labels in self.labels.values()))
        if not 1 <= self.k <= self.count:
            raise InvalidValueError(f"level {self.name!r}: k from 1 to its {self.count} groups; given {self.k}")


@dataclass(frozen=True)
class Wgsef:
    """plain, debias: shares of the epochs without penalty before and after. growth: of lambda, per epoch.

    penalty: group lasso and ridge (k = m) in the same place, to compare. half_space: eps, or None for proximal steps
    to the end; taken after a quarter of the penalised stretch. ramp: False keeps lambda as it is. stop: a level that
    has come within (1 + slack) k keeps its k largest and is penalised no more, before the shrinkage takes those too.
    """

    penalty: Literal["wgsef", "group lasso", "ridge", "none"] = "wgsef"
    strength: float = 0.3
    growth: float = 1.5
    ramp: bool = True
    stop: bool = True
    slack: float = 0.25
    plain: float = 0.2
    debias: float = 0.5
    half_space: float | None = None
    epochs: Epochs = field(default_factory=lambda: Epochs(epochs=24, weight_decay=0.0))

    def __post_init__(self) -> None:
        if not self.strength > 0 or self.growth < 1 or self.plain < 0 or self.debias < 0 \
                or self.plain + self.debias >= 1 or self.slack < 0:
            raise InvalidValueError(f"a positive strength, a growth of 1 or more, shares that leave epochs for the "
                                    f"penalty; given {self}")


@dataclass(frozen=True)
class Trained:
    """survivors: groups not zero after each epoch, by level. steps: proximal steps until every level was settled, or
    None; before: groups left when its penalty ended, by level; kept: by level, True where a group is not zero."""

    survivors: tuple[Mapping[str, int], ...]
    steps: int | None
    before: Mapping[str, int]
    kept: Mapping[str, NDArray[np.bool_]]


def unit_levels(model: nn.Module, units: Sequence[Unit], share: float) -> list[Level]:
    """One level per unit of train/surgery.py: a group is a channel with all that makes it, so that what is zero can be
    cut. Where all its filters are normalised, its norm is that of scale and shift. share: of the channels that may
    stay; one at least."""
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    norms = {f"{name}.{side}" for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)
             for side in ("weight", "bias")}
    levels = []
    for unit in units:
        labels: dict[str, Labels] = {}
        for part in unit.parts:
            if part.side == "out" and part.tensor in shapes:
                shape = shapes[part.tensor]
                made = np.full(shape[part.axis], -1, np.int64)
                made[part.places] = part.channels
                labels[part.tensor] = made.reshape([-1 if axis == part.axis else 1 for axis in range(len(shape))])
        seen = [name for name in labels if name in norms]
        makers = [name for name in labels if name not in norms and name.endswith(".weight")]
        if 2 * len(makers) != len(seen):  # some layer that makes the channels has no normalisation behind it
            seen = list(labels)
        levels.append(Level(unit.name, {name: labels[name] for name in seen}, max(1, round(share * unit.size)),
                            hidden={name: values for name, values in labels.items() if name not in seen}))
    return levels


def tensor_level(model: nn.Module, name: str, kind: Kind, share: float) -> Level:
    """Groups of one weight: filters, channels, shapes, single weights."""
    labels = labels_of(tuple(model.get_parameter(name).shape), kind)
    return Level(f"{name} by {kind}", {name: labels}, max(1, round(share * labels.size)))


def block_level(model: nn.Module, k: int) -> Level:
    """Depth: a group is the inside of a block that can be removed. At most k of them stay."""
    names = [name for name, module in model.named_modules() if getattr(module, "removable", False)]
    labels = {key: np.full((1,) * value.dim(), place, np.int64) for place, name in enumerate(names)
              for key, value in model.named_parameters() if key.startswith(f"{name}.")}
    if not labels:
        raise InvalidValueError(f"{type(model).__name__} has no block that can be removed")
    return Level("blocks", labels, k)


def train_wgsef(model: nn.Module, levels: Sequence[Level], pictures: Tensor, kinds: Tensor,
                config: Wgsef = Wgsef()) -> Trained:
    """Train in place. Afterwards at most k groups of each level are not zero (penalty "none": as trained)."""
    base = config.epochs
    after = round(config.debias * base.epochs)
    per_epoch = sum(len(pictures) - start > 1 for start in range(0, len(pictures), base.batch))
    state = _State(model, levels, config, base.epochs - after, per_epoch)
    learn(model, pictures, kinds, replace(base, epochs=base.epochs - after, schedule="constant"),
          after_step=state.step)
    learn(model, pictures, kinds, replace(base, epochs=after, seed=base.seed + 1), after_step=state.hold)
    return Trained(tuple(state.survivors), state.reached, state.before,
                   {level.name: norms_of(model, level) > 0 for level in levels})


def zeros(trained: Trained) -> dict[str, NDArray[np.int64]]:
    """The groups that are zero, by level: what train.surgery.cut takes away."""
    return {name: np.flatnonzero(~kept) for name, kept in trained.kept.items()}


def norms_of(model: nn.Module, level: Level) -> NDArray[np.float64]:
    """||theta_sj|| of each group, (count,)."""
    parameters = dict(model.named_parameters())
    return np.sqrt(_sums({name: parameters[name].detach() ** 2 for name in level.labels}, level))


def _sums(tensors: Mapping[str, Tensor], level: Level) -> NDArray[np.float64]:
    """Every tensor's entries added up by group."""
    total = np.zeros(level.count)
    for name, labels in level.labels.items():
        values = tensors[name]
        alone = [axis for axis, size in enumerate(labels.shape) if size == 1]
        if alone:
            values = values.sum(dim=alone, keepdim=True)
        flat = labels.reshape(-1)
        inside = flat >= 0
        total += np.bincount(flat[inside], values.double().numpy().reshape(-1)[inside], level.count)
    return total


def _multiply(tensors: Mapping[str, Tensor], level: Level, factors: NDArray[np.float64]) -> None:
    with torch.no_grad():
        for labelled, by in ((level.labels, factors), (level.hidden, (factors > 0).astype(np.float64))):
            outside = np.append(by, 1.0)  # label -1
            for name, labels in labelled.items():
                tensors[name].mul_(torch.from_numpy(outside[labels]).to(tensors[name].dtype))


class _State:
    """What happens after each step of the optimiser. masks: of the levels that are settled, what stays."""

    def __init__(self, model: nn.Module, levels: Sequence[Level], config: Wgsef, epochs: int, per_epoch: int) -> None:
        self.model, self.levels, self.config, self.per_epoch = model, levels, config, per_epoch
        self.parameters = dict(model.named_parameters())
        self.first, self.last = round(config.plain * config.epochs.epochs) * per_epoch, epochs * per_epoch
        self.strength = {level.name: config.strength for level in levels}
        self.reached: int | None = None
        self.survivors: list[dict[str, int]] = []
        self.before: dict[str, int] = {}
        self.masks: dict[str, NDArray[np.float64]] = {}

    def step(self, step: int, rate: float, optimiser: torch.optim.SGD) -> None:
        penalised = self.config.penalty != "none" and self.first < step <= self.last
        halves = self.config.half_space is not None and step > self.first + (self.last - self.first) / 4
        for level in self.levels:
            if penalised and level.name not in self.masks:
                (self._half_space if halves else self._prox)(level, rate, optimiser)
                self._settle(level, step)
            if level.name in self.masks:
                self._shrink(level, self.masks[level.name], optimiser)
        if self.reached is None and penalised and len(self.masks) == len(self.levels) and step < self.last:
            self.reached = step - self.first
        if step % self.per_epoch == 0:
            self._epoch(step)

    def hold(self, step: int, rate: float, optimiser: torch.optim.SGD) -> None:
        """Without the penalty: what is zero stays zero."""
        for level in self.levels:
            if level.name in self.masks:
                self._shrink(level, self.masks[level.name], optimiser)
        if step % self.per_epoch == 0:
            self._epoch(self.last)

    def _settle(self, level: Level, step: int) -> None:
        """A level that is near enough to k is done with; at the end of the stretch every one is. The largest stay."""
        norms = norms_of(self.model, level)
        left = int((norms > 0).sum())
        if step == self.last or (self.config.stop and left <= (1 + self.config.slack) * level.k):
            self.before[level.name] = left
            self.masks[level.name] = (largest(norms, level.k) & (norms > 0)).astype(np.float64)

    def _epoch(self, step: int) -> None:
        left = {level.name: int((norms_of(self.model, level) > 0).sum()) for level in self.levels}
        self.survivors.append(left)
        for level in self.levels:
            if self.config.ramp and self.first < step < self.last and left[level.name] > level.k:
                self.strength[level.name] *= self.config.growth

    def _prox(self, level: Level, rate: float, optimiser: torch.optim.SGD) -> None:
        norms, strength = norms_of(self.model, level), rate * self.strength[level.name]
        if self.config.penalty == "group lasso":
            factors = group_lasso_factors(norms, strength, level.weights)
        else:
            k = level.count if self.config.penalty == "ridge" else level.k
            factors = prox_factors(norms, k, strength, level.weights)
        self._shrink(level, factors, optimiser)

    def _half_space(self, level: Level, rate: float, optimiser: torch.optim.SGD) -> None:
        """The step x~ = x - a (g + lambda dOmega) is seen from where x stood: x~ - x is what the optimiser and the
        penalty did."""
        norms = norms_of(self.model, level)
        there = norms > 0
        d = np.ones(level.count) if level.weights is None else level.weights
        u = np.maximum(shares(norms, level.k, 0.0, d), 1e-12)
        moved = {name: optimiser.state[self.parameters[name]]["momentum_buffer"] for name in level.labels}
        along = _sums({name: moved[name] * self.parameters[name].detach() for name in level.labels}, level)
        # <x - a v, x> of the point before the step, x_before = x + a v: both to first order in a.
        inner = norms**2 - rate * along - rate * self.strength[level.name] * d / u * norms**2
        assert self.config.half_space is not None
        gone = there & (inner < self.config.half_space * norms**2) & ~largest(norms, level.k)
        self._shrink(level, 1.0 - gone, optimiser)

    def _shrink(self, level: Level, factors: NDArray[np.float64], optimiser: torch.optim.SGD) -> None:
        _multiply(self.parameters, level, factors)
        buffers = {name: optimiser.state[self.parameters[name]].get("momentum_buffer")
                   for name in (*level.labels, *level.hidden)}
        if all(buffer is not None for buffer in buffers.values()):
            _multiply(buffers, level, (factors > 0).astype(np.float64))

