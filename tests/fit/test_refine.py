"""GPTQ on formats that are chosen already: each weight in its own, nothing else touched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgewise.compress.lowrank.factored import LowRank, factors_of
from edgewise.compress.prune.masks import Prune, by_magnitude, stored_of
from edgewise.core.checkpoint import Step
from edgewise.core.errors import collect_notices
from edgewise.core.numbers import FP32, QuantFormat
from edgewise.core.stats import InputStats
from edgewise.core.storage import Dense, Factored
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


def test_factors_and_kept_values_are_closer_than_rounded():
    dense = tiny_checkpoint(hidden=128, width=256)
    tensors = dict(dense.tensors)
    tensors[Q] = factors_of(tensors[Q].dense(), None, LowRank(0.8))
    tensors[DOWN] = stored_of(*by_magnitude(tensors[DOWN].dense(), Prune(pattern="2:4")), "2:4", FP32)
    source = dense.with_tensors(tensors, Step("shaped"))
    made = by_gptq(source, {f"{Q}.left": INT3, f"{Q}.right": INT3, DOWN: INT2}, WINDOWS, 1)
    assert made.keys() == {f"{Q}.left", f"{Q}.right", DOWN}
    assert np.array_equal(made[DOWN].index, tensors[DOWN].index)
    model = model_of(source, threads=1, cache=False, kv="fp32", activations="float32")
    stats = model.calibrate([list(map(int, ids)) for ids in WINDOWS], gram=True)
    rounded = {Q: Factored(*(quantised(part, INT3) for part in (tensors[Q].left, tensors[Q].right))),
               DOWN: quantised(tensors[DOWN], INT2)}
    for name, mine in ((Q, Factored(made[f"{Q}.left"], made[f"{Q}.right"])), (DOWN, made[DOWN])):
        costs = [np.einsum("oi,ij,oj->", gap, stats[name].gram, gap) for gap in (
            each.dense().astype(np.float64) - tensors[name].dense() for each in (mine, rounded[name]))]
        assert costs[0] < costs[1]
