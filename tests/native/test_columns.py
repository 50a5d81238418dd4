"""Weights in columns, of which a token reads inputs above thresholds: against NumPy, the dense kernels, every tier."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.core.numbers import QuantFormat, quantize
from edgewise.core.storage import QuantizedTensor
from edgewise.engine.packing import pack_one, recipe_of
from edgewise.native import _core
from edgewise.native.probe import tiers

TIERS = tiers()
FORMATS = ["int4/g32", "int4/g32/fp16/min", "int4/g64/fp16/int", "int4/g128", "int4/axis/fp32", "int8/g32",
           "int8/g32/fp16/min", "int8/g64/fp32/int"]
SHAPES = [(576, 1536), (200, 384), (16, 128), (1, 128)]
ROUNDING = 2.0**-23


def weight_of(form, rows, cols, seed=0):
    fmt = QuantFormat.parse(form)
    codes, scales, zero = quantize(np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32), fmt)
    return QuantizedTensor(codes, scales, fmt, minima=zero if fmt.zero == "min" else None,
                           zeros=zero if fmt.zero == "int" else None)


def in_columns(stored):
    recipe = recipe_of("w", stored)
    panels = np.zeros(recipe.nbytes, np.uint8)
    recipe.write(panels)
    native = recipe.format.in_columns()
    data = np.zeros(native.nbytes(*stored.shape), np.uint8)
    _core.pack_columns(native, panels, *stored.shape, data)
    return _core.PackedMatrix(native, *stored.shape, data), panels


def product(weight, x, thresholds, tier):
    y = np.empty(weight.rows, np.float32)
    return y, _core.multiply_columns(weight, x, np.ascontiguousarray(thresholds, np.float32), y, tier)


def transcribed(stored, x, read):
    """(rows,): inputs rounded 32 at a time, all of them for the scale; then one weight after the other. And the sum of
    magnitudes, which bounds what rounding does."""
    weight, total, size = stored.dense().astype(np.float64), np.zeros(stored.shape[0]), np.zeros(stored.shape[0])
    least = np.zeros_like(weight)
    if stored.minima is not None:
        least = np.repeat(stored.minima, stored.shape[1] // stored.minima.shape[1], axis=1).astype(np.float64)
    for start in range(0, len(x), 32):
        block = x[start:start + 32]
        scale = np.float32(np.abs(block).max() / np.float32(127)) or np.float32(1)
        for i, value in enumerate(block):
            if not read[start + i]:
                continue
            rounded = float(np.rint(value / scale)) * float(scale)
            total += weight[:, start + i] * rounded
            size += (np.abs(weight[:, start + i] - least[:, start + i]) + np.abs(least[:, start + i])) * abs(rounded)
    return total, size


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
class TestColumns:
    def test_every_input_gives_the_bits_of_the_dense_kernel(self, form, rows, cols):
        stored = weight_of(form, rows, cols)
        weight, _ = in_columns(stored)
        dense = pack_one(recipe_of("w", stored))
        x = np.random.default_rng(1).standard_normal(cols).astype(np.float32)
        for tier in TIERS:
            expected = np.empty((1, rows), np.float32)
            _core.matmul(dense, x[None], expected, tier)
            found, count = product(weight, x, np.full(cols, -1.0), tier)
            assert count == cols
            assert np.array_equal(found.view(np.uint32), expected[0].view(np.uint32)), tier

    def test_some_inputs_as_a_transcription_adds_them(self, form, rows, cols):
        stored = weight_of(form, rows, cols)
        weight, _ = in_columns(stored)
        rng = np.random.default_rng(2)
        x = rng.standard_normal(cols).astype(np.float32)
        thresholds = (0.7 * rng.random(cols) * 2).astype(np.float32)
        thresholds[32:64] = np.inf  # a block of which nothing is read
        read = np.abs(x) > thresholds
        assert 0 < read.sum() < cols
        expected, size = transcribed(stored, x, read)
        results = []
        for tier in TIERS:
            found, count = product(weight, x, thresholds, tier)
            assert count == read.sum()
            results.append(found)
        assert all(np.array_equal(found.view(np.uint32), results[0].view(np.uint32)) for found in results)
        assert (np.abs(results[0] - expected) <= (4 * cols / 16 + 8) * ROUNDING * size + 1e-37).all()

    def test_back_to_panels(self, form, rows, cols):
        stored = weight_of(form, rows, cols)
        weight, panels = in_columns(stored)
        for tier in TIERS:
            found = np.empty_like(panels)
            _core.panels_of(weight, found, tier)
            assert np.array_equal(found, panels), tier
        dense = pack_one(recipe_of("w", stored))
        row, other = np.empty(cols, np.float32), np.empty(cols, np.float32)
        for index in {0, rows // 2, rows - 1}:
            weight.row(index, row)
            dense.row(index, other)
            assert np.array_equal(row, other)


def test_nothing_is_read():
    weight, _ = in_columns(weight_of("int4/g32", 128, 64))
    found, count = product(weight, np.ones(64, np.float32), np.full(64, np.inf), TIERS[-1])
    assert count == 0
    assert not found.any()


def test_a_value_at_its_threshold_is_not_read_and_neither_is_nan():
    weight, _ = in_columns(weight_of("int8/g32", 64, 32))
    x = np.zeros(32, np.float32)
    x[:3] = 0.5, -0.5, 0.75
    _, count = product(weight, x, np.full(32, 0.5), TIERS[-1])
    assert count == 1


@pytest.mark.parametrize("form", ["int3/g32", "int4/g16", "Q4_K"])
def test_a_format_without_a_kernel_is_refused(form):
    native = _core.PackedFormat.of_blocks(form) if form == "Q4_K" else recipe_of("w", weight_of(form, 16, 64)).format
    with pytest.raises(ValueError, match="4 or 8 bits"):
        native.in_columns()
