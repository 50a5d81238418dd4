"""Number formats as values: what a format can represent, and the code nearest to a number.

Rounding goes through one table per format, the boundaries between neighbours, so that the torch twin
(train/fake_quant.py) rounds by the same comparisons. Ties go to the even code.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError
from edgewise.core.posit import posit_value, standard_boundary
from edgewise.core.values import dataclass

__all__ = [
    "BF16", "E4M3", "E5M2", "E8M0", "ELEMENTS", "FP4", "FP16", "FP32", "INT1", "INT2", "INT3", "INT4", "INT5", "INT6",
    "INT7", "INT8", "NF4", "POSIT4", "POSIT8", "POSIT16", "TERNARY", "UINT1", "UINT2", "UINT3", "UINT4", "UINT5",
    "UINT6", "UINT7", "UINT8", "NumberFormat", "Rounding", "RoundingTable", "bf16_to_float32", "float32_table",
    "float32_to_bf16", "int_format", "nested_prefix", "posit_format", "round_to", "rounding_table",
]

Float32 = NDArray[np.float32]
Kind = Literal["int", "float", "posit", "codebook"]
Rounding = Literal["nearest", "nonzero", "standard"]


@dataclass(frozen=True)
class NumberFormat:
    """A set of representable numbers and their codes.

    kind: int (two's complement, or 0..2^bits-1 when unsigned), float (IEEE-like), posit, codebook.
    restricted: a signed integer without its lowest code, so that the range is symmetric.
    exponent_bits, mantissa_bits: of a float. finite_only: the codes of infinity hold numbers (E4M3, FP4).
    es: exponent field of a posit. codebook: values in code order.
    rounding: of a posit: "nearest" value, zero included, which suits weights around zero; "nonzero" is nearest but
    never takes a number to zero; "standard" is Posit Standard (2022), section 4.1: the latter with the boundaries of
    the bit string, which between sparse values are geometric means.
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
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if self.rounding not in (("nearest", "nonzero", "standard") if self.kind == "posit" else ("nearest",)):
            raise InvalidValueError(f"rounding is nearest, or for posits nonzero or standard; given {self.rounding!r} "
                                    f"for {self.name}")

    @property
    def name(self) -> str:
        """The short name used in QuantFormat.parse and in messages."""
        if self.label:
            return self.label
        if self.kind == "int":
            return f"{'int' if self.signed else 'uint'}{self.bits}{'r' if self.restricted else ''}"
        if self.kind == "posit":
            return f"posit{self.bits}_{self.es}{'' if self.rounding == 'nearest' else self.rounding}"
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
        table = rounding_table(self)
        pick = np.searchsorted(table.boundaries, x64)
        return table.codes[pick].astype(np.uint8 if self.bits <= 8 else np.uint16)

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
        return np.array([posit_value(int(code), fmt.bits, fmt.es) for code in codes])
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


class RoundingTable(NamedTuple):
    """Finite values in rising order, (n,) float64; their codes, (n,); and the boundaries between them, (n - 1,).

    x rounds to values[i] with i the number of boundaries below x. A boundary whose tie goes up lies one step below
    the true one. exact: the true boundaries; up: which of them go up, (n - 1,) bool.
    """

    values: NDArray[np.float64]
    codes: NDArray[np.int64]
    boundaries: NDArray[np.float64]
    exact: NDArray[np.float64]
    up: NDArray[np.bool_]


@lru_cache(maxsize=64)
def rounding_table(fmt: NumberFormat) -> RoundingTable:
    """How `fmt`, of at most 16 bits, rounds. -0 and +0 are one value, with the code of +0."""
    values = fmt.values()
    codes = np.flatnonzero(~np.isnan(values))
    codes = codes[np.argsort(values[codes], kind="stable")]
    ordered = values[codes]
    first = np.concatenate([[True], np.diff(ordered) > 0])
    codes, ordered = codes[first], ordered[first]
    if fmt.kind == "int":
        codes = ordered.astype(np.int64)  # values() lists integers by value: the code is the value
    # Exact: two neighbours of a format of at most 16 bits, or of a codebook of float32, have their mean in float64.
    middles = (ordered[1:] + ordered[:-1]) / 2
    if fmt.rounding == "standard":
        above_zero = [standard_boundary(int(code), fmt.bits, fmt.es) for code in codes[ordered > 0][:-1]]
        middles = np.array([*(-value for value in reversed(above_zero)), 0.0, 0.0, *above_zero])
    elif fmt.rounding == "nonzero":
        middles[(ordered[1:] == 0) | (ordered[:-1] == 0)] = 0.0
    # A tie goes to the even code, which is how IEEE rounding reads on bit patterns; zero itself stays zero.
    up = np.where(middles == 0, ordered[1:] == 0, codes[1:] % 2 == 0) if fmt.rounding != "nearest" else (
        codes[1:] % 2 == 0)
    return RoundingTable(ordered, codes, np.where(up, np.nextafter(middles, -np.inf), middles), middles, up)


@lru_cache(maxsize=64)
def float32_table(fmt: NumberFormat) -> tuple[Float32, Float32]:
    """(boundaries, values) of `rounding_table` for float32 numbers: a boundary rounded down decides as the true one."""
    table = rounding_table(fmt)
    near = table.boundaries.astype(np.float32)
    return np.where(near > table.boundaries, np.nextafter(near, np.float32(-np.inf)), near), fmt.decode(table.codes)


def int_format(bits: int, *, signed: bool = True, restricted: bool = False) -> NumberFormat:
    """An integer of 1 to 16 bits."""
    if not 1 <= bits <= 16:
        raise InvalidValueError(f"an integer format has 1 to 16 bits; given {bits}")
    return NumberFormat("int", bits, signed=signed, restricted=restricted)


def posit_format(bits: int, es: int, rounding: Rounding = "nearest") -> NumberFormat:
    """A posit of 3 to 16 bits with es exponent bits."""
    if not 3 <= bits <= 16 or not 0 <= es <= 3:
        raise InvalidValueError(f"a posit format has 3 to 16 bits and 0 to 3 exponent bits; given ({bits}, {es})")
    return NumberFormat("posit", bits, es=es, rounding=rounding)


FP32 = NumberFormat("float", 32, exponent_bits=8, mantissa_bits=23, label="fp32")
FP16 = NumberFormat("float", 16, exponent_bits=5, mantissa_bits=10, label="fp16")
BF16 = NumberFormat("float", 16, exponent_bits=8, mantissa_bits=7, label="bf16")
E4M3 = NumberFormat("float", 8, exponent_bits=4, mantissa_bits=3, finite_only=True, label="e4m3")
E5M2 = NumberFormat("float", 8, exponent_bits=5, mantissa_bits=2, label="e5m2")
FP4 = NumberFormat("float", 4, exponent_bits=2, mantissa_bits=1, finite_only=True, label="fp4")
E8M0 = NumberFormat("float", 8, signed=False, exponent_bits=8, finite_only=True, label="e8m0")
INT1 = NumberFormat("codebook", 1, codebook=(-1.0, 1.0), label="int1")
INT2, INT3, INT4, INT5, INT6, INT7, INT8 = (int_format(bits) for bits in range(2, 9))
UINT1, UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8 = (int_format(bits, signed=False) for bits in range(1, 9))
TERNARY = NumberFormat("int", 2, restricted=True, label="ternary")
POSIT4, POSIT8, POSIT16 = posit_format(4, 1), posit_format(8, 0), posit_format(16, 1)
NF4 = NumberFormat(
    "codebook", 4, label="nf4",
    # Dettmers et al., QLoRA, arXiv:2305.14314, appendix E.
    codebook=(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
              0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
              0.7229568362236023, 1.0),
)

ELEMENTS = {fmt.name: fmt for fmt in (
    FP32, FP16, BF16, E4M3, E5M2, FP4, E8M0, INT1, INT2, INT3, INT4, INT5, INT6, INT7, INT8, TERNARY, NF4,
    *(posit_format(bits, es, rounding) for bits, es in ((4, 1), (8, 0), (16, 1))
      for rounding in ("nearest", "nonzero", "standard")),
    UINT1, UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8,
    *(int_format(bits, restricted=True) for bits in range(2, 9)))}
"""By the name that QuantFormat.parse takes."""


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


def nested_prefix(codes: NDArray[Any], element: NumberFormat, bits: int,
                  rule: Literal["rounded", "middle"] = "rounded") -> Float32:
    """What the `bits` highest bits of integer codes stand for, on the scale of the full codes.

    With c bits in all and r kept, a step of the prefix is 2^(c-r) steps of the code.
    rounded: clamp(floor(code / 2^(c-r) + 1/2)) * 2^(c-r), the slice of Matryoshka Quantization (Nair et al.,
    arXiv:2502.06786, equation 4): it needs one bit below the prefix. Ties go up, as a shift does them.
    middle: floor(code / 2^(c-r)) * 2^(c-r) + (2^(c-r) - 1) / 2, the mean of the codes that share the prefix: a plain
    prefix of what is stored, for a file whose lower bits have not arrived.
    Signed codes are two's complement: their prefix is the arithmetic shift. codes: any shape; float32 of that shape.
    """
    if element.kind != "int" or element.restricted:
        raise InvalidValueError(f"a bit prefix is read from a plain integer; given {element.name}")
    if not 1 <= bits <= element.bits:
        raise InvalidValueError(f"a prefix of {element.name} has 1 to {element.bits} bits; given {bits}")
    drop = element.bits - bits
    wide = np.asarray(codes).astype(np.int64)
    if drop == 0:
        return wide.astype(np.float32)
    if rule == "middle":
        return np.asarray((wide >> drop << drop) + np.float32((2**drop - 1) / 2), np.float32)
    highest = 2 ** (bits - 1) - 1 if element.signed else 2**bits - 1
    kept = np.minimum((wide + 2 ** (drop - 1)) >> drop, highest)
    return np.asarray(kept << drop, np.float32)
