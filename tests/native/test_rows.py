"""Norms and activation functions of every tier against float64, and against every other tier to the bit."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgewise.native import kernels
from edgewise.native.probe import tiers

TIERS = tiers()
SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 576]
BOUND = 4e-6
"""Of a norm: the largest difference over the largest value of a row; float32 sums of a few hundred squares."""

ULPS = {"silu": 6.0, "gelu": 2.0, "gelu_tanh": 12.0, "relu": 0.0}
"""Of an activation function: float32 roundings relative to |x| / 2, the scale on which it is a product of x."""


def same_on_all_tiers(call) -> np.ndarray:
    results = [call(tier) for tier in TIERS]
    for tier, result in zip(TIERS, results, strict=True):
        assert np.array_equal(result.view(np.uint32), results[0].view(np.uint32)), tier
    return results[0]


def rows(n: int, offset: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(n)
    x = rng.standard_normal((5, n)) * np.array([[1e-3], [0.1], [1.0], [30.0], [1e4]]) + offset
    return x.astype(np.float32)


def assert_rows_close(found: np.ndarray, expected: np.ndarray, bound: float = BOUND) -> None:
    miss = np.abs(found - expected).max(axis=1)
    assert (miss <= bound * np.maximum(np.abs(expected).max(axis=1), 1e-6)).all(), miss


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(n, eps, weighted):
    x = rows(n)
    weight = np.random.default_rng(1).standard_normal(n).astype(np.float32) if weighted else None
    found = same_on_all_tiers(lambda tier: kernels.rms_norm(x, weight, eps, tier))
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + eps) * (1.0 if weight is None else weight)
    assert_rows_close(found, expected)


# The variance of one value is zero: with a tiny eps the norm is rounding over rounding.
@pytest.mark.parametrize(("n", "eps"), [(n, eps) for n in SIZES for eps in (1e-12, 1e-2) if n > 1 or eps > 1e-6])
@pytest.mark.parametrize("parts", ["none", "weight", "weight and bias"])
def test_layer_norm(n, eps, parts):
    x = rows(n)
    rng = np.random.default_rng(2)
    weight = rng.standard_normal(n).astype(np.float32) if "weight" in parts else None
    bias = rng.standard_normal(n).astype(np.float32) if "bias" in parts else None
    found = same_on_all_tiers(lambda tier: kernels.layer_norm(x, weight, bias, eps, tier))
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(axis=1, keepdims=True)) / np.sqrt(wide.var(axis=1, keepdims=True) + eps)
    expected = expected * (1.0 if weight is None else weight) + (0.0 if bias is None else bias)
    assert_rows_close(found, expected)


def test_the_variance_of_a_row_far_from_zero():
    """Two passes: the square of the mean is not taken from the mean of squares."""
    x = rows(100, offset=1000.0)[2:3]
    found = same_on_all_tiers(lambda tier: kernels.layer_norm(x, None, None, 1e-5, tier))
    wide = x.astype(np.float64)
    # The mean itself is rounded to 2^-14 here, against a standard deviation of one.
    assert_rows_close(found, (wide - wide.mean()) / np.sqrt(wide.var() + 1e-5), 1e-4)


def test_a_row_of_zeros_and_a_row_of_one_value():
    x = np.zeros((2, 33), np.float32)
    x[1] = 3.0
    rms = same_on_all_tiers(lambda tier: kernels.rms_norm(x, None, 1e-6, tier))
    assert not rms[0].any()
    assert np.allclose(rms[1], 1, atol=1e-6)
    layer = same_on_all_tiers(lambda tier: kernels.layer_norm(x, None, None, 1e-6, tier))
    assert np.abs(layer).max() < 1e-3


def test_epsilon_is_inside_the_root():
    x = np.full((1, 16), 1e-3, np.float32)
    assert kernels.rms_norm(x, None, 1e-2, "reference")[0, 0] == pytest.approx(1e-3 / math.sqrt(1e-6 + 1e-2), rel=1e-5)


FUNCTIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * np.vectorize(math.erfc)(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("n", [16, 64])
def test_functions(name, n):
    values = np.concatenate([np.linspace(-12, 12, 4000), np.geomspace(1e-6, 80, 500), -np.geomspace(1e-6, 80, 500)])
    x = values[:len(values) // n * n].astype(np.float32).reshape(-1, n)
    found = same_on_all_tiers(lambda tier: kernels.pointwise(name, x, tier))
    with np.errstate(over="ignore"):
        expected = FUNCTIONS[name](x.astype(np.float64))
    assert (np.abs(found - expected) <= ULPS[name] * 2.0**-24 * np.abs(x)).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_far_out(name):
    """Where the exponential over- or underflows: x on one side, nothing on the other."""
    x = np.float32([[100, 1e4, 1e30, 3e38, -100, -1e4, -1e30, -3e38, 0, 1e-45, 88.7, -88.7, 87.4, -87.4, 1, -1]])
    with np.errstate(over="ignore", invalid="ignore"):
        found = same_on_all_tiers(lambda tier: kernels.pointwise(name, x, tier))
    assert np.isfinite(found).all()
    assert (found[0, :4] == x[0, :4]).all()
    assert (np.abs(found[0, 4:8]) <= np.abs(x[0, 4:8]) * 1e-37).all()
    assert found[0, 8] == 0


@pytest.mark.parametrize("n", [1, 2, 15, 16, 63, 64, 65, 1023, 1024, 1025, 5000])
def test_the_highest_is_the_first_of_equal_ones(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(20):
        x = rng.integers(-50, 50, n).astype(np.float32)  # many are equal
        x[rng.random(n) < 0.1] = np.nan
        expected = 0 if np.isnan(x).all() else int(np.nanargmax(x))
        assert {kernels.highest(x, tier) for tier in TIERS} == {expected}


@pytest.mark.parametrize("fill", [np.nan, -np.inf])
def test_without_a_number_the_highest_is_the_first(fill: float) -> None:
    assert {kernels.highest(np.full(100, fill, np.float32), tier) for tier in TIERS} == {0}


@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 64, 65, 100, 127, 49152])
def test_sums_of_exponentials(n: int) -> None:
    x = np.random.default_rng(n).normal(0, 4, n).astype(np.float32)
    peak = float(x.max())
    found = {kernels.sum_of_exponentials(x, peak, tier) for tier in TIERS}
    assert len(found) == 1
    assert math.isclose(found.pop(), np.exp(x.astype(np.float64) - peak).sum(), rel_tol=2e-6)
