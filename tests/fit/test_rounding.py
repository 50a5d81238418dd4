"""Rounding in pieces: independent of how rows are divided, from any storage form."""

from __future__ import annotations

import numpy as np
import pytest

import edgewise.fit.rounding as rounding
from edgewise.compress.quantize.rtn import Rtn, quantize_layer
from edgewise.core.numbers import FP16, QuantFormat, quantize
from edgewise.core.storage import Dense, QuantizedTensor
from edgewise.fit.candidates import LADDER
from edgewise.fit.rounding import quantised

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
