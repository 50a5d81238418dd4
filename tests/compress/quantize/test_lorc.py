"""LoRC: the theorem of Eckart and Young, the weighing by inputs, and what a correction is worth."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.quantize.lorc import Lorc, compensated
from edgewise.compress.quantize.rtn import Rtn, quantize_layer
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import QuantFormat

RNG = np.random.default_rng(8)
WEIGHT = RNG.standard_normal((40, 64)).astype(np.float32)
FMT = QuantFormat.parse("int3/g32/fp16/min")
SQUARES = np.exp(2 * RNG.standard_normal(64))


def squared(made, weight=1.0):
    return float((((made.dense().astype(np.float64) - WEIGHT)**2) * weight).sum())


@pytest.mark.parametrize("rank", [1, 8, 30])
def test_the_error_is_that_of_the_singular_values_dropped(rank):
    residual = WEIGHT.astype(np.float64) - quantize_layer(WEIGHT, FMT, Rtn(search=False)).dense()
    dropped = np.linalg.svd(residual, compute_uv=False)[rank:]
    made = compensated(WEIGHT, FMT, Lorc(rank=rank))
    assert squared(made) == pytest.approx(float((dropped**2).sum()), rel=2e-3)  # of half precision in the factors
    assert made.parts[1].left.shape == (40, rank)


def test_each_rank_is_closer_and_rank_none_is_rounding():
    errors = [squared(quantize_layer(WEIGHT, FMT, Rtn(search=False)))]
    errors += [squared(compensated(WEIGHT, FMT, Lorc(rank=rank))) for rank in (1, 4, 16, 39)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * errors[0]


def test_importance_lowers_the_error_that_it_weighs():
    rounded = quantize_layer(WEIGHT, FMT)
    blind = squared(compensated(WEIGHT, FMT, rounded=rounded), SQUARES)
    assert squared(compensated(WEIGHT, FMT, importance=SQUARES, rounded=rounded), SQUARES) < 0.9 * blind


def test_eight_bits_for_the_factors_cost_little():
    halves, bytes_ = (compensated(WEIGHT, FMT, Lorc(factors=factors)) for factors in ("fp16", "int8/axis"))
    assert bytes_.nbytes < halves.nbytes
    assert squared(bytes_) < 1.02 * squared(halves)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: compensated(WEIGHT, FMT, Lorc(rank=40)), "no smaller than"), (lambda: Lorc(rank=0), "at least rank 1"),
    (lambda: compensated(WEIGHT, FMT, importance=SQUARES[:3]), "one positive number per input"),
    (lambda: compensated(WEIGHT, FMT, rounded=quantize_layer(WEIGHT[:3], FMT)), "the rounded weight is"),
    (lambda: Lorc(factors="fp17"), "fp17"),
])
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(InvalidValueError, match=words):
        call()
