"""Static activations: ranges, codes, and what a configuration says of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgewise.core.activation import StaticActivation, activations_of, activations_to_config
from edgewise.core.errors import InvalidValueError


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (-1e-20, 1e-20), (0.0, 0.0)])
def test_codes_span_the_range_and_hold_zero(bits, low, high):
    item = StaticActivation.from_range(low, high, bits)
    assert item.round(np.zeros(1))[0] == 0
    assert item.low <= min(low, 0) + item.scale
    assert item.high >= max(high, 0) - item.scale
    inside = np.linspace(item.low, item.high, 301)
    assert np.abs(item.round(inside) - inside).max() <= item.scale * 0.51
    assert item.codes(np.array([-1e9, 1e9])).tolist() == [0, 2**bits - 1]


def test_symmetric_is_the_signed_integer():
    item = StaticActivation.from_range(-2.0, 1.0, 8, symmetric=True)
    x = np.linspace(-3, 3, 1001, dtype=np.float32)
    signed = np.clip(np.rint(x / np.float32(2 / 127)), -128, 127)
    assert np.array_equal(item.codes(x) - 128, signed)


def test_ties_go_to_even():
    item = StaticActivation(8, 1.0, 10)
    assert item.round(np.array([0.5, 1.5, 2.5, -0.5])).tolist() == [0, 2, 2, 0]


def test_a_configuration_holds_them():
    sites = {"model.layers.0.mlp.down_proj.input": StaticActivation.from_range(-0.3, 2.7, 8),
             "model.layers.0.self_attn.softmax_in": StaticActivation(16, 0.001, 40000)}
    config = {"quantization_config": activations_to_config({"quantization_config": {"kv": "int8"}}, sites)}
    assert activations_of(json.loads(json.dumps(config))) == sites
    assert config["quantization_config"]["kv"] == "int8"
    assert activations_of({}) == {}


@pytest.mark.parametrize("data", [
    {"bits": 8, "scale": 0.0, "zero": 1}, {"bits": 8, "scale": 1.0, "zero": 256}, {"bits": 8, "scale": 1.0},
    {"bits": 17, "scale": 1.0, "zero": 1}, {"bits": 8, "scale": float("nan"), "zero": 1}, [],
    {"bits": 8, "scale": 1.0, "zero": 1.5}, {"bits": 8, "scale": "1", "zero": 1},
    {"bits": True, "scale": 1.0, "zero": 0}, {"bits": 8, "scale": 1e-50, "zero": 0}])
def test_malformed_sites_are_named(data):
    with pytest.raises(InvalidValueError, match=r"activations\['x\.input'\]"):
        activations_of({"quantization_config": {"activations": {"x.input": data}}})


def test_malformed_wholes_are_refused():
    with pytest.raises(InvalidValueError, match="by site"):
        activations_of({"quantization_config": {"activations": [1]}})
    with pytest.raises(InvalidValueError, match="range"):
        StaticActivation.from_range(1.0, float("inf"), 8)
