"""Decompositions: each beside its slow transcription, and what its theorem says."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.compress.lowrank.decompose import (
    cr_columns,
    leverage,
    nystroem,
    randomised,
    root_of,
    svd,
    top,
    whitened,
    whitened_spectrum,
)
from edgewise.core.errors import InvalidValueError

RNG = np.random.default_rng(5)
WEIGHT = RNG.standard_normal((20, 28)) * np.exp(RNG.standard_normal(28))
MIX = RNG.standard_normal((28, 28)) / 5
X = RNG.standard_normal((400, 28)) * np.exp(1.5 * RNG.standard_normal(28)) @ MIX
GRAM = X.T @ X


def on_inputs(made, x=X, weight=WEIGHT):
    return float(np.linalg.norm(x @ (weight - made).T))


def slow_svd(weight, rank):
    """Deflation: one pair after the other by the power method, each taken away from what is left."""
    rest, total = weight.copy(), np.zeros_like(weight)
    for _ in range(rank):
        v = np.ones(weight.shape[1])
        for _ in range(4000):
            v = rest.T @ (rest @ v)
            v /= np.linalg.norm(v)
        one = np.outer(rest @ v, v)
        total, rest = total + one, rest - one
    return total


@pytest.mark.parametrize("split", ["left", "right", "even"])
def test_svd_is_deflation_and_drops_its_singular_values(split):
    made = svd(WEIGHT, 5, split=split)
    assert made.rank == 5
    np.testing.assert_allclose(made.dense(), slow_svd(WEIGHT, 5), atol=1e-6 * np.abs(WEIGHT).max())
    dropped = np.linalg.svd(WEIGHT, compute_uv=False)[5:]
    assert made.error == pytest.approx(np.sqrt((dropped**2).sum()), rel=1e-12)
    assert np.linalg.norm(WEIGHT - made.dense()) == pytest.approx(made.error, rel=1e-10)
    np.testing.assert_allclose(svd(WEIGHT, 20, split=split).dense(), WEIGHT, atol=1e-12)


def slow_whitened(weight, gram, rank):
    """SVD-LLM, algorithm 1: with the Cholesky factor of the Gram matrix and its inverse."""
    factor = np.linalg.cholesky(gram)
    u, s, vt = np.linalg.svd(weight @ factor)
    return (u[:, :rank] * s[:rank]) @ (vt[:rank] @ np.linalg.inv(factor))


@pytest.mark.parametrize("rank", [1, 4, 11, 19])
def test_whitened_is_its_transcription_with_an_inverse(rank):
    made = whitened(WEIGHT, GRAM, rank)
    np.testing.assert_allclose(made.dense(), slow_whitened(WEIGHT, GRAM, rank), atol=1e-7)
    dropped = whitened_spectrum(WEIGHT, GRAM)[rank:]
    assert on_inputs(made.dense()) == pytest.approx(float(np.sqrt((dropped**2).sum())), rel=1e-8)
    assert made.error == pytest.approx(on_inputs(made.dense()), rel=1e-8)


def test_no_other_of_its_rank_errs_less_on_the_inputs():
    """Against plain SVD, random ones, and least-squares steps from where it stands: none goes below."""
    best = whitened(WEIGHT, GRAM, 6)
    assert on_inputs(svd(WEIGHT, 6).dense()) > 1.05 * best.error
    rng = np.random.default_rng(0)
    for _ in range(20):
        left = best.left + 0.1 * rng.standard_normal(best.left.shape)
        for _ in range(3):  # alternately, the best right for this left on the inputs, and the other way round
            right = np.linalg.lstsq(left, WEIGHT, rcond=None)[0]
            z = X @ right.T
            left = np.linalg.lstsq(z, X @ WEIGHT.T, rcond=None)[0].T
            assert on_inputs(left @ right) >= best.error * (1 - 1e-9)


def test_inputs_that_span_less_are_lossless_at_their_rank_and_the_rest_of_the_weight_is_kept():
    x = RNG.standard_normal((300, 4)) @ RNG.standard_normal((4, 28))
    made = whitened(WEIGHT, x.T @ x, 4)
    assert on_inputs(made.dense(), x) < 1e-8 * np.linalg.norm(x @ WEIGHT.T)
    np.testing.assert_allclose(whitened(WEIGHT, x.T @ x, 20).dense(), WEIGHT, atol=1e-10)  # with no inverse to explode
    root = root_of(x.T @ x)
    np.testing.assert_allclose(root @ root.T, x.T @ x, atol=1e-8)


def test_white_inputs_make_it_the_plain_one():
    np.testing.assert_allclose(whitened(WEIGHT, np.eye(28), 7).dense(), svd(WEIGHT, 7).dense(), atol=1e-10)


def test_randomised_is_near_the_best_and_exact_where_there_is_no_more():
    thin = RNG.standard_normal((60, 6)) @ RNG.standard_normal((6, 90))
    np.testing.assert_allclose(randomised(thin, 6, iterations=0).dense(), thin, atol=1e-10)
    wide = RNG.standard_normal((60, 60)) @ np.diag(0.9 ** np.arange(60)) @ RNG.standard_normal((60, 90))
    best = svd(wide, 10).error
    errors = [np.linalg.norm(wide - randomised(wide, 10, iterations=n, oversample=4).dense()) for n in (0, 1, 4)]
    assert best <= errors[2] <= errors[1] <= errors[0] < np.sqrt(1 + 10 / 3) * best
    assert errors[2] < 1.002 * best
    again = randomised(wide, 10, seed=3).dense()
    np.testing.assert_array_equal(again, randomised(wide, 10, seed=3).dense())


def test_leverage_is_its_definition_and_finds_what_the_others_do_not_say():
    ridge = 0.3
    slow = np.diag(GRAM @ np.linalg.inv(GRAM + ridge * np.eye(28)))
    np.testing.assert_allclose(leverage(GRAM, ridge), slow, atol=1e-9)
    x = RNG.standard_normal((200, 6))
    x = np.column_stack([x, x[:, 0]])  # the first input twice
    scores = leverage(x.T @ x, 1.0)
    assert scores[0] < 0.6 < scores[1:6].min()
    assert scores[6] == pytest.approx(scores[0])


def test_nystroem_is_least_squares_and_lossless_for_a_copy():
    columns = np.array([3, 8, 20, 21])
    mixture = nystroem(GRAM, columns)
    np.testing.assert_allclose(mixture, np.linalg.lstsq(X[:, columns], X, rcond=None)[0], atol=1e-8)
    np.testing.assert_array_equal(mixture[:, columns], np.eye(4))
    x = RNG.standard_normal((100, 5))
    x = np.column_stack([x, x[:, 2], x[:, 1] + x[:, 0]])
    weight = RNG.standard_normal((9, 7))
    kept = np.arange(5)
    small = weight @ nystroem(x.T @ x, kept).T
    np.testing.assert_allclose(x[:, kept] @ small.T, x @ weight.T, atol=1e-10)
    twice = nystroem(x.T @ x, np.array([0, 1, 2, 3, 4, 5]))  # a Gram matrix without an inverse
    np.testing.assert_allclose(x[:, :6] @ twice, x, atol=1e-8)


@given(st.integers(0, 10**6), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_no_other_columns_have_a_smaller_bound_and_the_bound_holds(seed, keep):
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((8, 6)) * np.exp(rng.standard_normal(6)) for _ in range(2))
    left, right = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=0)
    kept, bound = cr_columns(left, right, keep)
    bounds = [sum(left[j] * right[j] for j in range(6) if j not in some) for some in combinations(range(6), keep)]
    assert bound == pytest.approx(min(bounds), abs=1e-12)
    assert np.linalg.norm(a @ b.T - a[:, kept] @ b[:, kept].T) <= bound + 1e-9
    np.testing.assert_array_equal(kept, np.sort(kept))


def test_the_first_of_equal_ones_is_kept():
    np.testing.assert_array_equal(top(np.array([1.0, 2.0, 2.0, 2.0]), 2), [1, 2])


@pytest.mark.parametrize(("call", "words"), [
    (lambda: svd(WEIGHT, 0), "ranks 1 to 20"), (lambda: svd(WEIGHT, 21), "ranks 1 to 20"),
    (lambda: svd(WEIGHT[0], 1), "finite matrix"), (lambda: svd(WEIGHT * np.nan, 1), "finite matrix"),
    (lambda: svd(WEIGHT, 1, split="middle"), "evenly"),
    (lambda: whitened(WEIGHT, GRAM[:3, :3], 2), "Gram matrix of 28"),
    (lambda: leverage(GRAM, 0.0), "ridge is positive"), (lambda: nystroem(GRAM, [1, 1]), "distinct"),
    (lambda: nystroem(GRAM, [28]), "distinct"), (lambda: root_of(GRAM[:3]), "Gram matrix is finite"),
    (lambda: randomised(WEIGHT, 3, oversample=-1), "at least 0"), (lambda: cr_columns([1.0], [1.0], 2), "to keep"),
])
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(InvalidValueError, match=words):
        call()
