"""Masks of single weights, each against a transcription of its paper, weight by weight."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgewise.compress.prune.masks import (
    Prune,
    SparseGpt,
    by_magnitude,
    by_sparsegpt,
    by_wanda,
    magnitude_change,
    sparsegpt_change,
    stored_of,
    wanda_change,
)
from edgewise.compress.walk import Group
from edgewise.core.errors import InvalidValueError, collect_notices
from edgewise.core.numbers import FP16, FP32
from edgewise.core.stats import InputStats
from edgewise.core.storage import Dense, Sparse

ROWS, INPUTS = 24, 48


def case(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((300, INPUTS)) @ (np.eye(INPUTS) + 0.3 * rng.standard_normal((INPUTS, INPUTS)))
    x *= np.exp(rng.standard_normal(INPUTS))
    return rng.standard_normal((ROWS, INPUTS)).astype(np.float32), x.astype(np.float32)


def error_of(weight: NDArray[np.float32], made: NDArray[np.float32], x: NDArray[np.float32]) -> float:
    return float(np.square((made - weight).astype(np.float64) @ x.T.astype(np.float64)).sum())


def wanda_by_hand(weight: NDArray[np.float32], x: NDArray[np.float32], sparsity: float) -> NDArray[np.float32]:
    made = weight.copy()
    for i in range(ROWS):
        scores = [abs(weight[i, j]) * np.float32(np.sqrt(sum(float(v)**2 for v in x[:, j]))) for j in range(INPUTS)]
        for j in sorted(range(INPUTS), key=lambda j: (scores[j], -j))[:int(sparsity * INPUTS)]:
            made[i, j] = 0
    return made


def sparsegpt_by_hand(weight: NDArray[np.float32], hessian: NDArray[np.float64], config: SparseGpt
                      ) -> NDArray[np.float64]:
    """Algorithm 1 without lazy updates, and with the inverse of what is left computed anew for every column."""
    damped = hessian + config.damp * np.diag(hessian).mean() * np.eye(INPUTS)
    made, gone = weight.astype(np.float64).copy(), np.zeros(weight.shape, bool)
    step = 4 if config.pattern else config.block
    for j in range(INPUTS):
        if j % step == 0:
            stop = min(j + step, INPUTS)
            scores = np.empty((ROWS, stop - j))
            for k in range(j, stop):  # [H^-1]_kk of the columns from k on
                scores[:, k - j] = made[:, k]**2 / np.linalg.inv(damped[k:, k:])[0, 0]
            if config.pattern:
                for row in range(ROWS):
                    for k in sorted(range(4), key=lambda k, row=row, s=scores: (s[row, k], -k))[:2]:
                        gone[row, j + k] = True
            else:
                flat = sorted((scores[row, k], -row, -k) for row in range(ROWS) for k in range(stop - j))
                for _, row, k in flat[:int(config.sparsity * scores.size)]:
                    gone[-row, j - k] = True
        inverse = np.linalg.inv(damped[j:, j:])
        for row in range(ROWS):
            if gone[row, j]:
                made[row, j:] -= made[row, j] / inverse[0, 0] * inverse[0]
                made[row, j] = 0
    return made


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_wanda_is_its_transcription(sparsity: float) -> None:
    weight, x = case()
    made, mask = by_wanda(weight, np.sqrt(np.square(x, dtype=np.float64).sum(axis=0)), Prune(sparsity))
    np.testing.assert_array_equal(made, wanda_by_hand(weight, x, sparsity))
    assert (mask.sum(axis=1) == int(sparsity * INPUTS)).all()


@pytest.mark.parametrize("config", [SparseGpt(0.5, block=16), SparseGpt(0.3, block=128), SparseGpt(0.7, block=20),
                                    SparseGpt(pattern="2:4", block=16), SparseGpt(pattern="2:4", block=48)])
def test_sparsegpt_is_its_transcription(config: SparseGpt) -> None:
    weight, x = case(1)
    hessian = x.T.astype(np.float64) @ x
    made, mask = by_sparsegpt(weight, hessian, config)
    np.testing.assert_allclose(made, sparsegpt_by_hand(weight, hessian, config), rtol=1e-4, atol=1e-5)
    assert (made[mask] == 0).all()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_knowing_more_costs_less(sparsity: float) -> None:
    """On what the inputs make of it: SparseGPT below Wanda below magnitude."""
    totals = np.zeros(3)
    for seed in range(5):
        weight, x = case(seed)
        hessian = x.T.astype(np.float64) @ x
        totals += [error_of(weight, made, x) for made in (
            by_magnitude(weight, Prune(sparsity))[0],
            by_wanda(weight, np.sqrt(np.diag(hessian)), Prune(sparsity))[0],
            by_sparsegpt(weight, hessian, SparseGpt(sparsity))[0])]
    assert totals[0] > totals[1] > totals[2]


def test_magnitude_compares_the_whole_matrix() -> None:
    weight = np.array([[1.0, 2, 3, 4], [10, 20, -30, 0.5]], np.float32)
    np.testing.assert_array_equal(by_magnitude(weight, Prune(0.5))[0], [[0, 0, 0, 4], [10, 20, -30, 0]])
    np.testing.assert_array_equal(by_magnitude(weight, Prune(pattern="1:2"))[0], [[0, 2, 0, 4], [0, 20, -30, 0]])


def test_nothing_is_pruned_of_nothing() -> None:
    weight, x = case()
    np.testing.assert_array_equal(by_magnitude(weight, Prune(0.0))[0], weight)
    np.testing.assert_array_equal(by_sparsegpt(weight, x.T @ x, SparseGpt(0.0))[0], weight)


def test_an_input_that_was_never_seen_costs_nothing_to_wanda() -> None:
    weight, x = case()
    x[:, 7] = 0
    mask = by_wanda(weight, np.sqrt(np.square(x).sum(axis=0)), Prune(1 / INPUTS + 1e-9))[1]
    assert mask[:, 7].all()


@pytest.mark.parametrize("kind", [magnitude_change, wanda_change, sparsegpt_change])
@pytest.mark.parametrize("pattern", ["", "2:4", "3:8"])
def test_a_change_is_pure_keeps_number_formats_and_stores_places(kind: object, pattern: str) -> None:
    weight, x = case()
    config = (SparseGpt if kind is sparsegpt_change else Prune)(pattern=pattern)
    tensors = {"a.weight": Dense(weight.astype(np.float16), FP16), "mlp.gate.weight": Dense(weight)}
    before = {name: tensor.dense().copy() for name, tensor in tensors.items()}
    group = Group("feed_forward", tuple(tensors))
    made = kind(config)(group, tensors, InputStats.from_samples(x, gram=True))  # type: ignore[operator]
    assert set(made) == {"a.weight"}  # a router stays
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.dense(), before[name])
    stored = made["a.weight"]
    share = {"": 0.5, "2:4": 0.5, "3:8": 5 / 8}[pattern]
    assert (stored.dense() == 0).mean() == pytest.approx(share)
    assert isinstance(stored, Sparse if pattern else Dense)
    assert (stored.values if isinstance(stored, Sparse) else stored).number == FP16
    assert stored.nbytes < (weight.size * 2 if pattern else weight.size * 2 + 1)


def test_stored_places_give_the_weight_back() -> None:
    weight, _ = case()
    made, mask = by_magnitude(weight, Prune(pattern="2:4"))
    np.testing.assert_array_equal(stored_of(made, mask, "2:4", FP32).dense(), made)


def test_without_statistics_magnitude_takes_over_and_says_so() -> None:
    weight, _ = case()
    with collect_notices() as notices:
        made = wanda_change(Prune(0.5))(Group("", ("e.weight",)), {"e.weight": Dense(weight)}, None)
    np.testing.assert_array_equal(made["e.weight"].dense(), by_magnitude(weight, Prune(0.5))[0])
    assert "pruned by magnitude" in str(notices[0])


@pytest.mark.parametrize("given", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"pattern": "4:2"}, {"pattern": "2 of 4"}])
def test_impossible_settings_are_named(given: dict[str, object]) -> None:
    with pytest.raises(InvalidValueError):
        Prune(**given)  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError):
        SparseGpt(**given)  # type: ignore[arg-type]


def test_a_row_that_a_pattern_does_not_divide_is_named() -> None:
    with pytest.raises(InvalidValueError, match=r"e\.weight: 2:4 keeps"):
        magnitude_change(Prune(pattern="2:4"))(Group("", ("e.weight",)), {"e.weight": Dense(np.ones((3, 6), "f4"))},
                                               None)
