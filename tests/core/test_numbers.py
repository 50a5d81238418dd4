"""Number formats against an independent implementation, code by code; quantisation against its own promises."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as arrays
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.core.errors import InvalidValueError, collect_notices
from edgewise.core.numbers import (
    BF16,
    E4M3,
    E5M2,
    E8M0,
    FP4,
    FP16,
    FP32,
    INT1,
    INT2,
    INT4,
    INT8,
    MXFP4,
    NF4,
    POSIT8,
    TERNARY,
    Granularity,
    NumberFormat,
    QuantFormat,
    bf16_to_float32,
    dequantize,
    float32_to_bf16,
    int_format,
    quantize,
    round_to,
)

PEERS = {
    E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2, E8M0: ml_dtypes.float8_e8m0fnu,
    FP4: ml_dtypes.float4_e2m1fn, BF16: ml_dtypes.bfloat16, FP16: np.float16,
}
SMALL = [E4M3, E5M2, E8M0, FP4]


def peer_values(fmt: NumberFormat) -> np.ndarray:
    codes = np.arange(2**fmt.bits, dtype=np.uint8 if fmt.bits <= 8 else np.uint16)
    if fmt.bits == 4:
        return codes.astype(np.uint8).view(PEERS[fmt]).astype(np.float32)
    return codes.view(PEERS[fmt]).astype(np.float32)


def probes(fmt: NumberFormat) -> np.ndarray:
    """Every value, every midpoint between neighbours, and a step to each side of every midpoint; within range."""
    values = np.unique(fmt.values()[np.isfinite(fmt.values())])
    middles = (values[1:] + values[:-1]) / 2
    points = np.concatenate([values, middles, np.nextafter(middles, -np.inf), np.nextafter(middles, np.inf)])
    return points[np.abs(points) <= fmt.max_value]


@pytest.mark.parametrize("fmt", PEERS, ids=str)
def test_every_code_decodes_as_the_peer_says(fmt):
    codes = np.arange(2**fmt.bits)
    np.testing.assert_array_equal(fmt.decode(codes), peer_values(fmt))


@pytest.mark.parametrize("fmt", PEERS, ids=str)
def test_every_finite_code_survives_a_round_trip(fmt):
    values = fmt.values()
    finite = np.isfinite(values)
    np.testing.assert_array_equal(fmt.decode(fmt.encode(values[finite])), values[finite].astype(np.float32))


@pytest.mark.parametrize("fmt", [f for f in SMALL if f != E8M0] + [BF16], ids=str)
def test_every_midpoint_rounds_to_even_as_the_peer_does(fmt):
    points = probes(fmt).astype(np.float32)  # the peers convert from float32 without a second rounding
    np.testing.assert_array_equal(fmt.decode(fmt.encode(points)), points.astype(PEERS[fmt]).astype(np.float32))


@pytest.mark.parametrize("fmt", [*PEERS, NF4, POSIT8, INT1], ids=str)
def test_encode_is_nearest_by_brute_force(fmt):
    values = fmt.values()[np.isfinite(fmt.values())]
    rng = np.random.default_rng(0)
    scale = 1.0 if fmt.bits > 8 else min(fmt.max_value, 64.0)
    points = rng.normal(0, scale, 500)
    error = np.abs(fmt.decode(fmt.encode(points)).astype(np.float64) - points)
    best = np.array([np.abs(values - p).min() for p in points])
    np.testing.assert_allclose(error, best, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fmt", [*PEERS, NF4, POSIT8], ids=str)
def test_beyond_the_largest_value_saturates(fmt):
    assert fmt.decode(fmt.encode(np.array([fmt.max_value * 3]))).tolist() == [np.float32(fmt.max_value)]
    assert round_to(np.array([3.4e38], np.float32), fmt).tolist() == [np.float32(fmt.max_value)]


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E8M0, BF16, FP16, POSIT8], ids=str)
def test_nan_has_a_code(fmt):
    decoded = fmt.decode(fmt.encode(np.array([1.0, np.nan, 2.0])))
    assert np.isnan(decoded).tolist() == [False, True, False]
    assert decoded[[0, 2]].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("fmt", [FP4, NF4, INT1, INT8], ids=str)
def test_a_format_without_nan_says_so(fmt):
    with pytest.raises(InvalidValueError, match="no code for NaN"):
        fmt.encode(np.array([np.nan]))


def test_largest_values():
    largest = {E4M3: 448, E5M2: 57344, FP4: 6, FP16: 65504, INT8: 127, INT4: 7, TERNARY: 1, POSIT8: 64, NF4: 1}
    assert {fmt: fmt.max_value for fmt in largest} == largest


def test_posit8_values_by_hand():
    # 0 10 00000 = 1; 0 110 0000 = 2; 0 10 10000 = 1.5; 0 01 00000 = 0.5; 0 0000001 = 2^-6; two's complement negates
    by_code = {0b01000000: 1.0, 0b01100000: 2.0, 0b01010000: 1.5, 0b00100000: 0.5, 1: 2**-6, 0b11000000: -1.0}
    decoded = POSIT8.decode(np.array(list(by_code)))
    assert decoded.tolist() == list(by_code.values())


@pytest.mark.parametrize(("fmt", "expected"), [
    (INT8, (-128, 127)), (INT2, (-2, 1)), (TERNARY, (-1, 1)), (int_format(4, signed=False), (0, 15)),
    (int_format(4, restricted=True), (-7, 7)),
])
def test_code_range(fmt, expected):
    assert fmt.code_range == expected
    assert fmt.values().tolist() == list(range(expected[0], expected[1] + 1))


def test_integers_round_ties_to_even():
    assert INT8.encode(np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 200, -200])).tolist() == [
        0, 2, 2, 0, -2, 126, 127, 127, -128]


@pytest.mark.parametrize("bits", [0, 17])
def test_integers_have_1_to_16_bits(bits):
    with pytest.raises(InvalidValueError, match="1 to 16"):
        int_format(bits)


def test_bf16_matches_the_peer_on_random_bits():
    bits = np.random.default_rng(1).integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    ours = bf16_to_float32(float32_to_bf16(x))
    with np.errstate(invalid="ignore"):
        theirs = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(ours, theirs)


# ---- formats as text ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "same"), [
    ("int4/g32/fp16/min", "int4/g32/fp16/min"), ("int8", "int8/axis/fp16"), (" INT8/Tensor/FP32 ", "int8/tensor/fp32"),
    ("fp4/g32/e8m0", "fp4/g32/e8m0"), ("int4/g64/bf16/int", "int4/g64/bf16/int"), ("nf4/g64", "nf4/g64/fp16"),
])
def test_parse_and_str(text, same):
    fmt = QuantFormat.parse(text)
    assert str(fmt) == same
    assert QuantFormat.parse(str(fmt)) == fmt


@pytest.mark.parametrize(("text", "message"), [
    ("int9", "not of the form"), ("", "not of the form"), ("int4/g0", "granularity"), ("int4/row", "granularity"),
    ("int4/g32/int8", "scale"), ("int4/g32/fp16/zero", "expected none, int or min"), ("a/b/c/d/e", "not of the form"),
    ("nf4/g32/fp16/min", "integer element"), ("ternary/axis/fp16/min", "not restricted"), ("int4/g-1", "granularity"),
])
def test_parse_says_what_it_expects(text, message):
    with pytest.raises(InvalidValueError, match=message):
        QuantFormat.parse(text)


def test_mxfp4_is_what_parse_gives():
    assert QuantFormat.parse("fp4/g32/e8m0") == MXFP4


@pytest.mark.parametrize(("text", "bits"), [
    ("int4/g32", 4.5), ("int4/g32/fp16/min", 5.0), ("int4/g32/fp16/int", 4.625), ("int8", 8), ("fp4/g32/e8m0", 4.25),
])
def test_bits_per_weight(text, bits):
    assert QuantFormat.parse(text).bits_per_weight == bits


def test_nbytes_counts_codes_scales_and_zeros():
    assert QuantFormat.parse("int4/g32/fp16/min").nbytes((10, 64)) == 10 * 32 + 10 * 2 * (2 + 2)
    assert QuantFormat.parse("int4/g32").nbytes((10, 33)) == 10 * 17 + 10 * 2 * 2
    assert QuantFormat.parse("int8/tensor/fp32").nbytes((10, 33)) == 330 + 4
    assert QuantFormat.parse("int3/axis").nbytes((2, 5)) == 2 * 2 + 2 * 2


# ---- quantize and dequantize --------------------------------------------------------------------------------------

FORMATS = ["int2/g32", "int3/g16", "int4/g32", "int4/g32/fp16/min", "int4/g32/fp16/int", "int8/axis/fp32",
           "int8/tensor/fp32", "e4m3/axis/fp32", "e5m2/g32/fp32", "fp4/g32/e8m0", "nf4/g64", "posit8_0/g32/fp32",
           "ternary/axis", "int8/g32/fp32/min", "int5/axis/bf16/min"]


def restore(x: np.ndarray, fmt: QuantFormat) -> np.ndarray:
    codes, scales, zeros = quantize(x, fmt)
    return dequantize(codes, scales, fmt, zeros=zeros if fmt.zero == "int" else None,
                      minima=zeros if fmt.zero == "min" else None)


def slow_quantize_row(row: list[float], fmt: QuantFormat) -> list[float]:
    """One group at a time, one value at a time, in float32, for symmetric integers and for minima."""
    size = fmt.granularity.group if fmt.granularity.kind == "group" else len(row)
    out: list[float] = []
    for start in range(0, len(row), size):
        group = [np.float32(v) for v in row[start:start + size]]
        if fmt.zero == "none":
            high = fmt.element.code_range[1]
            scale = round_to(np.float32([max(abs(v) for v in group) / np.float32(high)]), fmt.scale)[0] or np.float32(1)
            out += [np.float32(min(max(np.rint(v / scale), fmt.element.code_range[0]), high)) * scale for v in group]
        else:
            levels = 2**fmt.element.bits - 1
            low = round_to(np.float32([min(group)]), fmt.scale)[0]
            step = (max(group) - min(group)) / np.float32(levels)
            scale = round_to(np.float32([step]), fmt.scale)[0] or np.float32(1)
            out += [np.float32(min(max(np.rint((v - low) / scale), 0), levels)) * scale + low for v in group]
    return out


@pytest.mark.parametrize("text", ["int4/g32", "int3/g16", "int8/axis/fp32", "int4/g32/fp16/min", "int5/axis/bf16/min"])
@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 100])
def test_agrees_with_the_slow_transcription(text, inputs):
    fmt = QuantFormat.parse(text)
    x = np.random.default_rng(2).normal(0, 2, (5, inputs)).astype(np.float32)
    expected = np.array([slow_quantize_row(row.tolist(), fmt) for row in x], np.float32)
    np.testing.assert_array_equal(restore(x, fmt), expected)


@pytest.mark.parametrize("text", FORMATS)
@given(data=st.data())
def test_error_is_bounded_and_shapes_are_kept(text, data):
    fmt = QuantFormat.parse(text)
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 70)))
    x = data.draw(arrays.arrays(np.float32, shape, elements=st.floats(-100, 100, width=32)))
    codes, scales, zeros = quantize(x, fmt)
    groups = fmt.granularity.groups(shape[1])
    assert codes.shape == shape
    assert scales.shape == ((1, 1) if fmt.granularity.kind == "tensor" else (shape[0], groups))
    assert (zeros is None) == (fmt.zero == "none")
    assert (scales > 0).all()
    assert np.array_equal(round_to(scales, fmt.scale), scales)
    y = restore(x, fmt)
    size = shape[1] if fmt.granularity.kind != "group" else fmt.granularity.group
    spread = scales if fmt.granularity.kind != "group" else np.repeat(scales, size, axis=1)[:, :shape[1]]
    values = np.unique(fmt.element.values()[np.isfinite(fmt.element.values())])
    widest = float(np.diff(values).max()) if fmt.element.kind != "int" else 1.0
    # Half the widest step, plus what rounding the scale (and the minimum) to its own format can take away at the ends.
    rounding = {"fp16": 2.0**-10, "bf16": 2.0**-7, "fp32": 2.0**-22, "e8m0": 0.0}[str(fmt.scale)]
    top = fmt.element.max_value
    bound = spread * (widest / 2 + rounding * top) + np.abs(x).max() * rounding * 2 + 1e-6
    zeroed = (spread == 1) & (np.abs(x) < 1e-3 * top)  # a scale below the scale's format: the group becomes zero
    assert (np.abs(y - x) <= np.where(zeroed, np.maximum(bound, np.abs(x)), bound)).all()


@pytest.mark.parametrize("text", FORMATS)
def test_zero_group_is_exact(text):
    x = np.zeros((2, 70), np.float32)
    x[1] = 1.0
    y = restore(x, QuantFormat.parse(text))
    if "tensor" not in text:
        assert (y[0] == 0).all()


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.37, 1e-3])
def test_one_element_and_all_equal(text, value):
    fmt = QuantFormat.parse(text)
    relative = {"e8m0": 0.34}.get(str(fmt.scale), 2.0**-7)  # MXFP4 keeps a power of two as scale: up to a third off
    if value < 0 and fmt.element in (NF4,):
        relative = 1e-2
    for shape in ((1, 1), (3, 40)):
        y = restore(np.full(shape, value, np.float32), fmt)
        np.testing.assert_allclose(y, value, rtol=relative)


@pytest.mark.parametrize("text", ["int4/g32", "int8/axis/fp32", "e4m3/axis/fp32", "int4/g32/fp16/int"])
def test_a_second_pass_changes_nothing(text):
    fmt = QuantFormat.parse(text)
    once = restore(np.random.default_rng(3).normal(size=(4, 64)).astype(np.float32), fmt)
    np.testing.assert_allclose(restore(once, fmt), once, rtol=2e-3, atol=2e-3)


def test_power_of_two_scale_holds_the_peak():
    x = np.array([[6.0, 7.0, 0.1, -5.0]], np.float32)
    _, scales, _ = quantize(x, QuantFormat.parse("fp4/g4/e8m0"))
    assert scales.tolist() == [[2.0]]


def test_integer_zero_point_keeps_zero_exact():
    x = np.array([[0.0, 5.0, 3.0, 1.0], [0.0, -5.0, -3.0, -1.0]], np.float32)
    assert (restore(x, QuantFormat.parse("int4/axis/fp32/int"))[:, 0] == 0).all()


def test_unsigned_symmetric_uses_all_codes():
    fmt = QuantFormat(int_format(4, signed=False), Granularity("axis"), FP32)
    codes, scales, _ = quantize(np.array([[0.0, 15.0, 30.0]], np.float32), fmt)
    assert codes.tolist() == [[0, 8, 15]]
    assert scales.tolist() == [[2.0]]


def test_a_scale_beyond_its_format_is_a_notice():
    with collect_notices() as notices:
        y = restore(np.array([[1e9, -1.0]], np.float32), QuantFormat.parse("int8/axis/fp16"))
    assert [n.kind for n in notices] == ["clamp"]
    assert y[0, 0] == 127 * 65504


@pytest.mark.parametrize(("x", "message"), [
    (np.zeros(3, np.float32), "(out, in)"), (np.array([[1.0, np.nan]]), r"element (0, 1) is nan"),
    (np.array([[np.inf]]), "element (0, 0) is inf"), (np.zeros((0, 4)), "at least one value"),
    (np.zeros((4, 0)), "at least one value"),
])
def test_quantize_refuses(x, message):
    with pytest.raises(InvalidValueError) as caught:
        quantize(x, QuantFormat.parse("int8"))
    assert message in str(caught.value)


def test_dequantize_needs_its_zeros():
    for text in ("int4/g32/fp16/min", "int4/g32/fp16/int"):
        with pytest.raises(InvalidValueError, match="needs"):
            dequantize(np.zeros((1, 32), np.uint8), np.ones((1, 1), np.float32), QuantFormat.parse(text))


def test_a_format_is_a_value():
    assert QuantFormat.parse("int4/g32") == QuantFormat(INT4, Granularity("group", 32), FP16)
    assert len({QuantFormat.parse("int4/g32"), QuantFormat.parse("int4/g32/fp16/none")}) == 1
    with pytest.raises(InvalidValueError, match="at least one value"):
        QuantFormat(INT4, Granularity("group", 0))
    with pytest.raises(InvalidValueError, match="integer element"):
        QuantFormat(NF4, Granularity("axis"), FP16, "min")


def test_quantize_refuses_nested_scales():
    nested = QuantFormat(INT4, Granularity("group", 32), QuantFormat.parse("int6/g16"))
    with pytest.raises(InvalidValueError, match="themselves quantised"):
        quantize(np.ones((1, 32), np.float32), nested)
    assert nested.bits_per_weight == 4 + (6 + 1) / 32


def test_large_values_lists_are_refused():
    with pytest.raises(InvalidValueError, match="up to 16 bits"):
        FP32.values()
    assert math.isfinite(FP32.max_value)
