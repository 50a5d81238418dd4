"""Number formats and quantisation formats as values, and the one `quantize(x, fmt)` that every room calls.

Conventions, fixed here once: ties go to even; a value is divided by its scale, never multiplied by a reciprocal;
a group whose scale would be zero, or rounds to zero in the scale's own format, gets scale one and codes zero.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgewise.core.elements import (
    BF16,
    E4M3,
    E5M2,
    E8M0,
    ELEMENTS,
    FP4,
    FP16,
    FP32,
    INT1,
    INT2,
    INT3,
    INT4,
    INT5,
    INT6,
    INT7,
    INT8,
    NF4,
    POSIT4,
    POSIT8,
    POSIT16,
    TERNARY,
    UINT1,
    UINT2,
    UINT3,
    UINT4,
    UINT5,
    UINT6,
    UINT7,
    UINT8,
    NumberFormat,
    bf16_to_float32,
    float32_to_bf16,
    int_format,
    nested_prefix,
    posit_format,
    round_to,
)
from edgewise.core.errors import InvalidValueError, notice
from edgewise.core.values import dataclass

__all__ = [
    "BF16", "E4M3", "E5M2", "E8M0", "FP4", "FP16", "FP32", "INT1", "INT2", "INT3", "INT4", "INT5", "INT6", "INT7",
    "INT8", "MXFP4", "NF4", "POSIT4", "POSIT8", "POSIT16", "TERNARY", "UINT1", "UINT2", "UINT3", "UINT4", "UINT5",
    "UINT6", "UINT7", "UINT8", "Granularity", "NumberFormat", "QuantFormat", "best_peak", "bf16_to_float32",
    "dequantize", "float32_to_bf16", "int_format", "nested_prefix", "posit_format", "quantize", "round_to",
]

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Granularity:
    """Which values share a scale: the tensor, each output row, or every `group` consecutive inputs of a row."""

    kind: Literal["tensor", "axis", "group"]
    group: int = 0

    def __str__(self) -> str:
        return f"g{self.group}" if self.kind == "group" else self.kind

    def groups(self, inputs: int) -> int:
        """Groups in a row of that many inputs."""
        return -(-inputs // self.group) if self.kind == "group" else 1


@dataclass(frozen=True)
class QuantFormat:
    """A quantisation format: element, who shares a scale, how scales and zero points are stored.

    zero: "none" (symmetric), "int" (integer zero point) or "min" (a minimum in the scale's format).
    scale: the number format of a scale; a QuantFormat when scales are quantised themselves, as in K-quants.
    prefixes: bit widths that are prefixes of the element's bits (nested formats). n_m: sparsity pattern (n of m kept).
    peak: the value of the element that the largest magnitude of a group is scaled to; 0 means the largest there is.
    Posits are dense around one: a peak of 4 uses them better than their 64.
    """

    element: NumberFormat
    granularity: Granularity
    scale: NumberFormat | QuantFormat = FP16
    zero: Literal["none", "int", "min"] = "none"
    prefixes: tuple[int, ...] = ()
    n_m: tuple[int, int] | None = None
    peak: float = 0.0

    def __post_init__(self) -> None:
        if self.granularity.kind == "group" and self.granularity.group < 1:
            raise InvalidValueError(f"a group has at least one value; given {self.granularity.group}")
        if self.zero != "none" and self.element.kind != "int":
            raise InvalidValueError(f"a zero point needs an integer element; given {self.element.name}")
        if self.peak and (not 0 < self.peak <= self.element.max_value or self.zero != "none"):
            raise InvalidValueError(f"a peak lies above 0, at most at the element's largest value "
                                    f"({self.element.max_value:g}), in a format without zero point; given "
                                    f"{self.peak:g} for {self.element.name}")

    @classmethod
    def parse(cls, text: str) -> QuantFormat:
        """Read "int4/g32/fp16/min": element / granularity (tensor, axis, gN) / scale / none, int or min.

        The last two may be left out (fp16, none). With a zero point the element is unsigned. "posit8_0@4/axis" has a
        peak of 4.
        """
        parts = text.strip().lower().split("/")
        parts[0], at, peak_text = parts[0].partition("@")
        if not 1 <= len(parts) <= 4 or parts[0] not in ELEMENTS:
            raise InvalidValueError(
                f"number format {text!r} is not of the form element/granularity/scale/zero, such as int4/g32/fp16/min; "
                f"elements: {', '.join(ELEMENTS)}")
        element = ELEMENTS[parts[0]]
        place = parts[1] if len(parts) > 1 else "axis"
        if place in ("tensor", "axis"):
            granularity = Granularity("tensor" if place == "tensor" else "axis")
        elif place.startswith("g") and place[1:].isdigit() and int(place[1:]) > 0:
            granularity = Granularity("group", int(place[1:]))
        else:
            raise InvalidValueError(f"granularity {place!r} in {text!r}: expected tensor, axis or gN such as g32")
        scale_name = parts[2] if len(parts) > 2 else "fp16"
        if scale_name not in ELEMENTS or ELEMENTS[scale_name].kind != "float":
            raise InvalidValueError(f"scale {scale_name!r} in {text!r}: expected fp32, fp16, bf16 or e8m0")
        zero = parts[3] if len(parts) > 3 else "none"
        if zero not in ("none", "int", "min"):
            raise InvalidValueError(f"zero {zero!r} in {text!r}: expected none, int or min")
        if zero != "none":
            if element == INT1:
                element = UINT1
            if element.kind != "int" or element.restricted:
                raise InvalidValueError(f"{text!r}: a zero point needs an integer element that is not restricted")
            element = replace(element, signed=False, label="")
        try:
            peak = float(peak_text) if at else 0.0
        except ValueError:
            raise InvalidValueError(f"peak {peak_text!r} in {text!r}: expected a number") from None
        return cls(element, granularity, ELEMENTS[scale_name], zero, peak=peak)  # type: ignore[arg-type]

    def __str__(self) -> str:
        element = self.element.name
        if self.zero != "none" and element.startswith("u"):
            element = element[1:]
        if self.peak:
            element += f"@{self.peak:g}"
        text = f"{element}/{self.granularity}/{self.scale if isinstance(self.scale, NumberFormat) else 'nested'}"
        return text if self.zero == "none" else f"{text}/{self.zero}"

    @property
    def bits_per_weight(self) -> float:
        """Element bits plus the share of scale and zero point, for rows much longer than a group."""
        element = float(self.element.bits)
        if self.n_m:
            kept, of = self.n_m
            element = kept / of * (element + max(1, (of - 1).bit_length()))
        if self.granularity.kind != "group":
            return element
        return element + self._overhead_bits() / self.granularity.group

    def _overhead_bits(self) -> float:
        scale = self.scale.bits if isinstance(self.scale, NumberFormat) else self.scale.bits_per_weight
        zero = {"none": 0.0, "int": float(self.element.bits), "min": float(scale)}[self.zero]
        return scale + zero

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a (out, in) tensor in this format, codes packed row by row."""
        rows, inputs = math.prod(shape[:-1]), shape[-1]
        element = float(self.element.bits)
        if self.n_m:
            kept, of = self.n_m
            element = kept / of * (element + max(1, (of - 1).bit_length()))
        codes = rows * math.ceil(inputs * element / 8)
        scales = 1 if self.granularity.kind == "tensor" else rows * self.granularity.groups(inputs)
        return codes + math.ceil(scales * self._overhead_bits() / 8)


MXFP4 = QuantFormat(FP4, Granularity("group", 32), E8M0)


def _grouped(x: Float32, granularity: Granularity) -> tuple[Float32, int]:
    """(out, in) -> (out, groups, size), the last group padded by repeating its last value."""
    rows, inputs = x.shape
    if granularity.kind == "tensor":
        return x.reshape(1, 1, rows * inputs), inputs
    size = granularity.group if granularity.kind == "group" else inputs
    pad = -inputs % size
    if pad:
        x = np.concatenate([x, np.repeat(x[:, -1:], pad, axis=1)], axis=1)
    return x.reshape(rows, -1, size), inputs


def quantize(x: NDArray[Any], fmt: QuantFormat) -> tuple[NDArray[Any], Float32, Float32 | None]:
    """Round to nearest under `fmt`. x: (out, in) float32.

    Returns codes (out, in), scales (out, groups) float32 (already values of fmt.scale), and the zeros or minima
    (out, groups) float32 that `dequantize` takes, or None for a symmetric format.
    Granularity "tensor" gives scales of shape (1, 1).
    """
    x = np.asarray(x, np.float32)
    if x.ndim != 2:
        raise InvalidValueError(f"quantize expects a (out, in) array; given shape {x.shape}")
    if x.size == 0:
        raise InvalidValueError(f"quantize expects at least one value; given shape {x.shape}")
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise InvalidValueError(f"quantize expects finite values; element ({row}, {column}) is {x[row, column]}")
    if isinstance(fmt.scale, QuantFormat):
        raise InvalidValueError(f"quantize writes plain scales; {fmt} has scales that are themselves quantised")
    grouped, inputs = _grouped(x, fmt.granularity)
    zero: Float32 | None = None
    if fmt.zero == "none":
        limit = fmt.peak or fmt.element.max_value or 1.0
        peak = np.abs(grouped).max(axis=-1, keepdims=True)
        scale = _scale_of(peak / np.float32(limit), fmt.scale)
        codes = fmt.element.encode(grouped / scale)
    else:
        levels = np.float32(2**fmt.element.bits - 1)
        low_value = grouped.min(axis=-1, keepdims=True)
        high_value = grouped.max(axis=-1, keepdims=True)
        if fmt.zero == "int":  # zero must be representable, so that padding and ReLU stay exact
            low_value, high_value = np.minimum(low_value, 0), np.maximum(high_value, 0)
        scale = _scale_of((high_value - low_value) / levels, fmt.scale)
        if fmt.zero == "int":
            zero = np.clip(np.rint(-low_value / scale), 0, levels).astype(np.float32)
            codes = np.clip(np.rint(grouped / scale) + zero, 0, levels)
        else:
            zero = round_to(low_value, fmt.scale)
            codes = np.clip(np.rint((grouped - zero) / scale), 0, levels)
        codes = codes.astype(np.uint8 if fmt.element.bits <= 8 else np.uint16)
    codes = codes.reshape(x.shape if fmt.granularity.kind == "tensor" else (x.shape[0], -1))[:, :inputs]
    return np.ascontiguousarray(codes), scale[..., 0], None if zero is None else zero[..., 0]


def _scale_of(raw: Float32, number: NumberFormat) -> Float32:
    if number == E8M0:  # a power of two that holds the peak: round the exponent up
        share, exponent = np.frexp(raw)
        exponent = np.where(raw > 0, exponent - (share == 0.5), 0)
        return np.asarray(np.ldexp(np.float32(1), np.clip(exponent, -127, 127)), np.float32)
    if raw.max() > number.max_value:
        notice("clamp", f"a scale of {raw.max():.3g} is above the largest {number}; its values are clipped",
               where="quantize")
    scale = round_to(raw, number)
    return np.where(scale > 0, scale, np.float32(1)).astype(np.float32)


def dequantize(codes: NDArray[Any], scales: Float32, fmt: QuantFormat, *, zeros: Float32 | None = None,
               minima: Float32 | None = None, bits: int | None = None) -> Float32:
    """The values that codes stand for. Shapes as `quantize` returns them; result (out, in) float32.

    bits: read only that many of the highest bits of integer codes, as `nested_prefix` does.
    """
    inputs = codes.shape[-1]
    values = fmt.element.decode(codes) if bits is None else nested_prefix(codes, fmt.element, bits)

    def spread(per_group: Float32) -> Float32:
        if fmt.granularity.kind == "group":
            return np.asarray(np.repeat(per_group, fmt.granularity.group, axis=1)[:, :inputs], np.float32)
        return per_group  # (1, 1) or (out, 1): broadcasts

    if fmt.zero == "int":
        if zeros is None:
            raise InvalidValueError(f"{fmt} needs zeros to be dequantised")
        return np.asarray((values - spread(zeros)) * spread(scales), np.float32)
    result = values * spread(scales)
    if fmt.zero == "min":
        if minima is None:
            raise InvalidValueError(f"{fmt} needs minima to be dequantised")
        result = result + spread(minima)
    return np.asarray(result, np.float32)


def best_peak(x: NDArray[Any], fmt: QuantFormat) -> QuantFormat:
    """`fmt` with the power of two as peak, or its largest value, that leaves the least squared error on x (out, in)."""
    if fmt.zero != "none" or fmt.element.kind == "int":
        raise InvalidValueError(f"a peak is searched for non-uniform elements without zero point; given {fmt}")
    top = fmt.element.max_value
    exact = np.asarray(x, np.float64)

    def error(peak: float) -> float:
        tried = replace(fmt, peak=peak)
        codes, scales, _ = quantize(x, tried)
        return float(np.square(dequantize(codes, scales, tried) - exact).sum())

    powers = [2.0**n for n in range(-4, math.frexp(top)[1]) if 2.0**n < top]
    return replace(fmt, peak=min((0.0, *powers), key=error))
