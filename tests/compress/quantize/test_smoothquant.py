"""SmoothQuant: equation 4 number by number, exactness of the fold, and balance of what it balances."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.quantize.smoothquant import SmoothQuant, scales_of
from edgewise.core.errors import InvalidValueError

RNG = np.random.default_rng(6)
X = RNG.standard_normal((50, 16)) * np.exp(2 * RNG.standard_normal(16))
WEIGHTS = [RNG.standard_normal((rows, 16)).astype(np.float32) for rows in (8, 5)]
PEAKS = np.abs(X).max(axis=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_it_is_the_equation_number_by_number(alpha):
    expected = []
    for j in range(16):
        top = max(abs(float(weight[i, j])) for weight in WEIGHTS for i in range(len(weight)))
        expected.append(max(abs(float(x[j])) for x in X)**alpha / top**(1 - alpha))
    np.testing.assert_allclose(scales_of(WEIGHTS, PEAKS, SmoothQuant(alpha)), expected, rtol=1e-12)


def test_half_way_activations_and_weights_have_the_same_peaks():
    s = scales_of(WEIGHTS, PEAKS)
    columns = np.max([np.abs(weight * s).max(axis=0) for weight in WEIGHTS], axis=0)
    np.testing.assert_allclose(columns, np.abs(X / s).max(axis=0), rtol=1e-6)
    for weight in WEIGHTS:
        np.testing.assert_allclose((X / s) @ (weight * s).T, X @ weight.T, rtol=1e-9, atol=1e-9)


def test_dead_inputs_and_columns_have_finite_scales():
    weight = WEIGHTS[0].copy()
    weight[:, 2] = 0
    s = scales_of([weight], np.where(np.arange(16) == 3, 0.0, PEAKS))
    assert np.isfinite(s).all()
    assert (s > 0).all()


@pytest.mark.parametrize(("call", "words"), [
    (lambda: scales_of(WEIGHTS, PEAKS[:3]), "not of the same inputs"), (lambda: scales_of([], PEAKS), "at least one"),
    (lambda: scales_of(WEIGHTS, -PEAKS), "not negative"), (lambda: scales_of(WEIGHTS, PEAKS * np.nan), "finite"),
    (lambda: SmoothQuant(1.5), "in \\[0, 1\\]"),
])
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(InvalidValueError, match=words):
        call()
