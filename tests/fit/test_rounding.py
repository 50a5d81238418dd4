"""Rounding in pieces: independent of how rows are divided, from any storage form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import edgewise.fit.rounding as rounding
from edgewise.compress.prune.masks import Prune, by_magnitude, stored_of
from edgewise.compress.quantize.rtn import Rtn, quantize_layer
from edgewise.core.numbers import FP16, FP32, QuantFormat, quantize
from edgewise.core.storage import Dense, Factored, QuantizedTensor, Sum
from edgewise.fit.candidates import LADDER
from edgewise.fit.rounding import every_row_of, quantised, with_parts

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_t(4, (48, 192)).astype(np.float32)
IMPORTANCE = np.exp(1.5 * RNG.standard_normal(192)).astype(np.float32)


@pytest.mark.parametrize("name", [*LADDER, "int4/axis", "int4/tensor/fp32", "int8/g32/fp16/int"])
def test_rows_are_independent_of_chunks_and_threads(name, monkeypatch):
    fmt = QuantFormat.parse(name)
    whole = quantize_layer(WEIGHT, fmt, Rtn(search=fmt.element.bits <= 6), importance=IMPORTANCE)
    monkeypatch.setattr(rounding, "_CHUNK_VALUES", 5 * 192)
    for threads in (1, 3):
        made = quantised(Dense(WEIGHT), fmt, importance=IMPORTANCE, threads=threads)
        for field in ("codes", "scales", "zeros", "minima"):
            np.testing.assert_array_equal(getattr(made, field), getattr(whole, field))


@pytest.mark.parametrize("stored", [Dense(WEIGHT.astype(np.float16), FP16), QuantizedTensor(
    *quantize(WEIGHT, QuantFormat.parse("int8/g32"))[:2], QuantFormat.parse("int8/g32"))], ids=repr)
def test_any_storage_form_is_read(stored):
    fmt = QuantFormat.parse("int4/g32/fp16/min")
    assert np.array_equal(quantised(stored, fmt).codes, quantize_layer(stored.dense(), fmt).codes)


def test_the_input_is_not_modified():
    before = WEIGHT.copy()
    quantised(Dense(WEIGHT), QuantFormat.parse("int2/g32/fp16/min"), importance=IMPORTANCE)
    assert np.array_equal(WEIGHT, before)


def two_of_four(weight=WEIGHT):
    return stored_of(*by_magnitude(weight, Prune(pattern="2:4")), "2:4", FP32)


@pytest.mark.parametrize("name", ["int4/g32/fp16/min", "int8/g32"])
def test_of_a_sparse_weight_what_is_kept_is_rounded_and_nothing_else_is_there(name):
    fmt = QuantFormat.parse(name)
    sparse = two_of_four()
    made = quantised(sparse, fmt, importance=IMPORTANCE)
    assert np.array_equal(made.index, sparse.index)
    assert made.values.format == replace(fmt, granularity=replace(fmt.granularity, group=16))
    pairs = np.repeat(IMPORTANCE.reshape(-1, 4).mean(axis=1), 2)
    assert np.array_equal(made.values.codes, quantised(sparse.values, made.values.format, importance=pairs).codes)
    assert not made.dense()[sparse.dense() == 0].any()


def test_some_rows_of_a_sparse_weight_are_those_rows():
    sparse = two_of_four()
    assert np.array_equal(every_row_of(sparse, 3).dense(), sparse.dense()[::3])
    assert np.array_equal(every_row_of(Dense(WEIGHT), 3).dense(), WEIGHT[::3])


def test_parts_are_exchanged_by_their_names():
    left, right, other = (Dense(np.full(shape, value, np.float32)) for shape, value in (
        ((4, 2), 1), ((2, 3), 2), ((4, 2), 5)))
    product = Factored(left, right)
    made = with_parts("w", product, {"w.left": other})
    assert made.left is other
    assert made.right is right
    assert with_parts("w", product, {"v.left": other}) is product
    assert with_parts("w", left, {"w": other}) is other
    term = Sum((Dense(np.zeros((4, 3), np.float32)), product))
    made = with_parts("w", term, {"w": Dense(np.ones((4, 3), np.float32)), "w.left": other})
    assert made.parts[0].dense().all()
    assert made.parts[1].left is other
