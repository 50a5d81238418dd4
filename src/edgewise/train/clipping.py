"""Learned weight clipping, fused: the values and gradients of `fake_quant.LearnedClip` in a fraction of its time.

Shao et al., "OmniQuant", arXiv:2308.13137, equation 2, as MobileQuant uses it (Tan et al., arXiv:2408.13933):

    high = sigmoid(u) max W;   low = sigmoid(l) min W;   X = clip(W, low, high)
    s = (max(high, 0) - min(low, 0)) / (2^b - 1);   z = round(-min(low, 0) / s)     (symmetric: s = max|X| / top, z = 0)
    W^ = (clamp(round(X / s) + z, 0, 2^b - 1) - z) s

for each tensor or output channel. Rounding is straight-through: dW^/dX = 1 and dW^/ds = round(X / s) - X / s where no
code is clamped; a gradient to X reaches W inside the clip, and the edge that it was clipped to outside. W may be a
fixed weight under learned factors of its columns and rows, W = V c / r (train/equivalent.py), never made whole.

Training a whole model spends most of its time here: every weight of every layer, every step. Rows are taken in stripes
that stay in a core's second-level cache, so that memory is passed through once and not once for each of thirty steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgewise.core.elements import FP32
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import QuantFormat

__all__ = ["clipped_quantize"]

_STRIPE = 1 << 17
"""Values of a stripe: half a megabyte, and enough for torch to give each of two threads a part."""


def clipped_quantize(weight: Tensor, upper: Tensor, lower: Tensor, fmt: QuantFormat, *, columns: Tensor | None = None,
                     rows: Tensor | None = None) -> Tensor:
    """weight: (out, in); upper, lower: (1, 1) or (out, 1), before the sigmoid -> (out, in), of an int format with
    float32 scales per tensor or channel. columns: (in,), factors of the weight's columns; rows: (out,), divisors of its
    rows, taken after them. Neither may be zero. Gradients reach all that ask for one."""
    if fmt.element.kind != "int" or fmt.granularity.kind == "group" or fmt.scale != FP32 or fmt.zero == "min":
        raise InvalidValueError(f"learned clipping here is of integers per tensor or axis with fp32 scales, symmetric "
                                f"or with an integer zero point; given {fmt}")
    made: Tensor = _Clipped.apply(weight, upper, lower, columns, rows, fmt)  # type: ignore[no-untyped-call]
    return made


def _stripes(weight: Tensor) -> Iterator[slice]:
    count = max(1, _STRIPE // max(weight.shape[1], 1))
    for start in range(0, len(weight), count):
        yield slice(start, start + count)


def _scaled(weight: Tensor, columns: Tensor | None, rows: Tensor | None) -> Tensor:
    """W of some rows: a new tensor, but for a weight without factors."""
    made = weight if columns is None else weight * columns
    return made if rows is None else made / rows[:, None]


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, upper: Tensor, lower: Tensor, columns: Tensor | None, rows: Tensor | None,
                fmt: QuantFormat) -> Tensor:
        tops, bottoms = (weight.new_empty(len(weight), 1) for _ in range(2))
        for part in _stripes(weight):
            scaled = _scaled(weight[part], columns, None if rows is None else rows[part])
            torch.amax(scaled, dim=1, keepdim=True, out=tops[part])
            torch.amin(scaled, dim=1, keepdim=True, out=bottoms[part])
        top, bottom = tops, bottoms
        if fmt.granularity.kind == "tensor":
            top, bottom = tops.amax(dim=0, keepdim=True), bottoms.amin(dim=0, keepdim=True)
        shares = torch.sigmoid(upper), torch.sigmoid(lower)
        high, low = shares[0] * top, shares[1] * bottom
        scale, zero = _scale_and_zero(top, bottom, high, low, fmt)
        first, last = fmt.element.code_range
        made = torch.empty_like(weight)
        for part in _stripes(weight):
            scaled = _scaled(weight[part], columns, None if rows is None else rows[part])
            own = _of(part, high, low, scale, zero)
            codes = torch.div(_clip(scaled, *own[:2]), own[2], out=made[part]).round_().add_(own[3])
            codes.clamp_(first, last).sub_(own[3]).mul_(own[2])
        ctx.save_for_backward(weight, columns, rows, scale, zero, high, low, tops, bottoms, top, bottom, *shares)
        ctx.fmt = fmt
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, columns, rows, scale, zero, high, low, tops, bottoms, top, bottom, upper, lower = ctx.saved_tensors
        fmt: QuantFormat = ctx.fmt
        to_weight, to_columns, to_rows = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        inner = _Inner(weight, columns, rows, to_weight=to_weight, to_columns=to_columns, to_rows=to_rows)
        to_high, to_low, to_scale = (torch.zeros_like(tops) for _ in range(3))
        first, last = fmt.element.code_range
        for part in _stripes(weight):
            scaled = _scaled(weight[part], columns, None if rows is None else rows[part])
            gradient = gradients[0][part]
            own_high, own_low, own_scale, own_zero = _of(part, high, low, scale, zero)
            ratio = _clip(scaled, own_high, own_low).div_(own_scale)
            rounded = ratio.round()
            clamped = (rounded > last - own_zero) | (rounded < first - own_zero)
            torch.sum(rounded.sub_(ratio).masked_fill_(clamped, 0).mul_(gradient), dim=1, keepdim=True,
                      out=to_scale[part])
            through = gradient.masked_fill(clamped, 0)
            above, below = scaled > own_high, scaled < own_low
            torch.sum(through * above, dim=1, keepdim=True, out=to_high[part])
            torch.sum(through * below, dim=1, keepdim=True, out=to_low[part])
            if clamped.any():
                held = gradient.masked_fill(~clamped, 0)
                codes = torch.where(ratio > 0, float(last), float(first)) - own_zero
                if fmt.zero == "int":
                    codes = codes - own_low.clamp(max=0) / own_scale
                    to_low[part] += held.sum(dim=1, keepdim=True) * (own_low < 0)
                to_scale[part] += (held * codes).sum(dim=1, keepdim=True)
            if inner.wanted:
                inner.add(part, through.masked_fill_(above.logical_or_(below), 0), scaled)
        if fmt.granularity.kind == "tensor":
            to_high, to_low, to_scale = (part.sum(dim=0, keepdim=True) for part in (to_high, to_low, to_scale))
        if fmt.zero == "int":
            to_high = to_high + to_scale / (last - first) * (high > 0)
            to_low = to_low - to_scale / (last - first) * (low < 0)
        else:
            wins = high.abs() >= low.abs()
            to_high = to_high + torch.where(wins, to_scale, 0) / _limit(fmt)
            to_low = to_low - torch.where(wins, 0, to_scale) / _limit(fmt)
        if inner.wanted:
            inner.add_extremes(tops, top, to_high * upper)
            inner.add_extremes(bottoms, bottom, to_low * lower)
        return (inner.weight_gradient, to_high * top * upper * (1 - upper), to_low * bottom * lower * (1 - lower),
                inner.columns_gradient, inner.rows_gradient, None)


class _Inner:
    """Gradients of the weight and of the factors of its columns and rows, from those of W = weight columns / rows."""

    def __init__(self, weight: Tensor, columns: Tensor | None, rows: Tensor | None, *, to_weight: bool,
                 to_columns: bool, to_rows: bool) -> None:
        self._weight, self._columns, self._rows = weight, columns, rows
        self.wanted = to_weight or to_columns or to_rows
        self.weight_gradient = torch.zeros_like(weight) if to_weight else None
        self.columns_gradient = weight.new_zeros(weight.shape[1]) if to_columns else None
        self.rows_gradient = weight.new_zeros(len(weight)) if to_rows else None

    def add(self, part: slice, gradient: Tensor, scaled: Tensor) -> None:
        """gradient: of `scaled`, W of the rows `part`."""
        if self.weight_gradient is not None:
            self.weight_gradient[part] = _scaled(gradient, self._columns,
                                                 None if self._rows is None else self._rows[part])
        if self.columns_gradient is None and self.rows_gradient is None:
            return
        product = gradient * scaled
        if self.columns_gradient is not None:
            self.columns_gradient += product.sum(dim=0) / self._columns
        if self.rows_gradient is not None:
            self.rows_gradient[part] -= product.sum(dim=1) / self._rows[part]  # type: ignore[index]

    def add_extremes(self, of_rows: Tensor, extreme: Tensor, gradient: Tensor) -> None:
        """gradient: of `extreme`, (1, 1) or (out, 1), the largest or least of `of_rows`: shared by all that hold it."""
        found: list[tuple[Tensor, Tensor]] = []
        holding = (of_rows == extreme).squeeze(1).nonzero().squeeze(1)
        for index in holding.split(max(1, _STRIPE // max(self._weight.shape[1], 1))):
            scaled = _scaled(self._weight[index], self._columns, None if self._rows is None else self._rows[index])
            row, column = (scaled == of_rows[index]).nonzero(as_tuple=True)
            found.append((index[row], column))
        row, column = (torch.cat(parts) for parts in zip(*found, strict=True))
        whole = len(extreme) == 1
        count = torch.full((1,), len(row)) if whole else torch.bincount(row, minlength=len(extreme))
        each = gradient.squeeze(1) / count
        share = each.expand(len(row)) if whole else each[row]
        if self.weight_gradient is not None:
            factor = torch.ones_like(share) if self._columns is None else self._columns[column]
            self.weight_gradient[row, column] += share * (factor if self._rows is None else factor / self._rows[row])
        if self.columns_gradient is not None:
            self.columns_gradient.index_add_(0, column, share * of_rows[row, 0] / self._columns[column])  # type: ignore
        if self.rows_gradient is not None:
            self.rows_gradient.index_add_(0, row, -share * of_rows[row, 0] / self._rows[row])  # type: ignore[index]


def _of(part: slice, *values: Tensor) -> tuple[Tensor, ...]:
    """Of some rows, (1, 1) or (rows, 1)."""
    return tuple(value if len(value) == 1 else value[part] for value in values)


def _clip(scaled: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """A copy inside the clip; weights all of one sign keep their extreme next to zero."""
    return torch.clamp(scaled, low, high)


def _limit(fmt: QuantFormat) -> float:
    return float(np.float32(fmt.peak or fmt.element.max_value or 1.0))


def _scale_and_zero(top: Tensor, bottom: Tensor, high: Tensor, low: Tensor, fmt: QuantFormat
                    ) -> tuple[Tensor, Tensor]:
    """Of the clipped weights, whose extremes are the edges, or their own where those lie beyond them."""
    low, high = torch.maximum(low, bottom), torch.minimum(high, top)
    first, last = fmt.element.code_range
    if fmt.zero == "int":
        scale = (high.clamp(min=0) - low.clamp(max=0)) / float(last - first)
        scale = torch.where(scale > 0, scale, 1.0)
        return scale, torch.round(-low.clamp(max=0) / scale).clamp(first, last)
    scale = torch.maximum(high.abs(), low.abs()) / _limit(fmt)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, torch.zeros_like(scale)
