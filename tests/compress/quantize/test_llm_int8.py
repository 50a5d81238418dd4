"""LLM.int8(): the two products written out, which inputs are outliers, and what keeping them apart is worth."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.quantize.llm_int8 import LlmInt8, outliers_of, quantize_layer
from edgewise.core.errors import InvalidValueError, collect_notices
from edgewise.core.numbers import QuantFormat, quantize
from edgewise.core.storage import QuantizedTensor, Sum

RNG = np.random.default_rng(7)
X = RNG.standard_normal((40, 48))
X[:, [5, 30]] *= 20
WEIGHT = RNG.standard_normal((10, 48)).astype(np.float32)
WEIGHT[:, [5, 30]] *= 6  # large where the outliers are: in one grid they would cost all others their precision
PEAKS = np.abs(X).max(axis=0)
FMT = QuantFormat.parse("int8/axis")


def test_it_is_equation_8_written_out():
    made = quantize_layer(WEIGHT, PEAKS, FMT)
    outliers = {j for j in range(48) if max(abs(x[j]) for x in X) > 6.0}
    assert outliers == {5, 30}
    expected = np.zeros((40, 10))
    for i in range(10):
        kept = [WEIGHT[i, j] for j in range(48) if j not in outliers]
        scale = np.float32(np.float16(max(abs(w) for w in kept) / 127))
        for t in range(40):
            for j in range(48):
                if j in outliers:
                    expected[t, i] += X[t, j] * float(np.float16(WEIGHT[i, j]))
                else:
                    expected[t, i] += X[t, j] * float(np.rint(WEIGHT[i, j] / scale)) * float(scale)
    assert isinstance(made, Sum)
    np.testing.assert_allclose(made.matmul(X.astype(np.float32)), expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(X @ made.dense().T, expected, rtol=1e-5, atol=1e-4)


def test_outliers_apart_is_closer_than_all_in_one():
    exact = X @ WEIGHT.T
    codes, scales, _ = quantize(WEIGHT, FMT)
    together = X @ QuantizedTensor(codes, scales, FMT).dense().T
    apart = X @ quantize_layer(WEIGHT, PEAKS, FMT).dense().T
    assert np.square(apart - exact).sum() < 0.2 * np.square(together - exact).sum()


def test_no_outliers_is_plain_rounding():
    made = quantize_layer(WEIGHT, PEAKS, FMT, LlmInt8(threshold=1e9))
    assert isinstance(made, QuantizedTensor)
    np.testing.assert_array_equal(made.codes, quantize(WEIGHT, FMT)[0])


def test_too_many_outliers_are_cut_and_said():
    with collect_notices() as notices:
        found = outliers_of(np.array([7.0, 9.0, 1.0, 8.0] * 5), LlmInt8(most=0.1))
    assert found.tolist() == [1, 5]
    assert "the 2 largest stay" in notices[0].message


@pytest.mark.parametrize(("call", "words"), [
    (lambda: quantize_layer(WEIGHT, PEAKS[:3], FMT), "one number per input"),
    (lambda: quantize_layer(WEIGHT, PEAKS, QuantFormat.parse("int8/g16/fp16/min")), "no exact zero"),
    (lambda: quantize_layer(np.where(np.arange(48) == 5, 1e6, WEIGHT), PEAKS, FMT), "fp16 ends before"),
    (lambda: LlmInt8(most=2.0), "most in"),
])
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(InvalidValueError, match=words):
        call()
