"""MoDeGPT over a small Llama in the engine: exact where nothing is lost, each part beside its slow twin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgewise.compress.lowrank.modegpt import ModeGpt
from edgewise.compress.lowrank.modegpt_walk import shrink
from edgewise.core.errors import InvalidValueError, UnsupportedError
from edgewise.core.numbers import FP16
from edgewise.core.shapes import shapes_of
from edgewise.core.storage import Dense
from edgewise.engine.calibrate import EngineStats
from edgewise.engine.loading import model_of
from edgewise.formats.folder import read_folder
from edgewise.formats.folder_writer import write_folder
from tiny_checkpoint import tiny_checkpoint

BASE = tiny_checkpoint(layers=3, width=160, heads=4, kv_heads=2, hidden=64)
IDS = [np.random.default_rng(seed).integers(4, 260, 150).astype(np.int32) for seed in range(8)]
CONFIG = ModeGpt(sparsity=0.25, multiple=16)


def sources_of(checkpoint):
    return lambda gram: EngineStats(checkpoint, IDS, gram=gram, threads=1)


def logits(checkpoint):
    return model_of(checkpoint, threads=1, kv="fp32", activations="float32", cache=False).forward(IDS[0])


def with_weights(checkpoint, change):
    tensors = {name: checkpoint.tensors[name] for name in checkpoint.tensors}
    return replace(checkpoint, tensors={name: Dense(change(name, stored.dense().copy()).astype(np.float32))
                                        for name, stored in tensors.items()})


def test_a_model_of_which_nothing_goes_is_the_same():
    made, cuts = shrink(BASE, ModeGpt(sparsity=0.0), sources_of(BASE))
    np.testing.assert_array_equal(logits(made), logits(BASE))
    assert shapes_of(made.config) is None
    assert {cut.removed for cut in cuts} == {0.0}


def test_what_says_nothing_goes_without_a_trace():
    """A quarter of the neurons, of the rotary pairs and of the dimensions of values are silent: they go, and each key
    head has pairs of its own."""
    rng = np.random.default_rng(3)
    silent = {name: np.sort(rng.permutation(size)[:size // 4]) for name, size in (("neuron", 160), ("pair", 8),
                                                                                  ("value", 16))}
    pairs = [silent["pair"], (silent["pair"] + 3) % 8]

    def change(name, values):
        if "gate_proj" in name or "up_proj" in name:
            values[silent["neuron"]] = 0
        for part in ("q_proj", "k_proj"):
            if part in name:
                for head in range(len(values) // 16):
                    own = pairs[head // (2 if part == "q_proj" else 1)]
                    values[head * 16 + np.concatenate([own, own + 8])] = 0
        if "v_proj" in name:
            for head in range(2):
                values[head * 16 + silent["value"]] = 0
        return values

    source = with_weights(BASE, change)
    made, cuts = shrink(source, replace(CONFIG, multiple=8, allocation="uniform", ridge=1e-9), sources_of(source))
    shape = cuts[0].shape
    assert (shape.width, shape.key_dim, shape.value_dim) == (120, 12, 12)
    assert shape.pairs[0] == tuple(i for i in range(8) if i not in pairs[0])
    assert shape.pairs[1] == tuple(i for i in range(8) if i not in pairs[1])
    found, expected = logits(made), logits(source)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_the_parts_are_the_functions_of_modegpt():
    """Sizes, shares and errors, and that statistics are those of the dense model."""
    made, cuts = shrink(BASE, CONFIG, sources_of(BASE))
    linears = [name for name in BASE.tensors if name.endswith("_proj.weight")]
    before, after = (sum(np.prod(each.tensors[name].shape) for name in linears) for each in (BASE, made))
    assert after / before == pytest.approx(0.75, abs=0.02)  # half a multiple of 48 dimensions of heads
    assert [cut.removed for cut in sorted(cuts, key=lambda cut: cut.influence)] == sorted(
        (cut.removed for cut in cuts), reverse=True)
    for cut in cuts:
        assert 0 <= cut.feed_forward_error < 1
        assert (cut.feed_forward_error > 0) == (cut.shape.width < 160)
        assert (cut.value_error > 0) == (cut.shape.value_dim < 16)
    assert made.lineage[-1].name == "modegpt"


@pytest.mark.parametrize("switch", [{"reconstruct": False}, {"whiten": False}, {"neurons": "random"},
                                    {"dimensions": "random", "seed": 3}, {"pairs": False}, {"neurons": "magnitude"}])
def test_a_switch_changes_the_model_and_runs(switch):
    plain, switched = (shrink(BASE, each, sources_of(BASE))[0] for each in (CONFIG, replace(CONFIG, **switch)))
    found = logits(switched)
    assert np.isfinite(found).all()
    assert not np.array_equal(found, logits(plain))


@pytest.mark.parametrize("part", ["mlp", "qk", "vo"])
def test_parts_shrink_alone(part):
    made, _ = shrink(BASE, replace(CONFIG, parts=part), sources_of(BASE))
    changed = {name.rsplit(".", 2)[-2] for name in BASE.tensors
               if made.tensors[name].shape != BASE.tensors[name].shape}
    assert changed == {"mlp": {"gate_proj", "up_proj", "down_proj"}, "qk": {"q_proj", "k_proj"},
                       "vo": {"v_proj", "o_proj"}}[part]
    assert np.isfinite(logits(made)).all()


def test_biases_of_queries_keys_and_values_go_along():
    """Qwen2: a bias that makes one pair of every key head loud keeps it; a value's bias is an input that is one."""
    rng = np.random.default_rng(5)
    tensors = {name: BASE.tensors[name] for name in BASE.tensors}
    for layer in range(3):
        for part, size in (("q", 64), ("k", 32), ("v", 32)):
            bias = rng.standard_normal(size).astype(np.float32)
            if part != "v":
                bias[np.arange(size) % 8 == 5] = 30.0
            tensors[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = Dense(bias)
    config = {key: value for key, value in BASE.config.items() if key != "attention_bias"}
    source = replace(BASE, arch="qwen2", config={**config, "model_type": "qwen2"}, tensors=tensors)
    made, cuts = shrink(source, replace(CONFIG, sparsity=0.5, allocation="uniform"), sources_of(source))
    assert all(5 in own for cut in cuts for own in cut.shape.pairs)
    assert made.tensors["model.layers.0.self_attn.k_proj.bias"].shape == (16,)
    assert made.tensors["model.layers.0.self_attn.v_proj.bias"].shape == (16,)
    assert np.isfinite(logits(made)).all()
    whole, _ = shrink(source, replace(CONFIG, sparsity=0.0625, head_multiple=2, parts="vo", allocation="uniform"),
                      sources_of(source))
    gap = np.abs(logits(whole) - logits(source)).mean() / np.abs(logits(source)).mean()
    assert gap < 0.3


def test_halves_stay_halves_and_a_folder_holds_them(tmp_path):
    source = replace(BASE, tensors={name: Dense(BASE.tensors[name].dense().astype(np.float16), FP16)
                                    if len(BASE.tensors[name].shape) == 2 else BASE.tensors[name]
                                    for name in BASE.tensors})
    made, _ = shrink(source, CONFIG, sources_of(source))
    back = read_folder(write_folder(made, tmp_path / "made"))
    assert back.tensors["model.layers.1.mlp.down_proj.weight"].number == FP16
    np.testing.assert_array_equal(logits(back), logits(made))


@pytest.mark.parametrize("after", ["influence", "decomposing"])
def test_a_killed_run_goes_on_where_it_was(after, tmp_path):
    """What is finished is not asked for again, and what comes out is what an undisturbed run gives."""
    class Killed(Exception):
        pass

    asked = []

    class Counting(EngineStats):
        def stats(self, block, group, tensors):
            asked.append((block.index, group.site))
            return super().stats(block, group, tensors)

    def until(title, done, total):
        if title.startswith(after) and done == 2:
            raise Killed

    def sources(gram):
        return Counting(BASE, IDS, gram=gram, threads=1)

    state = tmp_path / "state"
    with pytest.raises(Killed):
        shrink(BASE, CONFIG, sources, state=state, key="text", progress=until)
    asked.clear()
    going_on = []
    made, cuts = shrink(BASE, CONFIG, sources, state=state, key="text", progress=lambda *what: going_on.append(what[0]))
    if after == "decomposing":
        assert {index for index, _ in asked} == {2}
        assert not any("influence" in title for title in going_on)
    whole, expected = shrink(BASE, CONFIG, sources_of(BASE))
    assert cuts == expected
    assert made.config == whole.config
    for name in whole.tensors:
        np.testing.assert_array_equal(made.tensors[name].dense(), whole.tensors[name].dense())
    with pytest.raises(InvalidValueError, match="state of another run"):
        shrink(BASE, CONFIG, sources, state=state, key="another text")


def test_what_does_not_fit_is_refused():
    made, _ = shrink(BASE, CONFIG, sources_of(BASE))
    with pytest.raises(UnsupportedError, match="unequal shapes already"):
        shrink(made, CONFIG, sources_of(BASE))
    with pytest.raises(InvalidValueError, match="needs the Gram matrix"):
        shrink(BASE, CONFIG, lambda gram: EngineStats(BASE, IDS, threads=1))
    without = replace(BASE, tensors={name: BASE.tensors[name] for name in BASE.tensors if "gate_proj" not in name})
    with pytest.raises(UnsupportedError, match=r"has no mlp\.gate_proj"):
        shrink(without, CONFIG, sources_of(BASE))


@pytest.mark.slow
def test_torch_runs_it_as_the_engine_does(tmp_path):
    import torch

    from edgewise.models import load

    made, _ = shrink(BASE, CONFIG, sources_of(BASE))
    folder = write_folder(made, tmp_path / "made")
    with torch.no_grad():
        theirs = load(folder)(torch.tensor(IDS[0][None].astype(np.int64))).logits[0].numpy()
    np.testing.assert_allclose(logits(made), theirs, atol=2e-3 * np.abs(theirs).max())
