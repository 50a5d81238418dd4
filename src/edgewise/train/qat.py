"""Quantisation-aware training in three phases, with a number format per layer: XR-NPE.

Kumari, Lokhande et al., "XR-NPE: High-Throughput Mixed-precision SIMD Neural Processing Engine for Extended Reality
Perception Workloads", 2025, arXiv:2508.13049, and its repository (the three phases, their rates, the moving ranges).

A layer computes f(Q(x), Q(w)) with Q(v) = s snap(v / s), straight-through. Weights: s = max|w| / M per output channel.
Inputs: s = m / M per tensor, m a running mean of max|x|. M is the value of the format that the largest magnitude is
scaled to: its maximum, or a smaller power of two where that leaves less squared error (posits are dense around one).
Phases: float; weights quantised; weights and inputs quantised, with the statistics of batch norms held.

Differs from the paper: its straight-through estimator is applied to what is already quantised, so that no gradient
reaches its weights; here it surrounds the rounding. Weights take the maximum of the weights at hand, not a moving one.
M is searched for, once, on the first batch. `broken_gradient` is the paper's code, for an ablation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgewise.core.elements import FP32, NumberFormat
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import Granularity, QuantFormat, best_peak
from edgewise.train.fake_quant import EmaRange, fake_quantize

__all__ = ["PAPER_PHASES", "Phase", "Qat", "QuantizedLayer", "calibrate", "prepare", "quantisable", "stored_bits",
           "train_phases", "weight_format"]

Batch = tuple[Any, ...]
Loss = Callable[[nn.Module, Batch], Tensor]
Progress = Callable[[str, int, int], None]
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Phase:
    """epochs over the batches at a learning rate that falls to zero along a cosine; what is quantised meanwhile."""

    name: str
    epochs: int
    rate: float
    weights: bool = False
    inputs: bool = False


PAPER_PHASES = (Phase("float", 120, 2e-3), Phase("weights", 20, 2e-4, weights=True),
                Phase("weights and inputs", 80, 1e-4, weights=True, inputs=True))
"""Epochs and ratios of rates (1, 1/10, 1/20) of the repository's ResNet-18 on CIFAR-10; the first rate is for AdamW."""


@dataclass(frozen=True)
class Qat:
    """What the phases share; of the repository's UL-VIO (clip) and ResNet-18 (decay)."""

    clip: float = 1.0            # of the gradient's norm
    weight_decay: float = 5e-4


def weight_format(layer: nn.Module, element: NumberFormat) -> QuantFormat:
    """The element with one scale per output channel, and the peak that suits the weight."""
    weight = layer.weight.detach().flatten(1).numpy()
    return _peaked(weight.tobytes(), weight.shape, element)


@lru_cache(maxsize=512)
def _peaked(weight: bytes, shape: tuple[int, int], element: NumberFormat) -> QuantFormat:
    """The search of a weight as it is: one network is prepared in many ways."""
    fmt = QuantFormat(element, Granularity("axis"), FP32)
    return fmt if element.kind == "int" else best_peak(np.frombuffer(weight, np.float32).reshape(shape), fmt)


class QuantizedLayer(nn.Module):
    """A Linear or a convolution whose weight and input are rounded to a format on the way in."""

    def __init__(self, layer: nn.Module, element: NumberFormat, decay: float = 0.99) -> None:
        super().__init__()
        self.layer, self.element = layer, element
        self.fmt = weight_format(layer, element)
        self.inputs = EmaRange(element, decay)
        self.quantize_weights = self.quantize_inputs = True
        self.broken_gradient = False
        self.seen = False

    def weight(self) -> Tensor:
        """The weight as the layer multiplies it."""
        weight: Tensor = self.layer.weight
        if not self.quantize_weights:
            return weight
        rounded = fake_quantize(weight.flatten(1), self.fmt).reshape(weight.shape)
        return rounded.detach() if self.broken_gradient else rounded

    def forward(self, x: Tensor) -> Tensor:
        if not self.seen:
            self._choose_peak(x)
        if self.quantize_inputs:
            x = self.inputs(x)
        elif self.training and not self.inputs.frozen:
            self.inputs.observe(x)
        weight = self.weight()
        layer: Any = self.layer
        if isinstance(layer, nn.Linear):
            return nn.functional.linear(x, weight, layer.bias)
        return layer._conv_forward(x, weight, layer.bias)

    @torch.no_grad()
    def _choose_peak(self, x: Tensor) -> None:
        """M of the inputs, from the largest and 2,048 other values of the first tensor seen."""
        flat = x.detach().flatten()
        peak = flat.abs().max()
        if self.element.kind != "int" and bool(peak > 0):
            drawn = torch.randint(len(flat), (2048,), generator=torch.Generator().manual_seed(0))
            some = torch.cat([flat[drawn], peak[None]])
            found = best_peak(some[None].float().numpy(), QuantFormat(self.element, Granularity("tensor"), FP32))
            self.inputs.limit = found.peak or self.element.max_value
        self.seen = True


def quantisable(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and convolution by name, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _KINDS)}


def prepare(model: nn.Module, elements: Mapping[str, NumberFormat | None], *, decay: float = 0.99) -> nn.Module:
    """A copy of the model whose named layers are rounded to their formats; None leaves a layer as it is.

    Nothing is known of the inputs' ranges yet: `calibrate`, or train.
    """
    made = copy.deepcopy(model)
    known = quantisable(made)
    unknown = set(elements) - set(known)
    if unknown:
        raise InvalidValueError(f"no layer {sorted(unknown)[0]!r} to quantise; there are {', '.join(known)}")
    for name, layer in known.items():
        element = elements.get(name)
        if element is not None:
            parent, _, last = name.rpartition(".")
            setattr(made.get_submodule(parent), last, QuantizedLayer(layer, element, decay))
    return made


def _layers(model: nn.Module) -> Iterator[QuantizedLayer]:
    return (module for module in model.modules() if isinstance(module, QuantizedLayer))


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Sequence[Tensor]]) -> None:
    """Let every layer see its inputs, unrounded, and hold the ranges found: post-training quantisation."""
    for layer in _layers(model):
        layer.quantize_inputs = False
    model.eval()
    for batch in batches:
        for layer in _layers(model):
            layer.inputs.train()
            layer.training = True
        model(*batch)
    for layer in _layers(model):
        layer.quantize_inputs, layer.inputs.frozen = True, True
    model.eval()


def stored_bits(model: nn.Module) -> float:
    """Bits per weight of the layers, codes alone, by number of weights. Layers left as they are count 32."""
    bits = {id(layer.layer): layer.element.bits for layer in _layers(model)}
    sizes = [(bits.get(id(layer), 32), layer.weight.numel()) for layer in quantisable(model).values()]
    return sum(each * count for each, count in sizes) / sum(count for _, count in sizes)


def train_phases(model: nn.Module, batches: Callable[[np.random.Generator], Iterable[Batch]], loss: Loss,
                 phases: Sequence[Phase], *, config: Qat | None = None, seed: int = 0,
                 progress: Progress | None = None) -> list[float]:
    """Train in place through the phases and return the mean loss of every epoch.

    batches: the batches of an epoch, in an order drawn from the generator. loss(model, batch) -> a number.
    """
    config = config or Qat()
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    history: list[float] = []
    total = sum(phase.epochs for phase in phases)
    for phase in phases:
        for layer in _layers(model):
            layer.quantize_weights, layer.quantize_inputs = phase.weights, phase.inputs
            layer.inputs.frozen = False
        optimiser = torch.optim.AdamW(model.parameters(), lr=phase.rate, weight_decay=config.weight_decay)
        for epoch in range(phase.epochs):
            optimiser.param_groups[0]["lr"] = phase.rate * (1 + np.cos(np.pi * epoch / phase.epochs)) / 2
            model.train()
            if phase.inputs:  # statistics are held
                for module in model.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.eval()
            losses = []
            for batch in batches(rng):
                optimiser.zero_grad(set_to_none=True)
                value = loss(model, batch)
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), config.clip)
                optimiser.step()
                losses.append(float(value.detach()))
            history.append(float(np.mean(losses)))
            if progress:
                progress(phase.name, len(history), total)
    for layer in _layers(model):
        layer.inputs.frozen = True
    model.eval()
    return history
