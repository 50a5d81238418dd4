"""Training a classifier of pictures, and what it got right: the same for every pruning method that is compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from edgewise.core.errors import InvalidValueError

__all__ = ["Epochs", "learn", "predictions", "scores"]

AfterStep = Callable[[int, float, torch.optim.SGD], None]


@dataclass(frozen=True)
class Epochs:
    """SGD with momentum on the cross-entropy. schedule: how the learning rate falls over all epochs.

    distilled: share of the loss that is the divergence from a teacher's odds, where one is given.
    """

    epochs: int = 10
    batch: int = 64
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["constant", "cosine", "steps"] = "cosine"
    distilled: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch < 2 or not self.learning_rate > 0 or not 0 <= self.distilled <= 1:
            raise InvalidValueError(f"no negative epochs, batches of 2 or more, a positive learning rate, a share "
                                    f"from 0 to 1; given {self}")

    def rate(self, done: float) -> float:
        """The learning rate after this share of all steps. steps: a tenth after a third and after two thirds."""
        if self.schedule == "cosine":
            return self.learning_rate * (0.5 + 0.5 * math.cos(math.pi * done))
        return self.learning_rate * (0.1 ** int(3 * done) if self.schedule == "steps" else 1.0)


def learn(model: nn.Module, pictures: Tensor, kinds: Tensor, config: Epochs, *, after_step: AfterStep | None = None,
          teacher: nn.Module | None = None) -> float:
    """Train in place; the mean loss of the last epoch. Left in evaluation.

    pictures: (n, channels, height, width), or (n, height, width) for a model that reads rows as tokens; kinds: (n,).
    after_step(step, learning rate, optimiser) runs after each.
    """
    # Convolutions of few channels are a quarter to a third faster with channels last, the same to rounding.
    if pictures.ndim == 4:
        model.to(memory_format=torch.channels_last)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=config.momentum,
                                weight_decay=config.weight_decay, fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    # What is left of a last batch of one picture has no variance to normalise by.
    starts = [start for start in range(0, len(pictures), config.batch) if len(pictures) - start > 1]
    step, loss_of = 0, math.nan
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model.train()
        for _ in range(config.epochs):
            order, losses = torch.randperm(len(pictures), generator=generator), []
            for start in starts:
                rate = config.rate(step / (config.epochs * len(starts)))
                for group in optimiser.param_groups:
                    group["lr"] = rate
                part = order[start:start + config.batch]
                found = model(pictures[part])
                loss = functional.cross_entropy(found, kinds[part])
                if teacher is not None and config.distilled:
                    with torch.no_grad():
                        wanted = torch.log_softmax(teacher(pictures[part]), dim=1)
                    apart = functional.kl_div(torch.log_softmax(found, dim=1), wanted, log_target=True,
                                              reduction="batchmean")
                    loss = (1 - config.distilled) * loss + config.distilled * apart
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                step += 1
                losses.append(loss.item())
                if after_step is not None:
                    after_step(step, rate, optimiser)
            loss_of = float(np.mean(losses))
    model.to(memory_format=torch.contiguous_format)
    model.eval()
    return loss_of


def predictions(model: nn.Module, pictures: Tensor, batch: int = 256) -> NDArray[np.int64]:
    """The likeliest kind of each picture, (n,)."""
    model.eval()
    with torch.no_grad():
        return np.concatenate([model(pictures[start:start + batch]).argmax(dim=1).numpy()
                               for start in range(0, len(pictures), batch)])


def scores(found: NDArray[np.int64], kinds: NDArray[np.int64], count: int) -> dict[str, float]:
    """accuracy, and over all `count` kinds the means of recall and F1; a kind never found and not there counts 0."""
    table = np.zeros((count, count))
    np.add.at(table, (kinds, found), 1)
    hits = np.diag(table)
    recall = hits / np.maximum(table.sum(axis=1), 1)
    f1 = 2 * hits / np.maximum(table.sum(axis=1) + table.sum(axis=0), 1)
    return {"accuracy": float(hits.sum() / len(kinds)), "recall": float(recall.mean()), "f1": float(f1.mean())}
