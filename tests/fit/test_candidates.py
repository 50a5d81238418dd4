"""Groups cover every weight once; candidates have kernels, only shrink, and cost what packing takes."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.lowrank.factored import LowRank, factors_of
from edgewise.compress.prune.masks import Prune, by_magnitude, stored_of
from edgewise.core.checkpoint import Step
from edgewise.core.numbers import FP32, QuantFormat
from edgewise.engine.archs import plan_of
from edgewise.engine.build import linears_of
from edgewise.engine.loading import recipes_of
from edgewise.engine.packing import layout_of, recipe_of
from edgewise.fit.candidates import LADDER, candidates_of, groups_of, items_of
from edgewise.fit.rounding import quantised
from tiny_checkpoint import tiny_checkpoint

FORMATS = [QuantFormat.parse(name) for name in LADDER]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("bands", "count"), [(1, 8), (3, 22), (7, 50), (99, 50), (None, 50)])
def test_every_weight_is_in_one_group(tied, bands, count):
    plan = plan_of(tiny_checkpoint(tied=tied, layers=7))
    groups = items_of(plan) if bands is None else groups_of(plan, bands=bands)
    names = [name for group in groups for name in group.weights]
    assert sorted(names) == sorted({linear.name for linear in linears_of(plan)})
    assert len(names) == len(set(names))
    assert len(groups) == count + (not tied)
    if bands == 3:
        assert [group.name for group in groups if group.name.startswith("down")] == [
            "down, layers 0 to 2", "down, layers 3 to 4", "down, layers 5 to 6"]
    if bands is None:
        assert [(item.name, item.layer) for item in groups[1:4]] == [("query", 0), ("key", 0), ("value", 0)]


def test_bytes_are_those_that_packing_takes():
    plan = plan_of(tiny_checkpoint())
    groups = groups_of(plan)
    recipes = {name: recipe_of(name, stored) for group in groups for name, stored in group.weights.items()}
    assert sum(group.packed_bytes for group in groups) == layout_of(recipes)[1]
    for group in groups:
        for candidate in candidates_of(group, FORMATS, None)[1:]:
            made = {name: quantised(group.weights[name], candidate.format) for name in candidate.replaced}
            assert set(made) == set(group.weights)
            assert layout_of({name: recipe_of(name, each) for name, each in made.items()})[1] == candidate.packed_bytes
            assert sum(each.nbytes for each in made.values()) == candidate.stored_bytes


def test_bytes_of_factors_and_of_kept_values_are_those_that_packing_takes():
    source = tiny_checkpoint(hidden=128, width=256)
    tensors = dict(source.tensors)
    for name, stored in source.tensors.items():
        if "self_attn" in name and stored.shape[0] == 128:
            tensors[name] = factors_of(stored.dense(), None, LowRank(0.8))
        elif ".mlp." in name:
            tensors[name] = stored_of(*by_magnitude(stored.dense(), Prune(pattern="2:4")), "2:4", FP32)
    plan = plan_of(source.with_tensors(tensors, Step("shaped")))
    items = items_of(plan)
    names = [name for item in items for name in item.weights]
    assert sorted(names) == sorted(recipes_of(plan)[0])
    assert sum(name.endswith((".left", ".right")) for name in names) == 2 * 2 * 2
    for item in items:
        for candidate in candidates_of(item, FORMATS, None)[1:]:
            made = {name: quantised(stored, candidate.format) if name in candidate.replaced else stored
                    for name, stored in item.weights.items()}
            assert layout_of({name: recipe_of(name, each) for name, each in made.items()})[1] == candidate.packed_bytes
            assert sum(each.nbytes for each in made.values()) == candidate.stored_bytes


def test_the_first_keeps_the_group_and_the_others_shrink_it():
    group = groups_of(plan_of(tiny_checkpoint()))[0]
    every = candidates_of(group, FORMATS, None)
    assert every[0].format is None
    assert every[0].packed_bytes == group.packed_bytes
    sizes = [candidate.packed_bytes for candidate in every]
    assert sizes == sorted(sizes, reverse=True)
    assert len(every) == 1 + len(LADDER)
    few = candidates_of(group, FORMATS, 3)
    assert [each.label for each in few] == ["as stored", LADDER[0], LADDER[6], LADDER[-1]]


def test_weights_of_few_bits_are_not_spread_over_more():
    checkpoint = tiny_checkpoint(hidden=128, width=512)
    fmt = QuantFormat.parse("int3/g32/fp16/min")
    small = {name: quantised(tensor, fmt) if name.endswith("down_proj.weight") else tensor
             for name, tensor in checkpoint.tensors.items()}
    plan = plan_of(checkpoint.with_tensors(small, Step("test")))
    down = next(group for group in groups_of(plan) if group.name == "down")
    offered = candidates_of(down, FORMATS, None)[1:]
    assert offered
    assert all(each.format.bits_per_weight < fmt.bits_per_weight for each in offered)


def test_formats_without_a_kernel_are_not_offered():
    group = groups_of(plan_of(tiny_checkpoint()))[0]
    assert [each.label for each in candidates_of(group, [QuantFormat.parse(name) for name in (
        "posit8_0/g32", "e4m3/g32", "int4/g24", "int4/g32")])] == ["as stored", "int4/g32/fp16"]


def test_parameters_and_bits():
    group = groups_of(plan_of(tiny_checkpoint()))[0]
    assert group.parameters == sum(int(np.prod(weight.shape)) for weight in group.weights.values())
    assert group.bits_per_weight == 32.0
