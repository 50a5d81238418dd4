"""AWQ: the search written out slowly, the reparametrisation exact, and what it wins on what it measures."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.quantize.awq import Awq, clipped_layer, product_error, scales_of
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import QuantFormat, dequantize, quantize

RNG = np.random.default_rng(5)
INPUTS = 64
X = RNG.standard_normal((300, INPUTS)) * np.exp(1.2 * RNG.standard_normal(INPUTS))
X = X @ (np.eye(INPUTS) + 0.05 * RNG.standard_normal((INPUTS, INPUTS)))
GRAM, SIZES = X.T @ X, np.sqrt((X**2).mean(axis=0))
WEIGHTS = [RNG.standard_normal((rows, INPUTS)).astype(np.float32) for rows in (12, 20)]
FMT = QuantFormat.parse("int3/g32/fp16/min")


def rounded(weight, fmt=FMT):
    codes, scales, second = quantize(weight, fmt)
    kind = {"int": {"zeros": second}, "min": {"minima": second}}.get(fmt.zero, {})
    return dequantize(codes, scales, fmt, **kind)


def error_of(s):
    """Sum over the linears of ||(W' - W) X||^2, sample by sample."""
    s = s.astype(np.float32)
    return sum((((rounded(weight * s) / s).astype(np.float64) - weight) @ X.T).ravel() @
               (((rounded(weight * s) / s).astype(np.float64) - weight) @ X.T).ravel() for weight in WEIGHTS)


def test_it_is_the_search_written_out():
    found, errors = {}, {}
    for step in range(20):
        alpha = step / 20
        s = SIZES**alpha
        found[alpha] = s / np.sqrt(s.max() * s.min())
        errors[alpha] = error_of(found[alpha])
    best = min(errors, key=errors.__getitem__)
    scale, alpha = scales_of(WEIGHTS, SIZES, GRAM, FMT)
    assert alpha == best
    np.testing.assert_allclose(scale, found[best], rtol=1e-12)
    assert alpha > 0
    assert errors[best] < 0.8 * errors[0.0]


def test_the_error_of_the_product_needs_no_samples():
    change = RNG.standard_normal((7, INPUTS)).astype(np.float32)
    assert product_error(change, GRAM) == pytest.approx(float(((change @ X.T)**2).sum()), rel=1e-5)


def test_equal_inputs_gain_nothing():
    scale, alpha = scales_of(WEIGHTS, np.full(INPUTS, 3.0), np.eye(INPUTS), FMT)
    assert alpha == 0
    np.testing.assert_array_equal(scale, 1)


def test_inputs_of_one_channel_share_a_scale():
    origin = np.arange(INPUTS) % 16

    def shared(values):
        top = np.zeros(16)
        np.maximum.at(top, origin, values)
        return top[origin]

    scale, _ = scales_of(WEIGHTS, SIZES, GRAM, FMT, shared=shared)
    np.testing.assert_array_equal(scale, scale[:16][origin])


def test_clipping_is_the_search_written_out():
    weight = RNG.standard_t(3, (6, INPUTS)).astype(np.float32)
    expected = np.empty_like(weight)
    for row in range(6):
        for start in (0, 32):
            part, inputs = weight[row:row + 1, start:start + 32], X[:, start:start + 32]
            tries = []
            for step in range(10):
                limit = np.abs(part).max() * np.float32(1 - step / 20)
                value = rounded(np.clip(part, -limit, limit))
                tries.append((float((((value - part).astype(np.float64) @ inputs.T)**2).sum()), step, value))
            expected[row, start:start + 32] = min(tries, key=lambda one: one[:2])[2]
    np.testing.assert_array_equal(clipped_layer(weight, GRAM, FMT).dense(), expected)
    off = clipped_layer(weight, GRAM, FMT, Awq(clip=False)).dense()
    np.testing.assert_array_equal(off, rounded(weight))

    def by_groups(value):
        gap = (value - weight).astype(np.float64)
        return sum(((gap[:, start:start + 32] @ X[:, start:start + 32].T)**2).sum() for start in (0, 32))

    assert by_groups(expected) < 0.9 * by_groups(off)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: scales_of(WEIGHTS, SIZES[:3], GRAM, FMT), "not of the same inputs"),
    (lambda: clipped_layer(WEIGHTS[0], GRAM[:4, :4], FMT), "not of the same inputs"),
    (lambda: Awq(steps=0), "steps are at least 1"), (lambda: Awq(clip_most=1.0), "clip_most"),
])
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(InvalidValueError, match=words):
        call()
