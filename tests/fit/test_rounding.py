"""Rounding with a search for the range: never worse than plain rounding, and independent of how rows are divided."""

from __future__ import annotations

import numpy as np
import pytest

import edgewise.fit.rounding as rounding
from edgewise.core.numbers import FP16, QuantFormat, dequantize, quantize
from edgewise.core.storage import Dense, QuantizedTensor
from edgewise.fit.candidates import LADDER
from edgewise.fit.rounding import quantised, searched

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_t(4, (48, 192)).astype(np.float32)
IMPORTANCE = np.exp(1.5 * RNG.standard_normal(192)).astype(np.float32)
SEARCHED = [name for name in LADDER if name.endswith("min")]


def group_errors(x: np.ndarray, fmt: QuantFormat, made: tuple, importance: np.ndarray | None = None) -> np.ndarray:
    codes, scales, minima = made
    error = (dequantize(codes, scales, fmt, minima=minima).astype(np.float64) - x)**2
    if importance is not None:
        error = error * importance
    return error.reshape(len(x), -1, fmt.granularity.group).sum(axis=-1)


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("importance", [None, IMPORTANCE], ids=["plain", "weighted"])
def test_no_group_is_worse_than_plain_rounding_and_the_whole_is_better(name, importance):
    fmt = QuantFormat.parse(name)
    plain = group_errors(WEIGHT, fmt, quantize(WEIGHT, fmt), importance)
    found = group_errors(WEIGHT, fmt, searched(WEIGHT, fmt, importance), importance)
    assert (found <= plain * (1 + 1e-5)).all()
    assert found.sum() < 0.95 * plain.sum()


def test_importance_lowers_the_error_that_it_weighs():
    fmt = QuantFormat.parse("int3/g32/fp16/min")
    blind = group_errors(WEIGHT, fmt, searched(WEIGHT, fmt), IMPORTANCE).sum()
    assert group_errors(WEIGHT, fmt, searched(WEIGHT, fmt, IMPORTANCE), IMPORTANCE).sum() < 0.95 * blind


@pytest.mark.parametrize("name", LADDER)
@pytest.mark.parametrize("x", [np.zeros((3, 64)), np.full((3, 64), -2.5), np.eye(3, 64) * 7, np.full((3, 64), 1e-30)],
                         ids=["zeros", "all equal", "one value", "tiny"])
def test_degenerate_groups_are_finite_and_close(name, x):
    fmt = QuantFormat.parse(name)
    x = x.astype(np.float32)
    codes, scales, minima = searched(x, fmt)
    value = dequantize(codes, scales, fmt, minima=minima)
    assert np.isfinite(value).all()
    plain = quantize(x, fmt)
    plain_error = ((dequantize(plain[0], plain[1], fmt, minima=plain[2]) - x)**2).sum()
    assert ((value - x)**2).sum() <= plain_error * (1 + 1e-5)


@pytest.mark.parametrize("name", LADDER)
def test_rows_are_independent_of_chunks_and_threads(name, monkeypatch):
    fmt = QuantFormat.parse(name)
    whole = searched(WEIGHT, fmt, IMPORTANCE)
    monkeypatch.setattr(rounding, "_CHUNK_VALUES", 5 * 192)
    for threads in (1, 3):
        made = quantised(Dense(WEIGHT), fmt, importance=IMPORTANCE, threads=threads)
        assert np.array_equal(made.codes, whole[0])
        assert np.array_equal(made.scales, whole[1])
        assert (made.minima is None) == (fmt.zero == "none")
        assert made.minima is None or np.array_equal(made.minima, whole[2])


def test_scales_and_minima_are_values_of_their_format():
    made = quantised(Dense(WEIGHT), QuantFormat.parse("int4/g64/fp16/min"), importance=IMPORTANCE)
    for values in (made.scales, made.minima):
        assert np.array_equal(values, values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("stored", [Dense(WEIGHT.astype(np.float16), FP16), QuantizedTensor(
    *quantize(WEIGHT, QuantFormat.parse("int8/g32"))[:2], QuantFormat.parse("int8/g32"))], ids=repr)
def test_any_storage_form_is_read(stored):
    fmt = QuantFormat.parse("int4/g32/fp16/min")
    assert np.array_equal(quantised(stored, fmt).codes, searched(stored.dense(), fmt)[0])


def test_the_input_is_not_modified():
    before = WEIGHT.copy()
    quantised(Dense(WEIGHT), QuantFormat.parse("int2/g32/fp16/min"), importance=IMPORTANCE)
    assert np.array_equal(WEIGHT, before)
