"""ZeroQAT's transformations keep the function, its pieces act, and its result is what was trained."""

from __future__ import annotations

from dataclasses import replace
from itertools import repeat

import numpy as np
import pytest
import torch

from edgewise.core.errors import InvalidValueError, UnsupportedError, collect_notices
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import Dense, QuantizedTensor
from edgewise.engine.loading import model_of
from edgewise.models.loader import load
from edgewise.models.static import layers_of
from edgewise.train.zeroqat import ZeroQat, language_loss, prepare, quantize, shifted, train
from edgewise.train.zeroth_order import ZerothOrder
from tiny_checkpoint import tiny_checkpoint, tiny_encoder

pytestmark = pytest.mark.slow
IDS = np.random.default_rng(0).integers(4, 260, 3000)
W8, W2 = QuantFormat.parse("int8/axis/fp32/int"), QuantFormat.parse("int2/g32/fp16/min")
QUICK = ZeroQat(steps=4, batch=2, length=16, update=ZerothOrder(learning_rate=1e-4))
PART = torch.from_numpy(IDS[:64].reshape(2, 32))


@pytest.fixture(scope="module")
def tiny():
    """As many value heads as query heads, so that every pair is there; four channels of a norm stand out."""
    made = tiny_checkpoint(kv_heads=4)
    tensors = dict(made.tensors)
    for layer in range(2):
        for norm, readers in (("input_layernorm", ("q", "k", "v")), ("post_attention_layernorm", ("gate", "up"))):
            name = f"model.layers.{layer}.{norm}.weight"
            factor = np.ones(64, np.float32)
            factor[[3, 17, 40, 51]] = 30
            tensors[name] = Dense(tensors[name].dense() * factor)
            for reader in readers:
                owner = "self_attn" if norm.startswith("input") else "mlp"
                weight = f"model.layers.{layer}.{owner}.{reader}_proj.weight"
                tensors[weight] = Dense(tensors[weight].dense() / factor)
    return replace(made, tensors=tensors)


def loss_of(made):
    with torch.no_grad():
        return language_loss(PART)(made.net)


def float_loss(checkpoint):
    with torch.no_grad():
        return language_loss(PART)(load(checkpoint))


def test_shifting_and_scaling_a_norm_keep_what_its_reader_gives():
    torch.manual_seed(0)
    x, gain, bias = torch.randn(5, 8).double(), torch.randn(8).double(), torch.randn(8).double()
    weight, out_bias, d = torch.randn(3, 8).double(), torch.randn(3).double(), torch.randn(8).double()
    s = torch.rand(8).double() + 0.5
    g, b, w, o = shifted(gain, bias, weight, out_bias, s, d)
    torch.testing.assert_close((x * g + b) @ w.T + o, (x * gain + bias) @ weight.T + out_bias)


def test_smoothing_keeps_the_function_and_saves_four_bits(tiny):
    fine = replace(QUICK, activation_bits=16, start="as defined", clip=20.0)
    exact = float_loss(tiny)
    for smooth in (False, True):
        made = prepare(tiny, IDS, QuantFormat.parse("int8/g32/fp32"), replace(fine, smooth=smooth))
        for linears in made.layers:
            for linear in linears.values():
                linear.quantised = linear.master  # no rounding of weights: what is left is the transformation
        assert loss_of(made) == pytest.approx(exact, abs=1e-3)
    coarse = replace(QUICK, activation_bits=4, start="as defined")
    with_, without = (abs(loss_of(prepare(tiny, IDS, W8, replace(coarse, smooth=smooth))) - exact)
                      for smooth in (True, False))
    assert with_ < 0.5 * without


def first_block(net):
    """What the first block gives, (batch, tokens, hidden), on the text that calibration saw."""
    seen = []
    hook = layers_of(net)[1][0].register_forward_hook(lambda module, args, result: seen.append(result))
    with torch.no_grad():
        net(torch.from_numpy(IDS[:512])[None])
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("start", ["search", "reconstruct"])
def test_a_start_lowers_the_error_of_a_block(tiny, start):
    def error(config):
        made = prepare(tiny, IDS, W2, config)
        return float((first_block(made.net) - first_block(load(tiny))).square().mean())

    assert error(replace(QUICK, start=start)) < 0.97 * error(replace(QUICK, start="as defined"))


def test_the_light_variant_packs_what_it_does_not_train(tiny):
    fmt = QuantFormat.parse("int4/g32/fp16/min")
    full, light = (prepare(tiny, IDS, fmt, replace(QUICK, trained=which)) for which in ("all", "q v"))
    assert loss_of(light) == pytest.approx(loss_of(full), abs=1e-6)  # packing is no change
    for linears in light.layers:
        kept = {name for name, linear in linears.items() if linear.weight is not None}
        assert kept == {"self_attn.q_proj", "self_attn.v_proj"}
        down = linears["mlp.down_proj"]
        assert down.packed_nbytes < 64 * 128 * (4 + 2 * 32 * 2 / 32 + 1) / 8 * 1.5
    assert sum(len(group.parameters) for group in light.moved()) == 4
    assert sum(len(group.parameters) for group in full.moved()) == 14


def test_training_moves_what_it_says_and_nothing_else(tiny):
    made = prepare(tiny, IDS, W2, replace(QUICK, trained="q v", train_quantisers=True))
    before = {name: value.clone() for name, value in made.state_dict().items()}
    packed = made.layers[0]["mlp.up_proj"].stored().codes.copy()
    train(made, repeat(language_loss(PART)))
    after = made.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert {name.split(".", 1)[1] for name in before} == {
        f"self_attn.{part}_proj{leaf}" for part in "qv" for leaf in ("", ".upper", ".lower")}
    np.testing.assert_array_equal(made.layers[0]["mlp.up_proj"].stored().codes, packed)


def test_training_lowers_the_loss_of_the_batch_it_sees(tiny):
    config = replace(QUICK, steps=150, trained="all", update=ZerothOrder(epsilon=1e-2, learning_rate=2e-4))
    made = prepare(tiny, IDS, QuantFormat.parse("int3/g32/fp16/min"), config)
    before = loss_of(made)
    train(made, repeat(language_loss(PART)))
    assert loss_of(made) < before - 0.02


def test_a_perturbation_too_small_for_the_grid_changes_nothing(tiny):
    config = replace(QUICK, smooth=False, start="as defined", clip=20.0, activation_bits=16)
    for epsilon, moves in ((1e-9, False), (1e-1, True)):
        made = prepare(tiny, IDS, QuantFormat.parse("int2/axis/fp32"), config)
        codes = made.layers[0]["mlp.up_proj"].stored().codes
        weight = made.layers[0]["mlp.up_proj"].weight
        weight.add_(torch.randn(weight.shape), alpha=epsilon)
        assert np.array_equal(made.layers[0]["mlp.up_proj"].stored().codes, codes) != moves


def test_the_checkpoint_is_the_trained_model(tiny, tmp_path):
    with collect_notices():
        result = quantize(tiny, IDS, W8, QUICK)
    weight = result.tensors["model.layers.1.self_attn.o_proj.weight"]
    assert isinstance(weight, QuantizedTensor)
    made = prepare(tiny, IDS, W8, QUICK)
    train(made, (language_loss(part) for part in _parts()))
    with torch.no_grad():
        trained = made.net(PART).logits.numpy()
    ours = model_of(result, threads=1, cache=False, kv="fp32", activations="float32").forward(
        PART[0].numpy().astype(np.int32))
    assert np.abs(ours - trained[0]).max() < 0.05 * np.abs(trained[0]).max()  # inputs of 8 bits there, float here


def _parts():
    from edgewise.train.small_llama import batches

    return batches(IDS, QUICK.batch, QUICK.length, QUICK.seed)


def test_a_killed_training_ends_as_an_undisturbed_one(tiny, tmp_path, monkeypatch):
    from edgewise.train import zeroqat as module
    from edgewise.train.kept import Kept

    monkeypatch.setattr(module, "Kept", lambda *words: Kept(*words, every_s=0.0))
    whole = quantize(tiny, IDS, W8, QUICK)

    def killed(what, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny, IDS, W8, QUICK, progress=killed, state=tmp_path)
    steps = []
    again = quantize(tiny, IDS, W8, QUICK, progress=lambda what, done, total: steps.append(done), state=tmp_path)
    assert steps == [3, 4]
    for name in whole.tensors:
        np.testing.assert_array_equal(again.tensors[name].dense(), whole.tensors[name].dense())


def test_what_cannot_be_is_said(tiny):
    with pytest.raises(UnsupportedError, match="Llama family"):
        prepare(tiny_encoder(), IDS, W8, QUICK)
    with pytest.raises(InvalidValueError, match="integers"):
        prepare(tiny, IDS, QuantFormat.parse("nf4/g32"), QUICK)
    with pytest.raises(InvalidValueError, match="trained is one of"):
        ZeroQat(trained="k")
