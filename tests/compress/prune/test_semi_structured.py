"""Two of four weights: the scores, SparseGPT against the paper's algorithm with inverses written out, edge cases."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.prune.semi_structured import magnitude, places_of, pruned_of, sparsegpt, wanda
from edgewise.core.errors import InvalidValueError


def case(seed, rows=12, inputs=40, tokens=200):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, inputs)) @ (np.eye(inputs) + 0.4 * rng.standard_normal((inputs, inputs)))
    return rng.standard_normal((rows, inputs)).astype(np.float32), x.T @ x


def transcription(weight, hessian, damp=0.01):
    """Algorithm 1 row by row with a fresh inverse of what is left of H for each column (equations 2 and 3)."""
    size = len(hessian)
    h = hessian + damp * np.mean(np.diag(hessian)) * np.eye(size)
    w = weight.astype(np.float64).copy()
    mask = np.zeros(w.shape, bool)
    for row in range(len(w)):
        for j in range(size):
            inverse = np.linalg.inv(h[j:, j:])
            if j % 4 == 0:
                scores, left = [], inverse.copy()
                for k in range(4):  # [H^-1]_jj once the columns before are gone (Gaussian elimination)
                    scores.append(w[row, j + k] ** 2 / left[0, 0])
                    left = (left - np.outer(left[:, 0], left[0]) / left[0, 0])[1:, 1:]
                mask[row, j + np.argsort(scores)[:2]] = True
            if mask[row, j]:
                w[row, j:] -= w[row, j] / inverse[0, 0] * inverse[0]
                w[row, j] = 0.0
    return w, mask


@pytest.mark.parametrize("block", [4, 12, 32, 128])
def test_sparsegpt_against_the_transcription(block):
    weight, hessian = case(0)
    expected, mask = transcription(weight, hessian)
    before = weight.copy(), hessian.copy()
    found, found_mask = sparsegpt(weight, hessian, block=block)
    assert np.array_equal(found_mask, mask)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(hessian, before[1])


def test_each_score_beats_the_one_before_on_the_product():
    """|(W - W') X^T|: what the kept weights make up for is worth more than which are kept."""
    errors = {"magnitude": 0.0, "wanda": 0.0, "sparsegpt": 0.0}
    for seed in range(4):
        weight, hessian = case(seed, rows=24, inputs=64)
        masks = {"magnitude": pruned_of(magnitude(weight)),
                 "wanda": pruned_of(wanda(weight, np.sqrt(np.diag(hessian))))}
        kept = {name: np.where(mask, 0, weight) for name, mask in masks.items()} | {
            "sparsegpt": sparsegpt(weight, hessian)[0]}
        for name, values in kept.items():
            gap = weight - values
            errors[name] += float(np.einsum("ij,jk,ik->", gap, hessian, gap))
    assert errors["sparsegpt"] < 0.7 * errors["wanda"]
    assert errors["wanda"] < errors["magnitude"]


def test_without_correlation_sparsegpt_is_wanda():
    weight, _ = case(3)
    diagonal = np.random.default_rng(1).uniform(0.5, 2, 40)
    found, mask = sparsegpt(weight, np.diag(diagonal), damp=0.0)
    assert np.array_equal(mask, pruned_of(wanda(weight, np.sqrt(diagonal))))
    np.testing.assert_allclose(found, np.where(mask, 0, weight), rtol=1e-6)


@pytest.mark.parametrize("scores", [np.ones((2, 8)), np.zeros((1, 4)), np.array([[3, 3, 1, 3.0]])])
def test_of_equal_scores_the_earlier_stay(scores):
    mask = pruned_of(scores)
    assert (mask.reshape(-1, 4).sum(axis=1) == 2).all()
    assert not mask[:, 0].any()
    assert not mask[:, 1].any()
    assert np.array_equal(places_of(mask), np.tile([0, 1], (len(scores), scores.shape[1] // 4)))


def test_what_cannot_be_pruned_says_so():
    weight, hessian = case(0, inputs=10)
    with pytest.raises(InvalidValueError, match="has 10: not a multiple of four"):
        sparsegpt(weight, hessian)
    with pytest.raises(InvalidValueError, match=r"keeps 3 of its inputs 4 to 7"):
        places_of(np.array([[True, True, False, False, True, False, False, False]]))
    with pytest.raises(InvalidValueError, match=r"\(40, 40\)"):
        sparsegpt(case(0)[0], hessian)
