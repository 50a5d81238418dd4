"""Posits: their values and where they round. Posit Standard (2022), sections 3 and 4.1.

A posit of n bits with es exponent bits is a sign, a run of equal bits (the regime: k = run - 1 for ones, -run for
zeros), the bit that ends it, es exponent bits e and a fraction f; a negative one is the two's complement of its
magnitude. value = (-1)^s * 2^(k * 2^es + e) * (1 + f). Exponent bits that no longer fit are zero. 10...0 is NaR.
"""

from __future__ import annotations

import math

__all__ = ["posit_parts", "posit_value"]


def posit_parts(code: int, bits: int, es: int) -> tuple[bool, int, int, int] | None:
    """(negative, exponent, significand, fraction bits) with value = +-significand * 2^(exponent - fraction bits).

    None for zero and for NaR. The significand has its leading one: what a multiplier sees.
    """
    if code in (0, 1 << (bits - 1)):
        return None
    negative = bool(code >> (bits - 1))
    if negative:
        code = (1 << bits) - code
    body = format(code & ((1 << (bits - 1)) - 1), f"0{bits - 1}b")
    run = len(body) - len(body.lstrip(body[0]))
    regime = run - 1 if body[0] == "1" else -run
    rest = body[run + 1:]
    exponent = int(rest[:es].ljust(es, "0"), 2) if es else 0
    fraction = rest[es:]
    significand = (1 << len(fraction)) | (int(fraction, 2) if fraction else 0)
    return negative, regime * 2**es + exponent, significand, len(fraction)


def posit_value(code: int, bits: int, es: int) -> float:
    """The value of a code; NaN for NaR."""
    parts = posit_parts(code, bits, es)
    if parts is None:
        return 0.0 if code == 0 else math.nan
    negative, exponent, significand, fraction_bits = parts
    value = math.ldexp(significand, exponent - fraction_bits)
    return -value if negative else value


def standard_boundary(code: int, bits: int, es: int) -> float:
    """Where rounding turns from the positive posit `code` to the next one: the posit one bit longer between them.

    Section 4.1: between u and w the boundary is the (n+1)-bit posit whose code is u's with a one appended. Where
    exponent or regime bits are cut off that is their geometric mean, elsewhere the arithmetic one.
    """
    return posit_value(2 * code + 1, bits + 1, es)
