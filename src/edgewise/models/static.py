"""Roundings at the sites of a torch model: what core/activation.py names, as functions on the modules of transformers.

`install(model, {site: function})` puts a function at each site. It serves three ends: `Rounding` runs a folder's static
activations, an observer gathers their ranges, a learnable module trains them. Attention is computed here, by

    S = round(round(Q) round(K)^T scale);   P = round(softmax(S + mask));   O = P V

with rounding only where a site is installed, so that scores and probabilities can be reached; without sites it is what
transformers computes. Functions take and give tensors of any shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from edgewise.core.activation import StaticActivation
from edgewise.core.errors import UnsupportedError

__all__ = ["Rounding", "install", "layers_of"]

ATTENTION = "edgewise_static"
_SCORES = ("query", "key", "softmax_in", "softmax_out")
Function = Callable[[Tensor], Tensor]


class Rounding(nn.Module):
    """x' = (clamp(round(x / scale) + zero, 0, 2^bits - 1) - zero) scale: StaticActivation.round, to the bit."""

    def __init__(self, activation: StaticActivation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        item = self.activation
        # The scale as a tensor: a Python number would divide in double precision.
        scale = torch.tensor(item.scale, dtype=torch.float32)
        codes = (torch.round(x / scale) + item.zero).clamp(0, 2**item.bits - 1)
        return (codes - item.zero) * scale

    def extra_repr(self) -> str:
        return str(self.activation)


def layers_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of layers of a decoder or an encoder, with its path."""
    stacks = [(name, module) for name, module in model.named_modules()
              if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in ("layers", "layer", "h", "block")]
    outer = [(name, module) for name, module in stacks
             if not any(name.startswith(f"{other}.") for other, _ in stacks)]
    if len(outer) != 1:
        raise UnsupportedError(f"{type(model).__name__} has {len(outer)} stacks of layers; expected one")
    return outer[0]


def install(model: nn.Module, sites: Mapping[str, Function]) -> None:
    """Put a function at each site, in place of any that is there. Raises UnsupportedError for a site it has not."""
    modules = dict(model.named_modules())
    attention = False
    for site, function in sites.items():
        path, _, port = site.rpartition(".")
        module = modules.get(path)
        if module is None:
            raise UnsupportedError(f"site {site!r}: {type(model).__name__} has no module {path!r}")
        if port in ("input", "output"):
            _hook(module, port, function)
        elif port in _SCORES and hasattr(module, "o_proj"):
            _functions(module)[port] = function
            attention = True
        elif port in ("sigmoid", "act") and isinstance(getattr(module, "act_fn", None), nn.Module):
            if not isinstance(module.act_fn, _Activation):
                module.act_fn = _Activation(module.act_fn)
            if port == "sigmoid" and not module.act_fn.silu:
                raise UnsupportedError(f"site {site!r}: the function there is "
                                       f"{type(module.act_fn.function).__name__}, not silu")
            _functions(module.act_fn)[port] = function
        else:
            raise UnsupportedError(f"site {site!r}: no port {port!r} at a {type(module).__name__}; ports are input, "
                                   f"output, {', '.join(_SCORES)}, sigmoid and act")
    if attention:
        model.config._attn_implementation = ATTENTION  # type: ignore[union-attr]


def _functions(module: nn.Module) -> dict[str, Function]:
    """The functions at a module's sites; kept outside of its children, so that its parameters stay its own."""
    if "edgewise_sites" not in module.__dict__:
        module.__dict__["edgewise_sites"] = {}
    found: dict[str, Function] = module.__dict__["edgewise_sites"]
    return found


def _hook(module: nn.Module, port: str, function: Function) -> None:
    functions = _functions(module)
    if port not in functions:
        if port == "input":
            def before(owner: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                return (_functions(owner)["input"](args[0]), *args[1:])

            module.register_forward_pre_hook(before)
        else:
            def after(owner: nn.Module, args: tuple[Any, ...], result: Tensor) -> Tensor:
                return _functions(owner)["output"](result)

            module.register_forward_hook(after)
    functions[port] = function


class _Activation(nn.Module):
    """The function of a gate, rounded inside and after it."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.silu = "silu" in type(function).__name__.lower()

    def forward(self, x: Tensor) -> Tensor:
        sites = _functions(self)
        sigmoid = sites.get("sigmoid")
        made = self.function(x) if sigmoid is None else x * sigmoid(torch.sigmoid(x))
        return sites["act"](made) if "act" in sites else made


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
            scaling: float | None = None, dropout: float = 0.0, **_: Any) -> tuple[Tensor, Tensor]:
    """query: (batch, heads, n, d); key, value: (batch, kv_heads, m, d) -> (batch, n, heads, d), probabilities.

    softmax_in sees the scores before the mask: positions that are not visible are no part of its range, so an observer
    and a rounding are handed only scores, and what is masked away is masked after.
    """
    sites = _functions(module)
    same: Function = _same
    query, key = sites.get("query", same)(query), sites.get("key", same)(key)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * (1 / math.sqrt(query.shape[-1]) if scaling is None else scaling)
    if "softmax_in" in sites:
        if attention_mask is None:
            scores = sites["softmax_in"](scores)
        else:
            visible = (attention_mask > -1).expand_as(scores)
            scores = torch.where(visible, sites["softmax_in"](torch.where(visible, scores, 0.0)), scores)
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = sites.get("softmax_out", same)(probabilities)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities


def _same(x: Tensor) -> Tensor:
    return x


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, eager_mask)
