"""The torch twin of the core's numbers: the same values to the bit, with straight-through gradients.

`fake_quantize(x, fmt)` returns what `core.quantize` followed by `core.dequantize` returns. Around it, the quantisers
that learn their range:

    LearnedClip   max' = sigmoid(u) max(W), min' = sigmoid(l) min(W)     OmniQuant, Shao et al., arXiv:2308.13137
    Lsq           w^ = round(clamp(w / a, Qn, Qp)) a                     Esser et al., arXiv:1902.08153
    LsqPlus       x^ = (round(clamp(x / a + z, Qn, Qp)) - z) a           Bhalgat et al., arXiv:2004.09576
    StaticAffine  x^ = (clamp(round(x / s) + o, 0, 2^b - 1) - o) s       MobileQuant, Tan et al., arXiv:2408.13933
    EmaRange      s = running mean of max|x|, over the element's peak    XR-NPE, arXiv:2508.13049

round is straight-through: its gradient is one. Bengio et al., arXiv:1308.3432.

Differs from the papers: z and o are rounded to the integers that a device stores, straight-through. The zero point
of LearnedClip comes from a range that holds zero. A step that training drives to zero or below acts as 1e-8.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgewise.core.activation import StaticActivation
from edgewise.core.elements import BF16, E8M0, FP16, FP32, NumberFormat, float32_table, int_format, rounding_table
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import Granularity, QuantFormat

__all__ = ["EmaRange", "LearnedClip", "Lsq", "LsqPlus", "StaticAffine", "fake_quantize", "per_token", "round_ste",
           "scale_gradient", "snap", "static_affine", "straight_through"]

_SMALLEST_STEP = 1e-8


class _Straight(torch.autograd.Function):
    """Gives `value`; its gradient goes to `x` where `keep` holds, everywhere if that is None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
        ctx.keep = keep
        return value.clone() if value is x else value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient, = gradients
        return (gradient if ctx.keep is None else gradient * ctx.keep), None, None


def straight_through(x: Tensor, value: Tensor, keep: Tensor | None = None) -> Tensor:
    """`value`, exactly; its gradient goes to x, where `keep` holds."""
    passed: Tensor = _Straight.apply(x, value, keep)
    return passed


def round_ste(x: Tensor) -> Tensor:
    """The nearest integer, ties to even; gradient one."""
    rounded: Tensor = _Straight.apply(x, x.detach().round(), None)
    return rounded


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself; its gradient times `factor`. LSQ, section 2.2."""
    scaled: Tensor = _ScaleGradient.apply(x, factor)
    return scaled


@lru_cache(maxsize=64)
def _tables(element: NumberFormat, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Boundaries and values of a format in float32 or float64."""
    table = rounding_table(element)
    boundaries, values = float32_table(element) if dtype == torch.float32 else (table.boundaries, table.values)
    # Copies: the core's tables are shared, and torch warns of arrays it may not write to.
    return (torch.tensor(np.array(boundaries), dtype=dtype, device=device),
            torch.tensor(np.array(values), dtype=dtype, device=device))


def _nearest(x: Tensor, element: NumberFormat) -> Tensor:
    """Each value rounded to one of `element`, saturating; no gradient. float32 or float64."""
    if element == FP32:
        return x.to(torch.float32).to(x.dtype)
    if element == FP16:
        return x.clamp(-65504.0, 65504.0).to(torch.float16).to(x.dtype)
    if element == BF16:
        return x.clamp(-element.max_value, element.max_value).to(torch.bfloat16).to(x.dtype) + 0.0
    if element.kind == "int":
        low, high = element.code_range
        return x.round().clamp(low, high) + 0.0  # an integer has no -0
    boundaries, values = _tables(element, x.dtype, x.device)
    return values[torch.bucketize(x.contiguous(), boundaries)]


@lru_cache(maxsize=64)
def _bounds(element: NumberFormat) -> tuple[float, float]:
    """The range in which an element passes gradients: half a step beyond its ends, where rounding a scale to its own
    format can push the largest value of a group."""
    if element.kind == "int":
        low, high = element.code_range
        return low - 0.5, high + 0.5
    if element.bits > 16:
        return -element.max_value, element.max_value
    values = rounding_table(element).values
    return float(values[0] - (values[1] - values[0]) / 2), float(values[-1] + (values[-1] - values[-2]) / 2)


def snap(x: Tensor, element: NumberFormat) -> Tensor:
    """The nearest value of `element` (core's round_to); gradient one inside its range, zero outside."""
    work = x if x.dtype == torch.float64 else x.float()
    low, high = _bounds(element)
    exact = work.detach()
    snapped: Tensor = _Straight.apply(work, _nearest(exact, element), (exact >= low) & (exact <= high))
    return snapped.to(x.dtype)


# ---- the twin -----------------------------------------------------------------------------------------------------

def _grouped(x: Tensor, granularity: Granularity) -> Tensor:
    """(rows, in) -> (rows, groups, size), the last group padded by repeating its last value."""
    rows, inputs = x.shape
    if granularity.kind == "tensor":
        return x.reshape(1, 1, rows * inputs)
    size = granularity.group if granularity.kind == "group" else inputs
    pad = -inputs % size
    if pad:
        x = torch.cat([x, x[:, -1:].expand(rows, pad)], dim=1)
    return x.reshape(rows, -1, size)


def _held(raw: Tensor, number: NumberFormat) -> Tensor:
    """A scale as it is stored, one where that would be zero; gradient one where it is not."""
    exact = raw.detach()
    if number == E8M0:
        share, exponent = torch.frexp(exact)
        exponent = torch.where(exact > 0, exponent - (share == 0.5).to(exponent.dtype), 0).clamp(-127, 127)
        # In two factors, neither below the normal range: torch.ldexp makes its factor a float32 first.
        half = torch.div(exponent, 2, rounding_mode="floor")
        scale = torch.ldexp(torch.ldexp(torch.ones_like(exact), half), exponent - half)
    else:
        scale = _nearest(exact, number)
    keep = scale > 0
    held: Tensor = _Straight.apply(raw, torch.where(keep, scale, torch.ones_like(scale)), keep & (exact > 0))
    return held


def fake_quantize(x: Tensor, fmt: QuantFormat, *, bits: int | None = None, through_scale: bool = False) -> Tensor:
    """Quantised under `fmt` and back: bit for bit what core.quantize and core.dequantize make of float32.

    x: (..., in); the leading axes are rows, as (out,) of a weight or the tokens of an activation, so "axis" gives each
    token its own dynamic range. Flatten a convolution's weight to (out, rest) first. Computed in float32 (float64 for
    float64) and returned in the type of x. A scale above the largest of its format saturates; empty tensors pass; NaN
    and infinity are not looked for, they spread.
    bits: read only that many of the highest bits of the codes, as core.nested_prefix does.
    Gradient to x: one where the value is inside the range of the element, zero where it was clipped; the scale counts
    as a constant. through_scale: differentiate scale and zero point too, through the extremes they come from.
    """
    if isinstance(fmt.scale, QuantFormat):
        raise InvalidValueError(f"fake_quantize takes plain scales; {fmt} has scales that are themselves quantised")
    if x.ndim == 0 or x.numel() == 0:
        if x.ndim and x.numel() == 0:
            return x
        raise InvalidValueError("fake_quantize expects a tensor (..., in); given a single number")
    work = x if x.dtype == torch.float64 else x.float()
    grouped = _grouped(work.reshape(-1, x.shape[-1]), fmt.granularity)
    ranged = grouped if through_scale else grouped.detach()
    element = fmt.element
    if fmt.zero == "none":
        limit = np.float32(fmt.peak or element.max_value or 1.0)
        scale = _held(ranged.abs().amax(dim=-1, keepdim=True) / float(limit), fmt.scale)
        codes = snap(grouped / scale, element)
        values = (codes if bits is None else _prefix(codes, element, bits)) * scale
    else:
        levels = float(2**element.bits - 1)
        low, high = ranged.amin(dim=-1, keepdim=True), ranged.amax(dim=-1, keepdim=True)
        if fmt.zero == "int":
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _held((high - low) / levels, fmt.scale)
        if fmt.zero == "int":
            zero = round_ste(-low / scale).clamp(0, levels)
            codes = (round_ste(grouped / scale) + zero).clamp(0, levels)
            values = ((codes if bits is None else _prefix(codes, element, bits)) - zero) * scale
        else:
            minimum = snap(low, fmt.scale)
            codes = round_ste((grouped - minimum) / scale).clamp(0, levels)
            values = (codes if bits is None else _prefix(codes, element, bits)) * scale + minimum
    if fmt.granularity.kind != "tensor":
        values = values.reshape(len(values), -1)[:, :x.shape[-1]]
    return values.reshape(x.shape).to(x.dtype)


def _prefix(codes: Tensor, element: NumberFormat, bits: int) -> Tensor:
    """core.nested_prefix with its rule "rounded"; gradient one."""
    if element.kind != "int" or element.restricted or not 1 <= bits <= element.bits:
        raise InvalidValueError(f"a bit prefix of 1 to {element.bits} bits is read from a plain integer; given {bits} "
                                f"of {element.name}")
    drop = element.bits - bits
    if drop == 0:
        return codes
    highest = 2 ** (bits - 1) - 1 if element.signed else 2**bits - 1
    step = float(2**drop)
    exact = codes.detach()
    kept: Tensor = _Straight.apply(codes, (exact / step + 0.5).floor().clamp(max=highest) * step, None)
    return kept


def per_token(x: Tensor, bits: int, *, symmetric: bool = False) -> Tensor:
    """A dynamic range for each token, in float32. x: (..., features). Asymmetric ranges hold zero (ZeroQAT, AccLLM)."""
    return fake_quantize(x, QuantFormat(int_format(bits, signed=symmetric), Granularity("axis"), FP32,
                                        "none" if symmetric else "int"))


class _Affine(torch.autograd.Function):
    """static_affine with two passes of memory where autograd would keep and read a dozen copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.range = low, high
        offset = zero.round()
        return (x / scale).round_().add_(offset).clamp_(low, high).sub_(offset).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, scale, zero), gradient = ctx.saved_tensors, gradients[0]
        offset, (low, high) = zero.round(), ctx.range
        ratio = x / scale
        free = ratio.round().add_(offset)
        codes = free.clamp(low, high)
        inside = codes == free
        made: list[Tensor | None] = [gradient * inside if ctx.needs_input_grad[0] else None, None, None]
        if ctx.needs_input_grad[1]:
            made[1] = codes.sub_(offset).sub_(ratio.mul_(inside)).mul_(gradient).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            made[2] = -(gradient * scale).masked_fill_(inside, 0).sum_to_size(zero.shape)
        return (*made, None, None)


def static_affine(x: Tensor, scale: Tensor, zero: Tensor, low: float, high: float) -> Tensor:
    """(clamp(round(x / scale) + round(zero), low, high) - round(zero)) * scale, differentiable in x, scale and zero.

    x: any shape; scale, zero: broadcast to it. low, high: the codes.
    """
    made: Tensor = _Affine.apply(x, scale, zero, low, high)  # type: ignore[no-untyped-call]
    return made


# ---- quantisers that learn ----------------------------------------------------------------------------------------

class LearnedClip(nn.Module):
    """Learned weight clipping: each group's range is a learned share of its own extremes.

    The weight is clamped to the clip, then quantised with the range that is left: core.quantize of `clip(weight)`
    gives the codes of what training saw. Gradients reach both factors and the weight. The extreme next to zero of a
    group all of one sign is kept.
    """

    def __init__(self, shape: tuple[int, int], fmt: QuantFormat, initial: float = 4.0) -> None:
        """shape: (out, in) of the weight. initial: of both factors, before the sigmoid (OmniQuant, MobileQuant: 4;
        ZeroQAT: 3)."""
        super().__init__()
        rows = 1 if fmt.granularity.kind == "tensor" else shape[0]
        self.fmt = fmt
        self.upper = nn.Parameter(torch.full((rows, fmt.granularity.groups(shape[1]), 1), initial))
        self.lower = nn.Parameter(torch.full((rows, fmt.granularity.groups(shape[1]), 1), initial))

    def clip(self, weight: Tensor) -> Tensor:
        """The weight inside its clip, (out, in)."""
        grouped = _grouped(weight, self.fmt.granularity)
        high = torch.sigmoid(self.upper) * grouped.amax(dim=-1, keepdim=True)
        low = torch.sigmoid(self.lower) * grouped.amin(dim=-1, keepdim=True)
        clipped = torch.minimum(torch.maximum(grouped, low), high)
        if self.fmt.granularity.kind == "tensor":
            return clipped.reshape(weight.shape)
        return clipped.reshape(len(weight), -1)[:, :weight.shape[1]]

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(self.clip(weight), self.fmt, through_scale=True)


class Lsq(nn.Module):
    """A learned step of one tensor, symmetric: LSQ as EdgeQAT uses it on weights.

    The step starts at 2 mean|w| / sqrt(Qp) of the first tensor seen, after which `initialised` is set; its gradient is
    scaled by 1 / sqrt(numel Qp).
    """

    step: nn.Parameter
    initialised: Tensor

    def __init__(self, bits: int, *, signed: bool = True) -> None:
        super().__init__()
        self.element = int_format(bits, signed=signed)
        self.step = nn.Parameter(torch.ones(()))
        self.register_buffer("initialised", torch.tensor(False))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set the step from x and mark it as set."""
        self.step.copy_((2 * x.abs().mean() / math.sqrt(self.element.code_range[1] or 1)).clamp(min=_SMALLEST_STEP))
        self.initialised.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            self.initialise(x)
        low, high = self.element.code_range
        step = scale_gradient(self.step, 1 / math.sqrt(x.numel() * max(high, 1))).clamp(min=_SMALLEST_STEP)
        return round_ste((x / step).clamp(low, high)) * step


class LsqPlus(nn.Module):
    """A learned step and zero point of one tensor: LSQ+ as EdgeQAT uses it on activations.

    The first tensor decides between signed and unsigned codes (min < -1e-5), the step (as Lsq), and moves the zero
    point once, z <- 0.9 z + 0.1 (min - a Qn); after it `initialised` is set. Both gradients are scaled as in Lsq.
    """

    step: nn.Parameter
    zero: nn.Parameter
    initialised: Tensor
    signed: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.step, self.zero = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        self.register_buffer("initialised", torch.tensor(False))
        self.register_buffer("signed", torch.tensor(True))

    @property
    def element(self) -> NumberFormat:
        """The integer format of the codes."""
        return int_format(self.bits, signed=bool(self.signed))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set sign, step and zero point from x and mark them as set."""
        lowest = x.min()
        self.signed.fill_(bool(lowest < -1e-5))
        low, high = self.element.code_range
        self.step.copy_((2 * x.abs().mean() / math.sqrt(high or 1)).clamp(min=_SMALLEST_STEP))
        self.zero.copy_(0.9 * self.zero + 0.1 * (lowest - self.step * low))
        self.initialised.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            self.initialise(x)
        low, high = self.element.code_range
        factor = 1 / math.sqrt(x.numel() * max(high, 1))
        step = scale_gradient(self.step, factor).clamp(min=_SMALLEST_STEP)
        zero = round_ste(scale_gradient(self.zero, factor))
        return (round_ste((x / step + zero).clamp(low, high)) - zero) * step


class StaticAffine(nn.Module):
    """A static range of one activation tensor with learnable scale and offset: LRL of MobileQuant.

    The twin of core.StaticActivation: codes 0..2^bits - 1; a symmetric range has the offset 2^(bits - 1), which stays.
    """

    scale: nn.Parameter
    offset: Tensor
    SMALLEST = 1e-12

    def __init__(self, low: float, high: float, bits: int, *, symmetric: bool = False, learn: bool = True) -> None:
        """low, high: the calibrated range; zero is always among its values."""
        super().__init__()
        start = StaticActivation.from_range(low, high, bits, symmetric=symmetric)
        self.bits = bits
        self.scale = nn.Parameter(torch.tensor(start.scale, dtype=torch.float32), requires_grad=learn)
        offset = torch.tensor(float(start.zero))
        if symmetric:
            self.register_buffer("offset", offset)
        else:
            self.offset = nn.Parameter(offset, requires_grad=learn)

    def forward(self, x: Tensor) -> Tensor:
        last = float(2**self.bits - 1)
        return static_affine(x, self.scale.clamp(min=self.SMALLEST), self.offset.clamp(0, last), 0, last)

    def activation(self) -> StaticActivation:
        """As a folder stores it and the engine runs it."""
        scale, offset = self.scale.detach().clamp(min=self.SMALLEST), self.offset.detach()
        return StaticActivation(self.bits, float(scale), int(offset.clamp(0, 2**self.bits - 1).round()))


class EmaRange(nn.Module):
    """A running mean of max|x|, and any format without zero point at the scale it gives: XR-NPE's activations.

    While training, and until `frozen`, each call moves the mean: m <- decay m + (1 - decay) max|x|, from the first
    tensor's own maximum. Values beyond it are clipped and pass no gradient.
    """

    peak: Tensor
    initialised: Tensor

    def __init__(self, element: NumberFormat, decay: float = 0.99, peak: float = 0.0) -> None:
        """peak: the value of the element that the mean is scaled to; 0: its largest."""
        super().__init__()
        self.element, self.decay, self.frozen = element, decay, False
        self.limit = peak or element.max_value
        self.register_buffer("peak", torch.zeros(()))
        self.register_buffer("initialised", torch.tensor(False))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take x into the mean."""
        highest = x.abs().max().float()
        self.peak.copy_(self.decay * self.peak + (1 - self.decay) * highest if self.initialised else highest)
        self.initialised.fill_(True)

    def scale(self) -> Tensor:
        """Of the codes, (): one where only zeros were seen."""
        scale = self.peak / self.limit
        return torch.where(scale > 0, scale, torch.ones_like(scale))

    def forward(self, x: Tensor) -> Tensor:
        if (self.training and not self.frozen) or not self.initialised:
            self.observe(x)
        scale = self.scale()
        return snap(x / scale, self.element) * scale
