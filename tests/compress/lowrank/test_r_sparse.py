"""R-Sparse on arrays against a transcription of the paper's steps, and what follows from them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgewise.compress.lowrank.r_sparse import RSparse, budget_of, decomposed, quantile_of, sparse_layer
from edgewise.core.errors import InvalidValueError
from edgewise.core.storage import Dense

RNG = np.random.default_rng(0)
W = (RNG.standard_normal((48, 80)) * np.exp(RNG.standard_normal(80))).astype(np.float32)
X = (RNG.standard_t(4, (300, 80)) * np.exp(0.5 * RNG.standard_normal(80))).astype(np.float32)


def transcribed(weight, calibration, x, sparsity, alpha):
    """One token, loop by loop. Budget, decomposition, threshold, forward: the steps of the method's card."""
    m, n = weight.shape
    u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    c = [math.sqrt(sum((vt[k, i] * s[k]) ** 2 for k in range(len(s)))) for i in range(n)]
    budget, k = m * n * (1 - sparsity), n * (1 - sparsity) * alpha
    r = max(int((budget - k * m) // (m + n)), 1)
    sizes = sorted(abs(float(row[i])) * c[i] for row in calibration for i in range(n))
    place = (1 - (1 - sparsity) * alpha) * (len(sizes) - 1)
    below = math.floor(place)
    t = sizes[below] + (place - below) * (sizes[min(below + 1, len(sizes) - 1)] - sizes[below])
    kept = [abs(float(x[i])) * c[i] > t for i in range(n)]
    y = np.zeros(m)
    for i in range(n):
        if kept[i]:
            y += weight[:, i] * float(x[i])
        else:
            for k in range(r):
                y += u[:, k] * s[k] * vt[k, i] * float(x[i])
    return y, sum(kept)


@pytest.mark.parametrize(("sparsity", "alpha"), [(0.5, 0.95), (0.5, 0.7), (0.3, 0.5), (0.6, 0.05)])
def test_the_transcription_agrees(sparsity, alpha):
    config = RSparse(sparsity=sparsity, alpha=alpha)
    rank = budget_of(W.shape, sparsity, alpha).rank
    made = sparse_layer(Dense(W), decomposed(W, rank), X[:100], config)
    for x in X[100:110]:
        expected, kept = transcribed(W, X[:100], x, sparsity, alpha)
        assert (np.abs(x) > made.threshold).sum() == kept
        assert np.abs(made.decode(x) - expected).max() < 2e-3 * np.abs(expected).max()  # factors are float16


def test_norms_are_those_of_columns():
    np.testing.assert_allclose(decomposed(W, 3).norms, np.linalg.norm(W, axis=0), rtol=1e-6)


def test_ranks_nest_and_are_the_best_of_their_size():
    parts = decomposed(W, 20)
    s = np.linalg.svd(W, compute_uv=False)
    for rank in (1, 7, 20):
        gap = W - parts.left[:, :rank] @ parts.right[:rank]
        assert np.linalg.norm(gap) == pytest.approx(np.sqrt(np.square(s[rank:]).sum()), rel=1e-4)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.95, 1.0])
def test_a_token_touches_its_budget(sparsity, alpha):
    rows, cols = 576, 1536
    budget = budget_of((rows, cols), sparsity, alpha)
    touched = budget.kept * cols * rows + budget.rank * (rows + cols)
    whole = rows * cols * (1 - sparsity)
    assert touched <= whole + rows + cols
    assert touched > whole - (rows + cols) or alpha == 1
    assert (budget.rank == 0) == (alpha == 1)


def test_the_quantile_keeps_the_share_that_is_asked_for():
    for kept in (0.25, 0.5, 0.9):
        limit = quantile_of(X, np.linalg.norm(W, axis=0), kept)
        share = (np.abs(X) * np.linalg.norm(W, axis=0) > limit).mean()
        assert share == pytest.approx(kept, abs=1e-3)
    assert quantile_of(X, None, 0.0) == math.inf
    assert quantile_of(X, None, 1.0) == 0


def test_without_a_low_rank_and_without_weighing():
    made = sparse_layer(Dense(W), decomposed(W, 0), X, RSparse(weighted=False, low_rank=False))
    assert made.low_rank is None
    assert np.unique(made.threshold).size == 1
    assert (np.abs(X) > made.threshold).mean() == pytest.approx(0.475, abs=1e-3)


def test_the_low_rank_takes_what_is_not_read_and_nothing_else():
    """Fed with all of the input it would count twice; without it, what is not read is lost."""
    config = RSparse(sparsity=0.5, alpha=0.5)
    rank = budget_of(W.shape, 0.5, 0.5).rank
    low = RNG.standard_normal((48, 3)) @ RNG.standard_normal((3, 80))
    made = sparse_layer(Dense(low.astype(np.float32)), decomposed(low, rank), X, config)
    assert made.low_rank is not None
    exact = X @ low.T
    found = made.decode(X)
    twice = found + made.low_rank.matmul(np.where(np.abs(X) > made.threshold, X, 0).astype(np.float32))
    none = found - made.low_rank.matmul(np.where(np.abs(X) > made.threshold, 0, X).astype(np.float32))
    errors = [np.linalg.norm(each - exact) for each in (found, none, twice)]
    assert errors[0] < 0.1 * min(errors[1:])


def test_a_column_of_zeros_is_never_read():
    weight = W.copy()
    weight[:, 5] = 0
    made = sparse_layer(Dense(weight), decomposed(weight, 4), X, RSparse(alpha=1.0))
    assert made.threshold[5] == np.inf
    assert np.isfinite(np.delete(made.threshold, 5)).all()


def test_nothing_is_dropped_at_a_sparsity_of_zero():
    made = sparse_layer(Dense(W), decomposed(W, 0), X, RSparse(sparsity=0.0, alpha=1.0))
    np.testing.assert_array_equal(made.decode(X), made.matmul(X))


@pytest.mark.parametrize("settings", [
    {"sparsity": 1.0}, {"sparsity": -0.1}, {"alpha": 1.1}, {"tokens": 3}, {"population": 1}])
def test_settings_out_of_range(settings):
    with pytest.raises(InvalidValueError, match=r"sparsity|tokens"):
        RSparse(**settings)


def test_inputs_of_another_width():
    with pytest.raises(InvalidValueError, match=r"\(tokens, 80\)"):
        sparse_layer(Dense(W), decomposed(W, 1), X[:, :70], RSparse())
