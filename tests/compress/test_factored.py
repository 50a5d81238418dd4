"""Linears as two factors: none of their rank is closer on the inputs, and they cost the share that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.lowrank.factored import LowRank, factored_change, factors_of, rank_of_share
from edgewise.compress.walk import walk
from edgewise.core.checkpoint import Step
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import BF16
from edgewise.core.storage import Factored
from edgewise.engine.calibrate import EngineStats
from edgewise.engine.loading import model_of
from tiny_checkpoint import tiny_checkpoint

RNG = np.random.default_rng(3)
WEIGHT = RNG.standard_normal((48, 64)).astype(np.float32)
X = (RNG.standard_normal((300, 64)) * np.geomspace(1, 0.01, 64)) @ RNG.standard_normal((64, 64))
GRAM = X.T @ X


def test_the_error_on_the_inputs_is_the_singular_values_dropped():
    config = LowRank(0.6, 4)
    made = factors_of(WEIGHT, GRAM, config)
    rank = rank_of_share(WEIGHT.shape, config)
    assert made.left.shape == (48, rank)
    assert made.right.shape == (rank, 64)
    dropped = np.linalg.svd(X @ WEIGHT.T, compute_uv=False)[rank:]
    error = np.linalg.norm(X @ (WEIGHT - made.dense()).T)
    assert error == pytest.approx(np.linalg.norm(dropped), rel=1e-4)
    plain = factors_of(WEIGHT, None, config)
    assert error < np.linalg.norm(X @ (WEIGHT - plain.dense()).T)
    assert np.linalg.norm(WEIGHT - plain.dense()) == pytest.approx(
        np.linalg.norm(np.linalg.svd(WEIGHT, compute_uv=False)[rank:]), rel=1e-5)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_the_share_is_kept(share):
    made = factors_of(WEIGHT, GRAM, LowRank(share, 1), BF16)
    numbers = made.left.shape[0] * made.left.shape[1] + made.right.shape[0] * made.right.shape[1]
    assert share * WEIGHT.size - sum(WEIGHT.shape) < numbers <= share * WEIGHT.size
    assert made.nbytes == 2 * numbers


def test_too_small_a_share_is_no_rank():
    assert rank_of_share((48, 64), LowRank(0.5, 32)) == 0
    assert factors_of(WEIGHT, GRAM, LowRank(0.5, 32)) is None


@pytest.mark.parametrize(("share", "multiple"), [(0.0, 1), (1.0, 1), (0.5, 0)])
def test_unusable_settings(share, multiple):
    with pytest.raises(InvalidValueError, match="share"):
        LowRank(share, multiple)


def test_a_factored_model_runs_and_knowing_the_inputs_helps():
    source = tiny_checkpoint(hidden=128, width=256)
    ids = RNG.integers(4, 260, (4, 128)).astype(np.int32)
    exact = model_of(source, threads=1, cache=False).forward(ids[0])
    errors = []
    for stats in (EngineStats(source, list(ids), gram=True, threads=1), None):
        made = walk(source, factored_change(LowRank(0.8, 16)), stats, step=Step("rank"))
        weights = [made.tensors[name] for name in made.tensors if "_proj" in name]
        assert sum(isinstance(weight, Factored) for weight in weights) == len(weights)
        errors.append(np.linalg.norm(model_of(made, threads=1, cache=False).forward(ids[0]) - exact))
    assert errors[0] < errors[1]
