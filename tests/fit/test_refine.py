"""GPTQ on formats that are chosen already: each weight in its own, nothing else touched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgewise.core.errors import collect_notices
from edgewise.core.numbers import QuantFormat
from edgewise.core.stats import InputStats
from edgewise.core.storage import Dense
from edgewise.engine.loading import model_of
from edgewise.fit.refine import by_gptq
from edgewise.fit.rounding import quantised
from tiny_checkpoint import tiny_checkpoint

WINDOWS = np.random.default_rng(0).integers(4, 260, (16, 128)).astype(np.int32)
INT3, INT2, INT8 = (QuantFormat.parse(text) for text in ("int3/g32/fp16/min", "int2/g32/fp16/min", "int8/g32"))
Q, K, DOWN = (f"model.layers.1.{part}.weight" for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))


def test_each_weight_has_its_own_format_and_is_closer_than_rounded():
    source = tiny_checkpoint()
    made = by_gptq(source, {Q: INT3, K: INT2, DOWN: INT8, "model.embed_tokens.weight": INT2}, WINDOWS, 1)
    assert {name: stored.format for name, stored in made.items()} == {Q: INT3, K: INT2}
    model = model_of(source, threads=1, cache=False, kv="fp32", activations="float32")
    stats = model.calibrate([list(map(int, ids)) for ids in WINDOWS], gram=True)
    for name, stored in made.items():
        given: InputStats = stats[name]

        def cost(other, name=name, given=given):
            gap = other.dense().astype(np.float64) - source.tensors[name].dense()
            return float(np.einsum("oi,ij,oj->", gap, given.gram, gap))

        assert cost(stored) < cost(quantised(source.tensors[name], stored.format, importance=given.mean_square))


def test_nothing_of_few_bits_is_nothing_to_do():
    assert by_gptq(tiny_checkpoint(), {Q: INT8}, WINDOWS, 1) == {}


def test_a_model_that_no_walk_goes_through_is_left_and_said():
    source = tiny_checkpoint()
    doubled = {**source.tensors, "encoder.layers.0.mlp.up_proj.weight": Dense(np.ones((4, 4), np.float32))}
    with collect_notices() as notices:
        assert by_gptq(replace(source, tensors=doubled), {Q: INT3}, WINDOWS, 1) == {}
    assert any("GPTQ was not tried" in item.message for item in notices)
