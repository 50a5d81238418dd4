"""Rounding with a search for the range: never worse than plain rounding, weighed as asked, to the bit without it."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.quantize.rtn import Rtn, quantize_layer
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import QuantFormat, quantize

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_t(4, (24, 192)).astype(np.float32)
IMPORTANCE = np.exp(1.5 * RNG.standard_normal(192)).astype(np.float32)
FORMATS = ("int8/g32", "int6/g32", "int4/g32", "int4/g32/fp16/min", "int3/g64/fp16/min", "int2/g32/fp16/min",
           "int4/g32/fp16/int", "int4/axis", "int4/tensor", "int4/g80/fp16/min", "ternary/g32", "nf4/g64",
           "fp4/g32/e8m0", "e4m3/axis", "int2/g16")


def group_errors(fmt, made, importance=None):
    error = (made.dense().astype(np.float64) - WEIGHT)**2 * (1 if importance is None else importance)
    if fmt.granularity.kind == "tensor":
        return error.sum(keepdims=True)
    size = fmt.granularity.group or WEIGHT.shape[1]
    return np.add.reduceat(error, range(0, WEIGHT.shape[1], size), axis=1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("importance", [None, IMPORTANCE], ids=["plain", "weighted"])
def test_no_group_is_worse_than_the_plain_span_and_the_whole_is_better(name, importance):
    fmt = QuantFormat.parse(name)
    plain = group_errors(fmt, quantize_layer(WEIGHT, fmt, Rtn(search=False)), importance)
    found = group_errors(fmt, quantize_layer(WEIGHT, fmt, importance=importance), importance)
    assert (found <= plain * (1 + 1e-5)).all()
    assert found.sum() < (1.00001 if name.endswith("e8m0") else 0.99) * plain.sum()


@pytest.mark.parametrize("name", FORMATS)
def test_without_the_search_it_is_the_rounding_of_core(name):
    fmt = QuantFormat.parse(name)
    made = quantize_layer(WEIGHT, fmt, Rtn(search=False))
    codes, scales, second = quantize(WEIGHT, fmt)
    np.testing.assert_array_equal(made.codes, codes)
    np.testing.assert_array_equal(made.scales, scales)
    assert (made.zeros is not None, made.minima is not None) == (fmt.zero == "int", fmt.zero == "min")
    if second is not None:
        np.testing.assert_array_equal(made.zeros if fmt.zero == "int" else made.minima, second)


def test_the_code_without_a_twin_serves_the_largest_value():
    row = np.linspace(-1, 1, 32, dtype=np.float32)[None]
    row[0, -1] = 1.3
    made = quantize_layer(row, QuantFormat.parse("int2/g32/fp32"))
    assert made.scales[0, 0] < 0
    assert made.codes.min() == -2


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("x", [np.zeros((3, 64)), np.full((3, 64), -2.5), np.eye(3, 64) * 7, np.full((3, 64), 1e-30)],
                         ids=["zeros", "all equal", "one value", "tiny"])
def test_degenerate_groups_are_finite_and_close(name, x):
    fmt, x = QuantFormat.parse(name), x.astype(np.float32)
    value, plain = (quantize_layer(x, fmt, Rtn(search)).dense() for search in (True, False))
    assert np.isfinite(value).all()
    assert ((value - x)**2).sum() <= ((plain - x)**2).sum() * (1 + 1e-5)


@pytest.mark.parametrize(("given", "words"), [
    ({"weight": WEIGHT[0]}, "(out, in)"), ({"weight": np.full((2, 2), np.inf)}, r"element \(0, 0\) is inf"),
    ({"importance": IMPORTANCE[:5]}, r"\(192,\); given \(5,\)"),
])
def test_what_does_not_fit_is_refused(given, words):
    given = {"weight": WEIGHT, "importance": None, **given}
    with pytest.raises(InvalidValueError, match=words):
        quantize_layer(given["weight"], QuantFormat.parse("int4/g32"), importance=given["importance"])
