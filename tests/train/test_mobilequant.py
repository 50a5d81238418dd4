"""MobileQuant: each part changes what it should, folding keeps the function, the folder runs as integers say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import build, checkpoint_of, ids_of, torch_output  # noqa: E402

from edgewise import models  # noqa: E402
from edgewise.core.activation import activations_of  # noqa: E402
from edgewise.core.checkpoint import Step  # noqa: E402
from edgewise.core.errors import InvalidValueError, UnsupportedError  # noqa: E402
from edgewise.core.numbers import QuantFormat  # noqa: E402
from edgewise.core.storage import QuantizedTensor  # noqa: E402
from edgewise.engine.loading import load  # noqa: E402
from edgewise.formats import read_folder, write_folder  # noqa: E402
from edgewise.train.equivalent import LINEARS, BlockShape, transformed  # noqa: E402
from edgewise.train.mobilequant import Learner, MobileQuant, ports, quantize  # noqa: E402

pytestmark = pytest.mark.slow

W8, W4 = (QuantFormat.parse(text) for text in ("int8/tensor/fp32/int", "int4/axis/fp32/int"))
SHORT = MobileQuant(steps=12, length=24)


def source(name="llama"):
    return checkpoint_of(build(name))


def texts(name="llama"):
    return np.stack([ids_of(build(name), 24, seed=seed) for seed in range(4)])


@pytest.mark.parametrize("name", ["llama", "llama without groups", "llama biases", "qwen2"])
@pytest.mark.parametrize("grouped", [False, True])
def test_scales_of_every_pair_keep_the_function(name, grouped):
    model = build(name)
    ids = ids_of(model, 30)
    before = torch_output(model, ids)
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        shape = BlockShape(layer, 4, model.config.num_key_value_heads, grouped=grouped)
        assert set(shape.pairs) == {"qkv", "fc1", "fc2"} | (
            {"out", "qk"} if grouped or name == "llama without groups" else set())
        scales = {pair: torch.rand(size, generator=generator) * 2 + 0.3 for pair, size in shape.pairs.items()}
        made = transformed(dict(layer.named_parameters()), scales, shape)
        with torch.no_grad():
            for key, value in layer.named_parameters():
                changed = made[key].detach()
                assert changed.shape == value.shape
                value.copy_(changed)
    assert np.abs(torch_output(model, ids) - before).max() < 1e-4 * np.abs(before).max()


def test_other_blocks_are_refused():
    for name in ("qwen3", "phi3", "gemma3"):
        with pytest.raises(UnsupportedError, match="Llama kind"):
            BlockShape(build(name).model.layers[0], 4, 2)


@pytest.mark.parametrize("fmt", [W8, W4])
def test_the_folder_rounds_as_training_did(fmt, tmp_path):
    learner = Learner(source(), texts(), fmt, SHORT)
    losses = learner.learn()
    assert len(losses) == 12
    made = learner.result()
    folder = read_folder(write_folder(made, tmp_path / "m"))
    assert len(activations_of(folder.config)) == 3 * 22
    loaded = models.load(folder)
    states = []
    loaded.model.norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    with torch.no_grad():
        for row, hidden in zip(texts(), learner.inputs.hidden, strict=True):
            loaded(torch.tensor(row)[None])
            expected = learner.states(hidden)
            # The same roundings of the same floats, but for those of sums of products in another order.
            assert (states.pop() - expected).abs().max() < 0.02 * expected.abs().max()
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert isinstance(made.tensors[name], QuantizedTensor)
        assert np.array_equal(folder.tensors[name].codes, made.tensors[name].codes)
        inner = learner.blocks[int(name.split(".")[2])].quantised()[name.split(".", 3)[3]]
        assert np.array_equal(made.tensors[name].dense(), inner.detach().numpy())
    assert made.tensors["model.layers.0.mlp.down_proj.weight"].scales.shape == (64, 1)
    assert made.tensors["model.layers.0.mlp.up_proj.weight"].scales.shape == ((1, 1) if fmt is W8 else (96, 1))


@pytest.mark.parametrize("fmt", [W8, W4])
def test_the_folder_runs_in_integers_as_torch_simulates_it(fmt, tmp_path):
    """Codes that reach the linears of a block within one of torch's; logits apart by a part of what rounding
    moves them by, which is what codes at an edge between two steps do to what follows."""
    whole = source()
    one = whole.with_tensors({name: whole.tensors[name] for name in whole.tensors if ".layers." not in name
                              or ".layers.0." in name}, Step("first block", {}), num_hidden_layers=1)
    made = quantize(one, texts(), fmt, SHORT)
    folder = write_folder(made, tmp_path / "m")
    loaded, sites, row = models.load(read_folder(folder)), activations_of(made.config), texts()[0]
    seen, block = {}, loaded.model.layers[0]
    for name, part in (("attention", block.self_attn.q_proj), ("output", block.self_attn.o_proj),
                       ("feed_forward", block.mlp.gate_proj), ("down", block.mlp.down_proj)):
        part.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0][0].detach().numpy()}))
    with torch.no_grad():
        expected, exact = (item(torch.tensor(row)[None]).logits[0].numpy() for item in (loaded, models.load(one)))
    model = load(str(folder), threads=2, context=32, cache=False)
    model.session.set_capture(True)
    model.session.forward(row.astype(np.int32), np.zeros(len(row), np.int32))
    for name, site in (("attention", "self_attn.q_proj"), ("output", "self_attn.o_proj"),
                       ("feed_forward", "mlp.gate_proj"), ("down", "mlp.down_proj")):
        grid = sites[f"model.layers.0.{site}.input"]
        apart = np.abs(grid.codes(model.session.captured(name)) - grid.codes(seen[name]))
        assert apart.max() <= 1, site
        assert (apart > 0).mean() < 0.02, site
    model.session.set_capture(False)
    model.reset()
    assert np.abs(model.forward(row) - expected).mean() < 0.2 * np.abs(expected - exact).mean()


def test_learning_lowers_the_error_and_folding_keeps_the_function():
    config = replace(SHORT, steps=60, scale_rate=5e-3)
    learner = Learner(source(), texts(), W4, config)
    before = learner.error()
    learner.learn()
    assert learner.error() < 0.9 * before
    assert learner.folding_error() < 1e-4
    moved = [float((scale.detach() - 1).abs().max()) for block in learner.blocks for scale in block.scales.values()]
    assert min(moved) > 1e-3
    assert "out" not in learner.blocks[0].scales


@pytest.mark.parametrize("part", ["scales", "clips", "ranges"])
def test_what_is_switched_off_does_not_move(part):
    learner = Learner(source(), texts(), W4, replace(SHORT, **{f"learn_{part}": False}))
    before = {name: value.detach().clone() for block in learner.blocks for name, value in block.named_parameters()}
    learner.learn()
    after = {name: value for block in learner.blocks for name, value in block.named_parameters()}
    own = {"scales": ("scales.",), "clips": ("upper.", "lower."), "ranges": ("sites.",)}
    for name, value in after.items():
        still = torch.equal(value, before[name])
        if name.startswith(own[part]):
            assert still, name
    for other in own.keys() - {part}:
        assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith(own[other])), other
    fixed = learner.blocks[0].sites["mlp/sigmoid"].rounding
    assert float(fixed.scale) == pytest.approx(1 / 255)


def test_smoothing_moves_range_into_weights_and_is_optional():
    plain = Learner(source(), texts(), W8, replace(SHORT, smooth=False))
    smooth = Learner(source(), texts(), W8, SHORT)
    assert plain.checkpoint.lineage == ()
    assert smooth.folding_error() < 1e-4
    assert not np.array_equal(smooth.checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].dense(),
                              plain.checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].dense())


def test_layer_by_layer_and_its_variants():
    config = replace(SHORT, level="layer", learn_ranges=False)
    learner = Learner(source(), texts(), W4, config)
    assert len(learner.learn()) == 36
    original = Learner(source(), texts(), W4, replace(config, up_down=False))
    assert set(original.blocks[0].scales) == {"qkv", "fc1"}
    original.learn()
    assert learner.error() != original.error()


@pytest.mark.parametrize("level", ["model", "layer"])
def test_a_killed_run_goes_on_where_it_was(level, tmp_path, monkeypatch):
    from edgewise.train import mobilequant

    monkeypatch.setattr(mobilequant, "_SAVED_EVERY", 5)
    config = replace(SHORT, level=level)
    whole = quantize(source(), texts(), W4, config)

    def killed(what, done, total):
        if what == "learning" and done == (8 if level == "model" else 20):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source(), texts(), W4, config, progress=killed, state=tmp_path / "s")
    told = []
    again = quantize(source(), texts(), W4, config, state=tmp_path / "s", progress=lambda *a: told.append(a))
    assert [done for what, done, _ in told if what == "learning"][1] == (6 if level == "model" else 16)
    for name in whole.tensors:
        assert np.array_equal(again.tensors[name].dense(), whole.tensors[name].dense()), name
    assert activations_of(again.config) == activations_of(whole.config)
    with pytest.raises(InvalidValueError, match="another run"):
        quantize(source(), texts(), W4, replace(config, seed=2), state=tmp_path / "s")


def test_symmetric_and_other_variants():
    made = quantize(source(), texts(), QuantFormat.parse("int4/axis/fp32"), replace(SHORT, steps=2, symmetric=True))
    found = activations_of(made.config)
    assert {item.zero for name, item in found.items() if name.endswith(".input") and "norm" not in name} == {128}
    wide = ports(MobileQuant(wide_gates=True))
    assert wide["mlp.gate_proj.output"] == wide["mlp.up_proj.output"] == 16
    assert {port for port, bits in ports(MobileQuant()).items() if bits == 16} == {
        "input_layernorm.input", "post_attention_layernorm.input", "self_attn.softmax_in", "self_attn.softmax_out",
        "self_attn.o_proj.output", "mlp.down_proj.output"}
    some = quantize(source(), texts(), W8, replace(SHORT, steps=2, blocks=2))
    assert not isinstance(some.tensors["model.layers.2.mlp.up_proj.weight"], QuantizedTensor)
    assert all(name.split(".")[2] in "01" for name in activations_of(some.config))
    assert len(LINEARS) == 7


def test_an_integer_product_is_what_was_simulated():
    """int8 x int8 -> int32 with the folder's scales, within one step of the output's."""
    made = quantize(source(), texts(), W8, replace(SHORT, steps=4))
    sites, name = activations_of(made.config), "model.layers.1.mlp.down_proj"
    weight, item, out = made.tensors[f"{name}.weight"], sites[f"{name}.input"], sites[f"{name}.output"]
    x = np.random.default_rng(0).uniform(item.low, item.high, (40, 96)).astype(np.float32)
    sums = (item.codes(x) - item.zero) @ (weight.codes.astype(np.int32) - weight.zeros.astype(np.int32)).T
    assert sums.dtype == np.int32
    integer = out.codes(sums * (np.float64(item.scale) * weight.scales[:, 0]))
    simulated = out.codes(item.round(x) @ weight.dense().T)
    assert np.abs(integer - simulated).max() <= 1


def test_refusals():
    for text in ("int4/g32/fp16/min", "nf4/axis/fp32"):
        with pytest.raises(InvalidValueError, match="per tensor or output channel"):
            quantize(source(), texts(), QuantFormat.parse(text), SHORT)
    with pytest.raises(InvalidValueError, match="at least two"):
        quantize(source(), np.array([1]), W8, SHORT)
    with pytest.raises(InvalidValueError, match="level is"):
        MobileQuant(level="other")
