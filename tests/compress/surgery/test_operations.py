"""Surgery: what is zero can go without a change of any answer; merging, absorbing and folding where they are exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from cut_checkpoint import SHAPES, cut_checkpoint
from edgewise.compress.quantize.rtn import quantize_layer
from edgewise.compress.surgery.groups import decoder_of, groups_of
from edgewise.compress.surgery.operations import absorb, cut, fold_norms, inherit, merge, norms_of, zero
from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import InvalidValueError, UnsupportedError, collect_notices
from edgewise.core.numbers import FP16, QuantFormat
from edgewise.core.shapes import shapes_of
from edgewise.core.storage import Dense
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import session_of
from tiny_checkpoint import tiny_checkpoint, tiny_encoder

TOKENS = np.random.default_rng(5).integers(4, 260, 60).astype(np.int32)


def logits_of(checkpoint: Checkpoint) -> NDArray[np.float32]:
    session = session_of(plan_of(checkpoint))
    session.forward(TOKENS, np.zeros(len(TOKENS), np.int32))
    return np.asarray(session.logits(np.arange(len(TOKENS), dtype=np.int32)))


def agree(one: Checkpoint, other: Checkpoint) -> None:
    np.testing.assert_allclose(logits_of(one), logits_of(other), rtol=2e-4, atol=2e-4)


BASES = {"equal": lambda: tiny_checkpoint(layers=3), "unequal": cut_checkpoint,
         "untied": lambda: tiny_checkpoint(layers=2, tied=False, heads=8, kv_heads=2, seed=3)}
CUTS = [
    ("equal", {"1.width": [3, 5, 100]}), ("equal", {"0.heads": [1]}), ("equal", {"2.queries": [0]}),
    ("equal", {"1.pairs.0": [0, 6], "1.pairs.1": [2, 3]}), ("equal", {"0.values.0": [4], "0.values.1": [15]}),
    ("equal", {"hidden": [0, 17, 63]}), ("equal", {"1.attention": [0]}), ("equal", {"1.feed_forward": [0]}),
    ("equal", {"1": [0]}), ("unequal", {"1.pairs.0": [1], "1.pairs.1": [5]}), ("unequal", {"1.values.0": [3],
                                                                                        "1.values.1": [3]}),
    ("unequal", {"4.pairs.0": [2], "2.width": [0, 39], "0.heads": [0]}), ("unequal", {"hidden": [5, 6, 7, 8]}),
    ("unequal", {"3.attention": [0]}), ("unequal", {"2.feed_forward": [0], "0.queries": [1]}),
    ("untied", {"hidden": [1], "0.heads": [0], "1.queries": [0, 3], "1.width": [7]})]


@pytest.mark.parametrize(("base", "gone"), CUTS)
def test_units_that_are_zero_go_without_a_trace(base: str, gone: dict[str, list[int]]) -> None:
    whole = zero(BASES[base](), gone)
    groups = groups_of(whole)
    keep = {name: np.setdiff1d(np.arange(groups[name].units), units) for name, units in gone.items()}
    smaller = cut(whole, keep)
    assert smaller.nbytes < whole.nbytes
    agree(smaller, whole)


@pytest.mark.parametrize("base", BASES)
def test_every_group_can_lose_a_unit(base: str) -> None:
    checkpoint = BASES[base]()
    for name, group in groups_of(checkpoint).items():
        partner = [f"{name.rpartition('.')[0]}.{head}" for head in range(4)] if ".pairs." in name or (
            ".values." in name) else [name]
        gone = {one: [0] for one in partner if one in groups_of(checkpoint)}
        whole = zero(checkpoint, gone)
        keep = {one: np.arange(1, groups_of(whole)[one].units) for one in gone}
        if group.units == 1 and name.isdigit() and len(decoder_of(checkpoint).shapes) == 1:
            continue
        agree(cut(whole, keep), whole)


def test_groups_cover_every_row_once() -> None:
    checkpoint = tiny_checkpoint()
    groups = groups_of(checkpoint)
    for name in ("0.width", "0.heads", "0.queries", "hidden"):
        for member in groups[name].members:
            size = checkpoint.tensors[member.tensor].shape[member.axis]
            np.testing.assert_array_equal(np.sort(member.index.reshape(-1)), np.arange(size))
    rows = np.concatenate([m.index.reshape(-1) for h in (0, 1) for m in groups[f"0.pairs.{h}"].members
                           if m.tensor.endswith("q_proj.weight")])
    np.testing.assert_array_equal(np.sort(rows), np.arange(64))


def test_a_pair_is_two_rows_half_a_head_apart() -> None:
    member = groups_of(tiny_checkpoint())["0.pairs.1"].members[1]
    assert member.tensor.endswith("k_proj.weight")
    assert member.index[3].tolist() == [16 + 3, 16 + 3 + 8]


def test_cuts_compose_and_name_the_frequencies_of_whole_heads() -> None:
    once = cut(tiny_checkpoint(), {"0.pairs.0": [0, 2, 5, 7], "0.pairs.1": [1, 2, 3, 4]})
    twice = cut(once, {"0.pairs.0": [1, 3], "0.pairs.1": [0, 2]})
    shapes = shapes_of(twice.config)
    assert shapes is not None
    assert shapes[0].pairs == ((2, 7), (1, 3))
    agree(twice, cut(tiny_checkpoint(), {"0.pairs.0": [2, 7], "0.pairs.1": [1, 3]}))


def test_equal_whole_layers_stay_a_plain_model() -> None:
    smaller = inherit(tiny_checkpoint(layers=4), layers=[0, 3], kv_heads=1, width=64)
    assert shapes_of(smaller.config) is None
    assert smaller.config["num_hidden_layers"] == 2
    assert smaller.config["num_attention_heads"] == 2
    assert logits_of(smaller).shape == (60, 264)


def test_norms_are_those_of_all_that_a_unit_owns() -> None:
    checkpoint = tiny_checkpoint()
    weights = [checkpoint.tensors[f"model.layers.0.mlp.{part}_proj.weight"].dense().astype(np.float64)
               for part in ("gate", "up", "down")]
    expected = [np.sqrt((weights[0][n]**2).sum() + (weights[1][n]**2).sum() + (weights[2][:, n]**2).sum())
                for n in range(128)]
    np.testing.assert_allclose(norms_of(checkpoint, groups_of(checkpoint)["0.width"]), expected, rtol=1e-6)


def _with(checkpoint: Checkpoint, changed: dict[str, NDArray[np.float32]]) -> Checkpoint:
    return replace(checkpoint, tensors={**checkpoint.tensors, **{k: Dense(v) for k, v in changed.items()}})


def test_units_that_are_alike_are_one() -> None:
    checkpoint = tiny_checkpoint()
    prefix = "model.layers.0.mlp."
    made = {}
    for part in ("gate", "up"):
        weight = checkpoint.tensors[f"{prefix}{part}_proj.weight"].dense().copy()
        weight[[7, 90]] = weight[3]
        weight[11] = weight[10]
        made[f"{prefix}{part}_proj.weight"] = weight
    twins = _with(checkpoint, made)
    smaller = merge(twins, "0.width", [[3, 7, 90], [10, 11]])
    shapes = shapes_of(smaller.config)
    assert shapes is not None
    assert shapes[0].width == 125
    agree(smaller, twins)


def test_query_heads_that_are_alike_are_one() -> None:
    checkpoint = tiny_checkpoint()
    name = "model.layers.1.self_attn.q_proj.weight"
    heads = checkpoint.tensors[name].dense().copy().reshape(2, 2, 16, 64)
    heads[:, 1] = heads[:, 0]
    twins = _with(checkpoint, {name: heads.reshape(64, 64)})
    agree(merge(twins, "1.queries", [[0, 1]]), twins)


def test_what_is_made_of_the_rest_is_absorbed() -> None:
    checkpoint = tiny_checkpoint()
    prefix, rng = "model.layers.0.mlp.", np.random.default_rng(0)
    gate, up = (checkpoint.tensors[f"{prefix}{part}_proj.weight"].dense().copy() for part in ("gate", "up"))
    gate[:8] = gate[8]  # one gate: linear in up from there
    mix = rng.standard_normal((6, 2)).astype(np.float32)
    up[6:8] = mix.T @ up[:6]
    linear = _with(checkpoint, {f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up})
    keep = [n for n in range(128) if n not in (6, 7)]
    matrix = np.zeros((126, 2))
    matrix[:6] = mix
    agree(absorb(linear, "0.width", keep, matrix), linear)


@pytest.mark.parametrize("base", BASES)
def test_norms_fold_into_what_reads_them(base: str) -> None:
    checkpoint = BASES[base]()
    folded = fold_norms(checkpoint)
    assert (folded.tensors["model.layers.0.input_layernorm.weight"].dense() == 1).all()
    agree(folded, checkpoint)


def test_number_formats_stay_and_quantised_weights_say_so() -> None:
    base = tiny_checkpoint()
    name = "model.layers.0.mlp.up_proj.weight"
    half = replace(base, tensors={**base.tensors, name: Dense(base.tensors[name].dense().astype(np.float16), FP16)})
    made = cut(half, {"0.width": range(64)}).tensors[name]
    assert isinstance(made, Dense)
    assert made.number == FP16
    rounded = replace(base, tensors={**base.tensors, name: quantize_layer(base.tensors[name].dense(),
                                                                          QuantFormat.parse("int4/g32"))})
    with collect_notices() as notices:
        cut(rounded, {"0.width": range(64)})
    assert any("become float32" in str(one) for one in notices)


@pytest.mark.parametrize(("keep", "message"), [
    ({"9.width": [0]}, "no group '9.width'"), ({"0.width": [0, 128]}, "0 to 127"), ({"0.width": [1, 1]}, "each once"),
    ({"0.pairs.0": [0], "0.pairs.1": [0, 1]}, "unequal number"), ({"0.values.0": [0]}, "unequal number"),
    ({"0": [], "1": []}, "at least one layer"), ({"hidden": []}, "at least one dimension")])
def test_impossible_cuts_are_named(keep: dict[str, list[int]], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        cut(tiny_checkpoint(), keep)


def test_others_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="surgery is for decoders"):
        decoder_of(tiny_encoder())
    with pytest.raises(InvalidValueError, match="not merged"):
        merge(tiny_checkpoint(), "0.pairs.0", [[0, 1]])
    assert len(SHAPES) == 5
