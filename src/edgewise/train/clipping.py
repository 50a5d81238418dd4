"""Learned weight clipping, fused: the values and gradients of `fake_quant.LearnedClip` in a fraction of its time.

Shao et al., "OmniQuant", arXiv:2308.13137, equation 2, as MobileQuant uses it (Tan et al., arXiv:2408.13933):

    high = sigmoid(u) max W;   low = sigmoid(l) min W;   X = clip(W, low, high)
    s = (max(high, 0) - min(low, 0)) / (2^b - 1);   z = round(-min(low, 0) / s)     (symmetric: s = max|X| / top, z = 0)
    W^ = (clamp(round(X / s) + z, 0, 2^b - 1) - z) s

for each tensor or output channel. Rounding is straight-through: dW^/dX = 1 and dW^/ds = round(X / s) - X / s where no
code is clamped; a gradient to X reaches W inside the clip, and the edge that it was clipped to outside.

Training a whole model spends most of its time here: every weight of every layer, every step. This computes in place
what autograd would keep a dozen copies for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgewise.core.elements import FP32
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import QuantFormat

__all__ = ["clipped_quantize"]


def clipped_quantize(weight: Tensor, upper: Tensor, lower: Tensor, fmt: QuantFormat) -> Tensor:
    """weight: (out, in); upper, lower: (1, 1) or (out, 1), before the sigmoid -> (out, in), of an int format with
    float32 scales per tensor or channel."""
    if fmt.element.kind != "int" or fmt.granularity.kind == "group" or fmt.scale != FP32 or fmt.zero == "min":
        raise InvalidValueError(f"learned clipping here is of integers per tensor or axis with fp32 scales, symmetric "
                                f"or with an integer zero point; given {fmt}")
    made: Tensor = _Clipped.apply(weight, upper, lower, fmt)  # type: ignore[no-untyped-call]
    return made


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, upper: Tensor, lower: Tensor, fmt: QuantFormat) -> Tensor:
        flat = weight.reshape(1, -1) if fmt.granularity.kind == "tensor" else weight
        top, bottom = flat.amax(dim=1, keepdim=True), flat.amin(dim=1, keepdim=True)
        shares = torch.sigmoid(upper), torch.sigmoid(lower)
        edges = shares[0] * top, shares[1] * bottom
        scale, zero = _scale_and_zero(flat, *edges, fmt)
        first, last = fmt.element.code_range
        codes = _clip(flat, *edges).div_(scale).round_().add_(zero).clamp_(first, last)
        ctx.save_for_backward(weight, scale, zero, *edges, top, bottom, *shares)
        ctx.fmt = fmt
        return codes.sub_(zero).mul_(scale).reshape(weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        weight, scale, zero, high, low, top, bottom, upper, lower = ctx.saved_tensors
        fmt: QuantFormat = ctx.fmt
        flat = weight.reshape(1, -1) if fmt.granularity.kind == "tensor" else weight
        gradient = gradients[0].reshape(flat.shape)
        first, last = fmt.element.code_range
        ratio = _clip(flat, high, low).div_(scale)
        rounded = ratio.round()
        clamped = (rounded > last - zero) | (rounded < first - zero)
        to_scale = (rounded.sub_(ratio)).masked_fill_(clamped, 0).mul_(gradient).sum(dim=1, keepdim=True)
        through = gradient.masked_fill(clamped, 0)
        to_high = through.masked_fill(flat <= high, 0).sum(dim=1, keepdim=True)
        to_low = through.masked_fill(flat >= low, 0).sum(dim=1, keepdim=True)
        if clamped.any():
            held = gradient.masked_fill(~clamped, 0)
            codes = torch.where(ratio > 0, float(last), float(first)) - zero
            if fmt.zero == "int":
                codes = codes - low.clamp(max=0) / scale
                to_low = to_low + held.sum(dim=1, keepdim=True) * (low < 0)
            to_scale = to_scale + (held * codes).sum(dim=1, keepdim=True)
        if fmt.zero == "int":
            to_high = to_high + to_scale / (last - first) * (high > 0)
            to_low = to_low - to_scale / (last - first) * (low < 0)
        else:
            wins = high.abs() >= low.abs()
            to_high = to_high + torch.where(wins, to_scale, 0) / _limit(fmt)
            to_low = to_low - torch.where(wins, 0, to_scale) / _limit(fmt)
        result = None
        if ctx.needs_input_grad[0]:
            result = through.masked_fill((flat > high) | (flat < low), 0)
            for extreme, share in ((top, to_high * upper), (bottom, to_low * lower)):
                hit = flat == extreme
                result += hit * (share / hit.sum(dim=1, keepdim=True))
            result = result.reshape(weight.shape)
        return (result, to_high * top * upper * (1 - upper), to_low * bottom * lower * (1 - lower), None)


def _clip(flat: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """A copy inside the clip; weights all of one sign keep their extreme next to zero."""
    return torch.minimum(flat, high).clamp_(min=low) if bool((low <= high).all()) else torch.minimum(
        torch.maximum(flat, low), high)


def _limit(fmt: QuantFormat) -> float:
    return float(np.float32(fmt.peak or fmt.element.max_value or 1.0))


def _scale_and_zero(flat: Tensor, high: Tensor, low: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor]:
    """Of the clipped weights, whose extremes are the edges, or their own where those lie beyond them."""
    low, high = torch.maximum(low, flat.amin(dim=1, keepdim=True)), torch.minimum(high, flat.amax(dim=1, keepdim=True))
    first, last = fmt.element.code_range
    if fmt.zero == "int":
        scale = (high.clamp(min=0) - low.clamp(max=0)) / float(last - first)
        scale = torch.where(scale > 0, scale, 1.0)
        return scale, torch.round(-low.clamp(max=0) / scale).clamp(first, last)
    scale = torch.maximum(high.abs(), low.abs()) / _limit(fmt)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, torch.zeros_like(scale)
