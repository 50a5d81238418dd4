"""Linears of which a decoded token reads only some inputs, in torch.

    y = W (m x) + L R ((1 - m) x),   m = 1 where |x| > threshold

A pass of one token decodes; longer ones are prompts, and dense, as in the engine. `decode_all` makes every token one
that is decoded, for measuring.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgewise.core.errors import FormatError
from edgewise.core.storage import InputSparse

__all__ = ["decode_all", "decode_sparsely"]


class _Chosen:
    """A pre-hook and a hook of a linear: what is left of its input goes past it, through the low rank."""

    def __init__(self, stored: InputSparse, dtype: torch.dtype) -> None:
        self.threshold = torch.from_numpy(stored.threshold.copy())
        self.low_rank = None if stored.low_rank is None else tuple(
            torch.from_numpy(np.array(part.dense(), np.float32)).to(dtype)
            for part in (stored.low_rank.left, stored.low_rank.right))
        self.all = False
        self.read = self.seen = 0
        self._rest: Tensor | None = None

    def before(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        self._rest = None
        if not self.all and x.shape[-2] != 1:
            return args
        mask = x.abs() > self.threshold
        self.read, self.seen = self.read + int(mask.sum()), self.seen + mask.numel()
        self._rest = torch.where(mask, torch.zeros_like(x), x)
        return (torch.where(mask, x, torch.zeros_like(x)), *args[1:])

    def after(self, _: nn.Module, args: tuple[Any, ...], result: Tensor) -> Tensor:
        rest, self._rest = self._rest, None
        if rest is None or self.low_rank is None:
            return result
        left, right = self.low_rank
        return result + (rest @ right.T) @ left.T


def decode_sparsely(model: nn.Module, weights: Mapping[str, InputSparse]) -> None:
    """Let linears decode with thresholds. weights: by the name of the weight."""
    modules = dict(model.named_modules())
    for name, stored in weights.items():
        path = name.removesuffix(".weight")
        module = next((modules[form] for form in (path, path.removeprefix("model."), f"model.{path}")
                       if form in modules), None)
        if not isinstance(module, nn.Linear):
            raise FormatError("thresholds belong to a linear, and the module has none of this name", tensor=name)
        chosen = _Chosen(stored, module.weight.dtype)
        module.__dict__["edgewise_chosen"] = chosen
        module.register_forward_pre_hook(chosen.before)
        module.register_forward_hook(chosen.after)


@contextmanager
def decode_all(model: nn.Module) -> Iterator[None]:
    """Every token of a pass is decoded, whatever its length."""
    found = [module.__dict__["edgewise_chosen"] for module in model.modules() if "edgewise_chosen" in module.__dict__]
    for chosen in found:
        chosen.all = True
    try:
        yield
    finally:
        for chosen in found:
            chosen.all = False
