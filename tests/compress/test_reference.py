"""The float reference: the same function, other weights, off the grid it came on."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.reference import off_the_grid
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import QuantFormat, quantize
from edgewise.core.storage import Dense, QuantizedTensor
from edgewise.engine.loading import model_of
from tiny_checkpoint import tiny_checkpoint

IDS = list(range(4, 44))
FMT = QuantFormat.parse("int4/g32/fp16/min")


def on_a_grid():
    source = tiny_checkpoint(kv_heads=2)
    tensors = dict(source.tensors)
    for name, stored in source.tensors.items():
        if len(stored.shape) == 2:
            codes, scales, minima = quantize(stored.dense(), FMT)
            tensors[name] = QuantizedTensor(codes, scales, FMT, minima=minima)
    return type(source)(source.arch, source.config, tensors, source.metadata, source=source.source)


def forward(checkpoint):
    return model_of(checkpoint, threads=1, cache=False, kv="fp32", activations="float32").forward(IDS)


def test_it_is_the_same_function_of_other_weights():
    source = on_a_grid()
    exact, moved = forward(source), off_the_grid(source, half=False)
    np.testing.assert_allclose(forward(moved), exact, atol=2e-4 * np.abs(exact).max())
    for name, stored in moved.tensors.items():
        assert isinstance(stored, Dense)
        before = source.tensors[name].dense()
        moved_by = np.abs(stored.dense() - before).max() / np.abs(before).max()
        assert (moved_by > 0.03) == ("embed" not in name and name != "model.norm.weight"), name


def test_rounding_it_to_the_grid_it_came_on_is_not_lossless_any_more():
    source = on_a_grid()

    def loss(checkpoint):
        weight = checkpoint.tensors["model.layers.1.mlp.down_proj.weight"].dense()
        codes, scales, minima = quantize(weight, FMT)
        return np.abs(QuantizedTensor(codes, scales, FMT, minima=minima).dense() - weight).max() / np.abs(weight).max()

    assert loss(source) < 1e-3
    assert loss(off_the_grid(source)) > 0.02


def test_a_seed_decides_and_no_spread_changes_nothing():
    source = tiny_checkpoint()
    name = "model.layers.0.mlp.up_proj.weight"
    first, again, other = (off_the_grid(source, seed=seed).tensors[name].dense() for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    still = off_the_grid(source, spread=0, half=False)
    np.testing.assert_array_equal(still.tensors[name].dense(), source.tensors[name].dense())


def test_a_spread_out_of_range_is_refused():
    with pytest.raises(InvalidValueError, match="spread is 0 to 2"):
        off_the_grid(tiny_checkpoint(), spread=3)
