"""Exact dot products against rational arithmetic and against the quire of SoftPosit."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from softposit_peer import ANSWERS, digest, operands

from edgewise.core.elements import (
    BF16,
    E4M3,
    FP4,
    INT4,
    INT8,
    NF4,
    POSIT4,
    POSIT8,
    POSIT16,
    TERNARY,
    posit_format,
    rounding_table,
)
from edgewise.core.errors import InvalidValueError
from edgewise.core.quire import exact_matmul, quire_bits, quire_matmul, round_exact

FORMATS = [POSIT4, POSIT8, POSIT16, FP4, E4M3, NF4, INT4, INT8, TERNARY, BF16, posit_format(8, 0, "standard"),
           posit_format(16, 1, "standard"), posit_format(4, 1, "nonzero")]


def codes_of(fmt, rng, shape):
    return rng.choice(rounding_table(fmt).codes, shape).astype(fmt.encode(np.zeros(0)).dtype)


def slow_round(value: Fraction, fmt) -> int:
    """By the definition: one comparison after the other with the exact boundaries."""
    table = rounding_table(fmt)
    for place, (boundary, up) in enumerate(zip(table.exact, table.up, strict=True)):
        if value < Fraction(float(boundary)) or (value == Fraction(float(boundary)) and not up):
            return int(table.codes[place])
    return int(table.codes[-1])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_sums_of_products_are_exact(fmt):
    rng = np.random.default_rng(0)
    for k in (1, 7, 130):
        left, right = codes_of(fmt, rng, (3, k)), codes_of(fmt, rng, (k, 2))
        a, b = ([[Fraction(float(v)) for v in row] for row in fmt.decode(codes).astype(np.float64)]
                for codes in (left, right))
        total, fraction, wrong = exact_matmul(left, right, fmt)
        for i in range(3):
            for j in range(2):
                expected = sum(a[i][x] * b[x][j] for x in range(k))
                assert Fraction(int(total[i, j]), 2**fraction) == expected
                if fmt is not BF16 and "standard" not in str(fmt) and fmt is not POSIT16:
                    assert round_exact(int(total[i, j]), fraction, fmt) == slow_round(expected, fmt)
        assert not wrong.any()


@pytest.mark.parametrize("fmt", [POSIT4, POSIT8, FP4, E4M3, TERNARY, posit_format(8, 0, "standard")], ids=str)
def test_every_boundary_and_its_neighbours_round_as_defined(fmt):
    table = rounding_table(fmt)
    tiny = Fraction(1, 2**80)
    for boundary in table.exact:
        for value in (Fraction(float(boundary)) - tiny, Fraction(float(boundary)), Fraction(float(boundary)) + tiny):
            code = round_exact(value.numerator * (2**90 // value.denominator), 90, fmt)
            assert code == slow_round(value, fmt)
    assert round_exact(10**9, 0, fmt) == int(table.codes[-1])
    assert round_exact(0, 5, fmt) == 0


def test_rounding_once_differs_from_rounding_each_product():
    """1/16 * 1/16 is far below minpos of (4, 1); 256 of them are 1, and 256 rounded ones are not."""
    left = np.full((1, 256), POSIT4.encode(np.array(1 / 16)), np.uint8)
    once = POSIT4.decode(quire_matmul(left, left.T, POSIT4))
    assert once.tolist() == [[1.0]]
    each = POSIT4.decode(POSIT4.encode(np.full(256, 1 / 256)))
    assert each.sum() == 0


def test_products_of_p4_only_add_exponents():
    values = POSIT4.values()
    finite = values[np.isfinite(values) & (values != 0)]
    assert (np.abs(np.frexp(finite)[0]) == 0.5).all()


@pytest.mark.parametrize(("bits", "es"), [(8, 0), (16, 1)])
def test_the_quire_of_softposit_agrees(bits, es):
    fmt = posit_format(bits, es, "standard")
    found = [quire_matmul(left[None], right[:, None], fmt)[0, 0] for left, right in operands(bits)]
    assert digest(np.array(found), "<u2") == json.loads(ANSWERS.read_text("utf-8"))[f"quire {bits} {es}"]


def test_not_a_number_spreads_to_its_row_and_column():
    left = POSIT8.encode(np.array([[1.0, np.nan], [1.0, 2.0]]))
    right = POSIT8.encode(np.array([[1.0, 0.0, np.nan], [1.0, 0.0, 1.0]]))
    result = POSIT8.decode(quire_matmul(left, right, POSIT8))
    assert np.isnan(result).tolist() == [[True, True, True], [False, False, True]]
    with pytest.raises(InvalidValueError, match="no code for NaN"):
        quire_matmul(left, right, POSIT8, INT8)


def test_width_of_the_accumulator():
    # (8, 0): 2^-12 to 2^12 is 25 bits and a sign. (16, 1): 2^-56 to 2^56. FP4 counts halves: 12 * 12 = 144.
    assert quire_bits(POSIT8, 1) == 26
    assert quire_bits(POSIT16, 1) == 114
    assert quire_bits(FP4, 1) == 9
    assert quire_bits(POSIT8, 128) == 26 + 7


def test_shapes_are_checked_and_empty_sums_are_zero():
    with pytest.raises(InvalidValueError, match=r"\(m, k\) and \(k, n\)"):
        quire_matmul(np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.uint8), FP4)
    assert quire_matmul(np.zeros((2, 0), np.uint8), np.zeros((0, 3), np.uint8), FP4).tolist() == [[0, 0, 0]] * 2
