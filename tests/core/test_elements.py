"""Every code of every element against an implementation that is not ours: ml_dtypes, SoftPosit, tables by hand."""

from __future__ import annotations

import json
import math
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from softposit_peer import ANSWERS, digest, points

from edgewise.core.elements import (
    ELEMENTS,
    INT2,
    INT4,
    INT8,
    NF4,
    POSIT4,
    POSIT8,
    POSIT16,
    UINT2,
    UINT4,
    UINT8,
    NumberFormat,
    int_format,
    nested_prefix,
    posit_format,
    round_to,
    rounding_table,
)
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import MXFP4, QuantFormat, best_peak, dequantize, quantize
from edgewise.core.posit import posit_parts, posit_value

with_name = pytest.mark.parametrize("name", [name for name, fmt in ELEMENTS.items() if fmt.bits <= 16])


@with_name
def test_every_value_survives_and_every_boundary_is_where_it_says(name):
    fmt = ELEMENTS[name]
    table = rounding_table(fmt)
    np.testing.assert_array_equal(fmt.encode(table.values), table.codes)
    assert (np.diff(table.values) > 0).all()
    lower, upper = table.values[:-1], table.values[1:]
    assert ((lower <= table.exact) & (table.exact <= upper)).all()
    boundary = table.exact != 0  # around zero, where a posit may not go, there are two in one place
    places = np.flatnonzero(boundary)
    for x, place in ((np.nextafter(table.exact, -np.inf), places), (np.nextafter(table.exact, np.inf), places + 1),
                     (table.exact, places + table.up[boundary])):
        np.testing.assert_array_equal(fmt.decode(fmt.encode(x[boundary])), fmt.decode(table.codes)[place])


@pytest.mark.parametrize(("fmt", "peer"), [(INT4, ml_dtypes.int4), (UINT4, ml_dtypes.uint4), (INT2, ml_dtypes.int2),
                                           (UINT2, ml_dtypes.uint2), (INT8, np.int8), (UINT8, np.uint8)], ids=str)
def test_integers_have_the_codes_of_the_peer(fmt, peer):
    low, high = fmt.code_range
    kinds = {"min": np.iinfo, "max": np.iinfo} if peer in (np.int8, np.uint8) else {
        "min": ml_dtypes.iinfo, "max": ml_dtypes.iinfo}
    assert (kinds["min"](peer).min, kinds["max"](peer).max) == (low, high)
    whole = np.arange(low, high + 1)
    assert np.array_equal(fmt.decode(fmt.encode(whole)), whole.astype(peer).astype(np.float32))


# ---- posits -------------------------------------------------------------------------------------------------------

def test_posit4_is_the_table_of_the_paper():
    positive = [0, 1 / 16, 1 / 4, 1 / 2, 1, 2, 4, 16]
    values = POSIT4.values()
    assert values[:8].tolist() == positive
    assert math.isnan(values[8])
    assert values[9:].tolist() == [-v for v in positive[:0:-1]]


def test_facts_of_the_standard():
    """maxpos = 2^(2^es (n - 2)), minpos its inverse, one at 01000..., negation is the two's complement."""
    for fmt in (POSIT4, POSIT8, POSIT16, posit_format(6, 2), posit_format(5, 0)):
        values = fmt.values()
        assert np.nanmax(values) == 2.0 ** (2**fmt.es * (fmt.bits - 2))
        assert values[1] == 1 / np.nanmax(values)
        assert values[1 << (fmt.bits - 2)] == 1
        codes = np.arange(1, 1 << (fmt.bits - 1))
        np.testing.assert_array_equal(values[(1 << fmt.bits) - codes], -values[codes])
        assert (np.diff(values[1:1 << (fmt.bits - 1)]) > 0).all()


def test_posit8_is_fine_around_one():
    values = POSIT8.values()[1:128]
    assert (values[0], values[-1]) == (1 / 64, 64)
    assert np.unique(np.diff(values[(values >= 1) & (values <= 2)])).tolist() == [1 / 32]


def test_parts_make_the_value():
    for bits, es in ((4, 1), (8, 0), (16, 1), (6, 2)):
        for code in range(1 << bits):
            parts = posit_parts(code, bits, es)
            if parts is None:
                assert code in (0, 1 << (bits - 1))
                continue
            negative, exponent, significand, fraction_bits = parts
            assert significand >> fraction_bits == 1
            value = (-1) ** negative * significand * 2.0 ** (exponent - fraction_bits)
            assert value == posit_value(code, bits, es)


@pytest.mark.parametrize(("bits", "es"), [(8, 0), (16, 1)])
def test_every_code_decodes_and_every_boundary_rounds_as_softposit_says(bits, es):
    answers = json.loads(ANSWERS.read_text("utf-8"))
    fmt = posit_format(bits, es, "standard")
    values = fmt.values()
    assert digest(values[~np.isnan(values)], "<f8") == answers[f"decode {bits} {es}"]
    assert digest(fmt.encode(points(bits, es)), "<u2") == answers[f"encode {bits} {es}"]


def test_the_three_roundings_of_a_posit():
    points = np.array([0.0, 1e-6, -1e-6, 1 / 32, 0.04, 9.0, 10.0, 11.0, 1e9])
    nearest, nonzero, standard = (round_to(points, posit_format(4, 1, kind)).tolist()
                                  for kind in ("nearest", "nonzero", "standard"))
    assert nearest == [0, 0, 0, 0, 0.0625, 4, 4, 16, 16]
    assert nonzero == [0, 0.0625, -0.0625, 0.0625, 0.0625, 4, 4, 16, 16]
    assert standard == [0, 0.0625, -0.0625, 0.0625, 0.0625, 16, 16, 16, 16]


@pytest.mark.parametrize(("bits", "es"), [(2, 0), (17, 1), (8, 4), (8, -1)])
def test_posits_have_bounds(bits, es):
    with pytest.raises(InvalidValueError, match="3 to 16 bits"):
        posit_format(bits, es)
    with pytest.raises(InvalidValueError, match="nearest, or for posits"):
        NumberFormat("int", 8, rounding="standard")


# ---- bit prefixes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("element", [INT8, UINT8, INT4, UINT4], ids=str)
@pytest.mark.parametrize("rule", ["rounded", "middle"])
def test_prefixes_against_a_slow_transcription(element, rule):
    low, high = element.code_range
    for bits in range(1, element.bits + 1):
        step = 2 ** (element.bits - bits)
        top = (2 ** (bits - 1) if element.signed else 2**bits) - 1
        for code in range(low, high + 1):
            if step == 1:
                expected = code
            elif rule == "rounded":
                expected = min(math.floor(code / step + 0.5), top) * step
            else:
                same = [other for other in range(low, high + 1) if math.floor(other / step) == math.floor(code / step)]
                expected = sum(same) / len(same)
            assert nested_prefix(np.array([code]), element, bits, rule)[0] == expected


def test_the_middle_of_a_prefix_needs_nothing_but_the_prefix():
    codes = np.arange(-128, 128)
    kept = codes >> 5 << 5
    np.testing.assert_array_equal(nested_prefix(codes, INT8, 3, "middle"), nested_prefix(kept, INT8, 3, "middle"))


def test_more_bits_of_the_same_codes_are_closer():
    x = np.random.default_rng(0).normal(size=(16, 256)).astype(np.float32)
    for text in ("int8/g32/fp16", "int8/g32/fp16/min", "int8/axis/fp32/int"):
        fmt = QuantFormat.parse(text)
        codes, scales, zeros = quantize(x, fmt)
        errors = []
        for bits in (8, 6, 4, 3, 2):
            y = dequantize(codes, scales, fmt, zeros=zeros if fmt.zero == "int" else None,
                           minima=zeros if fmt.zero == "min" else None, bits=bits)
            errors.append(float(np.square(y - x).mean()))
        assert errors == sorted(errors)
        assert errors[0] < errors[-1] / 100


@pytest.mark.parametrize(("element", "bits", "message"), [
    (INT8, 9, "1 to 8 bits"), (INT8, 0, "1 to 8 bits"), (POSIT8, 4, "plain integer"),
    (int_format(4, restricted=True), 2, "plain integer")])
def test_prefixes_are_checked(element, bits, message):
    with pytest.raises(InvalidValueError, match=message):
        nested_prefix(np.zeros(3, np.int8), element, bits)


# ---- peaks --------------------------------------------------------------------------------------------------------

@given(scale=st.floats(0.01, 100))
def test_a_searched_peak_is_no_worse_than_any(scale):
    x = np.random.default_rng(1).normal(0, scale, (4, 128)).astype(np.float32)

    def error(fmt):
        codes, scales, _ = quantize(x, fmt)
        return float(np.square(dequantize(codes, scales, fmt).astype(np.float64) - x).sum())

    for name in ("posit8_0", "posit4_1", "fp4"):
        found = error(best_peak(x, QuantFormat.parse(f"{name}/axis/fp32")))
        for peak in (0, 0.5, 1, 2, 4):
            assert found <= error(QuantFormat.parse(f"{name}@{peak}/axis/fp32"))


def test_posits_want_their_peak_in_the_dense_zone():
    x = np.random.default_rng(2).normal(size=(8, 256)).astype(np.float32)
    assert 1 <= best_peak(x, QuantFormat.parse("posit8_0/axis/fp32")).peak <= 16
    with pytest.raises(InvalidValueError, match="searched"):
        best_peak(x, QuantFormat.parse("int4"))


@pytest.mark.parametrize("text", ["posit8_0@4/axis/fp32", "fp4@4/g32/fp16", "posit16_1standard/axis/fp16",
                                  "posit4_1nonzero@0.5/tensor/bf16", "int4r/g32/fp16", "uint8/tensor/fp32",
                                  "int1/g32/fp16/min"])
def test_parse_and_str(text):
    assert str(QuantFormat.parse(text)) == text


@pytest.mark.parametrize(("text", "message"), [("posit8_0@65", "peak lies"), ("posit8_0@x", "expected a number"),
                                               ("int8@-1", "peak lies"), ("int8@4/axis/fp16/min", "peak lies"),
                                               ("fp4@nan", "peak lies")])
def test_peaks_are_checked(text, message):
    with pytest.raises(InvalidValueError, match=message):
        QuantFormat.parse(text)


# ---- NF4 ----------------------------------------------------------------------------------------------------------

def test_nf4_is_made_of_quantiles_of_the_normal_distribution():
    """QLoRA, section 3 and its code: 8 quantiles above and 7 below zero, from an offset that shares out the tails."""
    normal = NormalDist()
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2  # mean of 1 - 1/(2 * 15) and 1 - 1/(2 * 16)
    above = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.sort([*above, 0.0, *below]) / max(above)
    np.testing.assert_allclose(NF4.codebook, values, atol=2e-6)


def test_mxfp4_against_the_peer():
    """Codes of FP4 by ml_dtypes, scales that E8M0 of ml_dtypes can hold: the product is what we restore."""
    x = np.random.default_rng(0).normal(0, 3, (8, 64)).astype(np.float32)
    codes, scales, _ = quantize(x, MXFP4)
    held = scales.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(held, scales)
    blocks = x.reshape(8, 2, 32) / held[..., None]
    theirs = blocks.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * held[..., None]
    np.testing.assert_array_equal(dequantize(codes, scales, MXFP4), theirs.reshape(x.shape))
    assert (np.abs(blocks) <= 6).all()
    assert (np.abs(blocks).max(axis=-1) > 3).all()
