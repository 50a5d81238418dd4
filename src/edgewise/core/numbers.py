"""Number formats and quantisation formats as values, and the one `quantize(x, fmt)` that every room calls.

Conventions, fixed here once: ties go to even; a value is divided by its scale, never multiplied by a reciprocal;
a group whose scale would be zero, or rounds to zero in the scale's own format, gets scale one and codes zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError, notice

__all__ = [
    "BF16", "E4M3", "E5M2", "E8M0", "FP4", "FP16", "FP32", "INT1", "INT2", "INT3", "INT4", "INT5", "INT6", "INT7",
    "INT8", "MXFP4", "NF4", "POSIT8", "TERNARY", "Granularity", "NumberFormat", "QuantFormat", "bf16_to_float32",
    "dequantize", "float32_to_bf16", "int_format", "quantize", "round_to",
]

Float32 = NDArray[np.float32]
Kind = Literal["int", "float", "posit", "codebook"]


@dataclass(frozen=True)
class NumberFormat:
    """A set of representable numbers and their codes.

    kind: int (two's complement, or 0..2^bits-1 when unsigned), float (IEEE-like), posit, codebook.
    restricted: a signed integer without its lowest code, so that the range is symmetric.
    exponent_bits, mantissa_bits: of a float. finite_only: the codes of infinity hold numbers (E4M3, FP4).
    es: exponent field of a posit. codebook: values in code order.
    """

    kind: Kind
    bits: int
    signed: bool = True
    restricted: bool = False
    exponent_bits: int = 0
    mantissa_bits: int = 0
    finite_only: bool = False
    es: int = 0
    codebook: tuple[float, ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        """The short name used in QuantFormat.parse and in messages."""
        if self.label:
            return self.label
        if self.kind == "int":
            return f"{'int' if self.signed else 'uint'}{self.bits}"
        if self.kind == "posit":
            return f"posit{self.bits}_{self.es}"
        if self.kind == "float":
            return f"e{self.exponent_bits}m{self.mantissa_bits}"
        return f"codebook{self.bits}"

    def __str__(self) -> str:
        return self.name

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest integer code of an int format."""
        if self.kind != "int":
            raise InvalidValueError(f"code_range is defined for integers; given {self.name}")
        if not self.signed:
            return 0, 2**self.bits - 1
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return (low + 1 if self.restricted and self.bits > 1 else low), high

    def values(self) -> NDArray[np.float64]:
        """Every representable finite value, by code; NaN where a code is not a number. bits <= 16."""
        return _values(self)

    @property
    def max_value(self) -> float:
        """The largest finite value."""
        if self.kind == "int":
            return float(self.code_range[1])
        if self.bits > 16:
            return float(np.finfo(np.float32).max)
        return float(np.nanmax(self.values()))

    def encode(self, x: NDArray[Any]) -> NDArray[Any]:
        """Nearest codes, ties to even, saturating. int: int8/uint8/int16; otherwise uint8 or uint16 bit patterns.

        NaN becomes the format's NaN code; a format without one raises InvalidValueError.
        """
        x64 = np.asarray(x, dtype=np.float64)
        nan = np.isnan(x64)
        if nan.any():
            codes = self.encode(np.where(nan, 0.0, x64))
            codes[nan] = self._nan_code()
            return codes
        if self.kind == "int":
            low, high = self.code_range
            # A one-bit signed integer has the codes -1 and 0; see TERNARY and INT1's codebook for sign formats.
            dtype = (np.int8 if self.bits <= 8 else np.int16) if self.signed else (
                np.uint8 if self.bits <= 8 else np.uint16)
            return np.clip(np.rint(x64), low, high).astype(dtype)
        if self == FP16:
            limit = np.float64(65504.0)
            return np.clip(x64, -limit, limit).astype(np.float16).view(np.uint16)
        order, ordered = _sorted_values(self)
        above = np.clip(np.searchsorted(ordered, x64), 1, len(ordered) - 1)
        low_gap = x64 - ordered[above - 1]
        high_gap = ordered[above] - x64
        # A tie goes to the even code, which is how IEEE rounding reads on bit patterns.
        tie_up = (low_gap == high_gap) & (order[above] % 2 == 0)
        pick = np.where((high_gap < low_gap) | tie_up, above, above - 1)
        return order[pick].astype(np.uint8 if self.bits <= 8 else np.uint16)

    def decode(self, codes: NDArray[Any]) -> Float32:
        """Codes back to float32."""
        if self.kind == "int":
            return np.asarray(codes).astype(np.float32)
        if self == FP32:
            return np.asarray(codes).view(np.float32)
        if self == FP16:
            return np.asarray(np.asarray(codes, np.uint16).view(np.float16), np.float32)
        if self == BF16:
            return bf16_to_float32(codes)
        return _decoded(self)[np.asarray(codes).astype(np.int64)]

    def _nan_code(self) -> int:
        if self.kind in ("float", "posit") and self.bits <= 16:
            codes = np.flatnonzero(np.isnan(self.values()))
            if len(codes):
                # IEEE-like formats have many: the positive quiet one. One bit of mantissa and above, its top bit set.
                quiet = (2**self.exponent_bits - 1) << self.mantissa_bits | 1 << max(self.mantissa_bits - 1, 0)
                return int(quiet) if quiet in codes and not self.finite_only else int(codes[0])
        raise InvalidValueError(f"{self.name} has no code for NaN")


@lru_cache(maxsize=64)
def _values(fmt: NumberFormat) -> NDArray[np.float64]:
    if fmt.bits > 16:
        raise InvalidValueError(f"values() lists formats of up to 16 bits; given {fmt.name} with {fmt.bits}")
    codes = np.arange(2**fmt.bits)
    if fmt.kind == "int":
        low, high = fmt.code_range
        return np.arange(low, high + 1, dtype=np.float64)
    if fmt.kind == "codebook":
        return np.asarray(fmt.codebook, np.float64)
    if fmt.kind == "posit":
        return np.array([_posit_value(int(code), fmt.bits, fmt.es) for code in codes])
    return _float_values(fmt, codes)


def _float_values(fmt: NumberFormat, codes: NDArray[Any]) -> NDArray[np.float64]:
    e_bits, m_bits = fmt.exponent_bits, fmt.mantissa_bits
    bias = 2 ** (e_bits - 1) - 1
    mantissa = codes & (2**m_bits - 1)
    exponent = (codes >> m_bits) & (2**e_bits - 1)
    negative = ((codes >> (e_bits + m_bits)) & 1).astype(bool) & fmt.signed
    if m_bits == 0 and not fmt.signed:  # E8M0: a bare exponent, its last code is NaN (OCP MX, section 5.4)
        scale: NDArray[np.float64] = np.exp2(exponent.astype(np.float64) - bias)
        scale[-1] = np.nan
        return scale
    normal = np.exp2(exponent.astype(np.float64) - bias) * (1 + mantissa / 2**m_bits)
    subnormal = np.exp2(1.0 - bias) * (mantissa / 2**m_bits)
    size = np.where(exponent == 0, subnormal, normal)
    value: NDArray[np.float64] = np.where(negative, -size, size)
    if not fmt.finite_only:
        value[exponent == 2**e_bits - 1] = np.nan
    elif fmt.bits == 8:  # E4M3 keeps one NaN, at all ones (OCP FP8, table 1)
        value[(codes & 0x7F) == 0x7F] = np.nan
    return value


@lru_cache(maxsize=64)
def _decoded(fmt: NumberFormat) -> Float32:
    """Every code's value as float32, infinities included."""
    table = fmt.values().astype(np.float32)
    if fmt.kind == "float" and not fmt.finite_only:
        infinity = (2**fmt.exponent_bits - 1) << fmt.mantissa_bits
        table[infinity] = np.inf
        if fmt.signed:
            table[infinity | 1 << (fmt.bits - 1)] = -np.inf
    return table


def _posit_value(code: int, bits: int, es: int) -> float:
    """Value of a posit: (-1)^s * 2^(k * 2^es + e) * (1 + f). Posit standard 2022, section 3."""
    if code == 0:
        return 0.0
    if code == 1 << (bits - 1):
        return math.nan
    negative = bool(code >> (bits - 1))
    if negative:
        code = (1 << bits) - code
    body = format(code & ((1 << (bits - 1)) - 1), f"0{bits - 1}b")
    run = len(body) - len(body.lstrip(body[0]))
    regime = run - 1 if body[0] == "1" else -run
    rest = body[run + 1:]
    exponent = int(rest[:es].ljust(es, "0"), 2) if es else 0
    fraction_bits = rest[es:]
    fraction = int(fraction_bits, 2) / 2 ** len(fraction_bits) if fraction_bits else 0.0
    value = math.ldexp(1.0 + fraction, regime * 2**es + exponent)
    return -value if negative else value


@lru_cache(maxsize=64)
def _sorted_values(fmt: NumberFormat) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    values = fmt.values()
    codes = np.flatnonzero(~np.isnan(values))
    codes = codes[np.argsort(values[codes], kind="stable")]
    ordered = values[codes]
    first = np.concatenate([[True], np.diff(ordered) > 0])  # -0 and +0 are one value; keep +0, the lower code
    return codes[first], ordered[first]


def int_format(bits: int, *, signed: bool = True, restricted: bool = False) -> NumberFormat:
    """An integer of 1 to 16 bits."""
    if not 1 <= bits <= 16:
        raise InvalidValueError(f"an integer format has 1 to 16 bits; given {bits}")
    return NumberFormat("int", bits, signed=signed, restricted=restricted)


FP32 = NumberFormat("float", 32, exponent_bits=8, mantissa_bits=23, label="fp32")
FP16 = NumberFormat("float", 16, exponent_bits=5, mantissa_bits=10, label="fp16")
BF16 = NumberFormat("float", 16, exponent_bits=8, mantissa_bits=7, label="bf16")
E4M3 = NumberFormat("float", 8, exponent_bits=4, mantissa_bits=3, finite_only=True, label="e4m3")
E5M2 = NumberFormat("float", 8, exponent_bits=5, mantissa_bits=2, label="e5m2")
FP4 = NumberFormat("float", 4, exponent_bits=2, mantissa_bits=1, finite_only=True, label="fp4")
E8M0 = NumberFormat("float", 8, signed=False, exponent_bits=8, finite_only=True, label="e8m0")
INT1 = NumberFormat("codebook", 1, codebook=(-1.0, 1.0), label="int1")
INT2, INT3, INT4, INT5, INT6, INT7, INT8 = (int_format(bits) for bits in range(2, 9))
TERNARY = NumberFormat("int", 2, restricted=True, label="ternary")
POSIT8 = NumberFormat("posit", 8, es=0)
NF4 = NumberFormat(
    "codebook", 4, label="nf4",
    # Dettmers et al., QLoRA, arXiv:2305.14314, appendix E.
    codebook=(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
              0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
              0.7229568362236023, 1.0),
)

_BY_NAME = {fmt.name: fmt for fmt in (
    FP32, FP16, BF16, E4M3, E5M2, FP4, E8M0, INT1, INT2, INT3, INT4, INT5, INT6, INT7, INT8, TERNARY, POSIT8, NF4)}


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
    """

    element: NumberFormat
    granularity: Granularity
    scale: NumberFormat | QuantFormat = FP16
    zero: Literal["none", "int", "min"] = "none"
    prefixes: tuple[int, ...] = ()
    n_m: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.granularity.kind == "group" and self.granularity.group < 1:
            raise InvalidValueError(f"a group has at least one value; given {self.granularity.group}")
        if self.zero != "none" and self.element.kind != "int":
            raise InvalidValueError(f"a zero point needs an integer element; given {self.element.name}")

    @classmethod
    def parse(cls, text: str) -> QuantFormat:
        """Read "int4/g32/fp16/min": element / granularity (tensor, axis, gN) / scale / none, int or min.

        The last two may be left out (fp16, none). With a zero point the element is unsigned.
        """
        parts = text.strip().lower().split("/")
        if not 1 <= len(parts) <= 4 or parts[0] not in _BY_NAME:
            raise InvalidValueError(
                f"number format {text!r} is not of the form element/granularity/scale/zero, such as int4/g32/fp16/min; "
                f"elements: {', '.join(_BY_NAME)}")
        element = _BY_NAME[parts[0]]
        place = parts[1] if len(parts) > 1 else "axis"
        if place in ("tensor", "axis"):
            granularity = Granularity("tensor" if place == "tensor" else "axis")
        elif place.startswith("g") and place[1:].isdigit() and int(place[1:]) > 0:
            granularity = Granularity("group", int(place[1:]))
        else:
            raise InvalidValueError(f"granularity {place!r} in {text!r}: expected tensor, axis or gN such as g32")
        scale_name = parts[2] if len(parts) > 2 else "fp16"
        if scale_name not in _BY_NAME or _BY_NAME[scale_name].kind != "float":
            raise InvalidValueError(f"scale {scale_name!r} in {text!r}: expected fp32, fp16, bf16 or e8m0")
        zero = parts[3] if len(parts) > 3 else "none"
        if zero not in ("none", "int", "min"):
            raise InvalidValueError(f"zero {zero!r} in {text!r}: expected none, int or min")
        if zero != "none":
            if element.kind != "int" or element.restricted:
                raise InvalidValueError(f"{text!r}: a zero point needs an integer element that is not restricted")
            element = replace(element, signed=False, label="")
        return cls(element, granularity, _BY_NAME[scale_name], zero)  # type: ignore[arg-type]

    def __str__(self) -> str:
        element = self.element.name
        if self.zero != "none" and element.startswith("u"):
            element = element[1:]
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


def bf16_to_float32(bits: NDArray[Any]) -> Float32:
    """uint16 bit patterns of bfloat16 -> float32, exactly."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(x: NDArray[Any]) -> NDArray[np.uint16]:
    """float32 -> uint16 bit patterns of bfloat16, ties to even, NaN kept quiet."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, quiet, rounded).astype(np.uint16)


def round_to(x: NDArray[Any], number: NumberFormat) -> Float32:
    """Each value rounded to the nearest one of `number`, saturating, as float32."""
    if number == FP32:
        return np.asarray(x, np.float32)
    if number == FP16:
        return np.asarray(np.clip(x, -65504.0, 65504.0).astype(np.float16), np.float32)
    if number == BF16:
        limit = np.float32(BF16.max_value)
        return bf16_to_float32(float32_to_bf16(np.clip(np.asarray(x, np.float32), -limit, limit)))
    return number.decode(number.encode(x))


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
        if fmt.element.kind == "int":
            limit = float(fmt.element.code_range[1])
        else:
            limit = fmt.element.max_value
        peak = np.abs(grouped).max(axis=-1, keepdims=True)
        scale = _scale_of(peak / np.float32(max(limit, 1.0)), fmt.scale)
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
        with np.errstate(divide="ignore"):
            exponent = np.where(raw > 0, np.ceil(np.log2(np.where(raw > 0, raw, 1))), 0.0)
        return np.asarray(np.exp2(np.clip(exponent, -127, 127)), np.float32)
    if raw.max() > number.max_value:
        notice("clamp", f"a scale of {raw.max():.3g} is above the largest {number}; its values are clipped",
               where="quantize")
    scale = round_to(raw, number)
    return np.where(scale > 0, scale, np.float32(1)).astype(np.float32)


def dequantize(codes: NDArray[Any], scales: Float32, fmt: QuantFormat, *, zeros: Float32 | None = None,
               minima: Float32 | None = None) -> Float32:
    """The values that codes stand for. Shapes as `quantize` returns them; result (out, in) float32."""
    inputs = codes.shape[-1]
    values: Float32 = fmt.element.decode(codes) if fmt.element.kind != "int" else codes.astype(np.float32)

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
