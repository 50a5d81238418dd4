"""EdgeQAT's losses and routing against loops, its model against transformers, its result in the engine."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgewise.core.activation import activations_of
from edgewise.core.errors import InvalidValueError, UnsupportedError, collect_notices
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import QuantizedTensor
from edgewise.formats.folder import read_folder
from edgewise.formats.folder_writer import write_folder
from edgewise.train.edgeqat import (
    EdgeQat,
    QuantisedLlama,
    distribution_loss,
    edgeqat_loss,
    entropy_loss,
    least_important,
    quantize,
    train_edgeqat,
)
from edgewise.train.small_llama import batches, llama_of
from tiny_checkpoint import tiny_checkpoint, tiny_encoder

pytestmark = pytest.mark.slow
IDS = np.random.default_rng(0).integers(4, 260, 4000)
QUICK = EdgeQat(steps=6, batch=2, length=16, warmup=1)


@pytest.fixture(scope="module")
def tiny():
    return tiny_checkpoint()


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_the_distribution_loss_is_the_logarithm_of_summed_cosines():
    torch.manual_seed(0)
    ours, theirs = ([torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(2)] for _ in range(2))
    total = sum(cosine(ours[layer][b, h].flatten().tolist(), theirs[layer][b, h].flatten().tolist())
                for layer in range(2) for b in range(2) for h in range(3))
    aligned = [theirs[0] + 0.1 * ours[0], theirs[1]]
    loss, mean = distribution_loss(ours, theirs)
    assert mean == pytest.approx(total / 12)
    if total > 0:
        assert loss.item() == pytest.approx(-math.log(total))
    better, _ = distribution_loss(aligned, theirs)
    assert better < loss  # the sign: more alike is less loss


@pytest.mark.parametrize("form", ["code", "paper"])
def test_the_entropy_loss_against_loops(form):
    torch.manual_seed(0)
    q, k = [torch.randn(2, 4, 5, 6, dtype=torch.float64)], [torch.randn(2, 2, 5, 6, dtype=torch.float64)]
    total = 0.0
    if form == "code":
        for x in (q[0], k[0]):
            for vector in x.reshape(-1, 6):
                total += math.log(1 + np.var(vector.numpy(), ddof=1))
    else:
        for head in range(4):
            total += math.log(1 + np.var(q[0][:, head].numpy(), ddof=1) * np.var(k[0][:, head // 2].numpy(), ddof=1))
    assert entropy_loss(q, k, form).item() == pytest.approx(-math.log(total))
    assert entropy_loss([2 * q[0]], k, form) < entropy_loss(q, k, form)  # more variance is less loss


def test_tokens_that_look_least_at_the_first_one_are_routed():
    torch.manual_seed(0)
    scores = torch.randn(3, 2, 8, 8)
    looks = [sum(float(np.mean([scores[b, h, t, 0].item() for b in range(3)])) for h in range(2)) for t in range(8)]
    for share, count in ((0.0, 0), (0.5, 4), (1.0, 8)):
        assert least_important(scores, share).tolist() == sorted(np.argsort(looks)[:count].tolist())


def test_without_quantisers_it_is_the_model(tiny):
    part = next(batches(IDS, 2, 20, 0))
    model = llama_of(tiny)
    with torch.no_grad():
        logits, guide = QuantisedLlama(model, None)(part)
        torch.testing.assert_close(logits, model(part).logits, rtol=0, atol=1e-5)
    assert [tuple(scores.shape) for scores in guide.scores] == [(2, 4, 20, 20)] * 2


def test_half_of_the_tokens_have_the_codes_of_four_bits(tiny):
    student = QuantisedLlama(llama_of(tiny), replace(QUICK, low_bits=2, low_share=0.5))
    seen = {}
    site = student.layers[0].sites["hidden"]
    site.register_forward_hook(lambda module, inputs, output: seen.update(low=inputs[1], output=output))
    with torch.no_grad():
        student(next(batches(IDS, 2, 16, 0)))
    distinct = [len(torch.unique(seen["output"][:, token])) for token in range(16)]
    assert len(seen["low"]) == 8
    assert all((count <= 4) == (token in seen["low"]) for token, count in enumerate(distinct))


def test_bits_follow_the_layer_below_until_this_layers_scores(tiny):
    """Input, query and key take the set of the layer before, none in the first; value and feed-forward this one's."""
    student = QuantisedLlama(llama_of(tiny), QUICK)
    sets = {}
    for index, layer in enumerate(student.layers):
        for name, site in layer.sites.items():
            site.register_forward_hook(lambda module, inputs, output, key=(index, name): sets.update({key: inputs[1]}))
    with torch.no_grad():
        student(next(batches(IDS, 2, 16, 0)))
    for name in ("input", "query", "key"):
        assert sets[0, name] is None
        assert torch.equal(sets[1, name], sets[0, "value"])
    for index in range(2):
        assert torch.equal(sets[index, "value"], sets[index, "mlp_input"])
        assert torch.equal(sets[index, "value"], sets[index, "hidden"])


def test_training_aligns_the_maps_and_the_wrong_sign_does_not(tiny):
    config = replace(QUICK, steps=40, learning_rate=3e-3, weight_bits=2, low_share=0.0, entropy=0.0, alpha=0.5)
    teacher = QuantisedLlama(llama_of(tiny), None)
    found = {}
    for weight in (1.0, -1.0):
        student = train_edgeqat(tiny, IDS, replace(config, distribution=weight))
        with torch.no_grad():
            part = next(batches(IDS, 4, 16, 99))
            found[weight] = distribution_loss(student(part)[1].scores, teacher(part)[1].scores)[1]
    assert found[1.0] > found[-1.0] + 0.05


def test_a_killed_training_ends_as_an_undisturbed_one(tiny, tmp_path, monkeypatch):
    from edgewise.train import edgeqat as module

    monkeypatch.setattr(module, "Kept", lambda *words: module_kept(*words, every_s=0.0))
    from edgewise.train.kept import Kept as module_kept

    whole = quantize(tiny, IDS, None, QUICK)

    def killed(what, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny, IDS, None, QUICK, progress=killed, state=tmp_path)
    steps = []
    again = quantize(tiny, IDS, None, QUICK, progress=lambda what, done, total: steps.append(done), state=tmp_path)
    assert steps[0] == 4
    for name in whole.tensors:
        np.testing.assert_array_equal(again.tensors[name].dense(), whole.tensors[name].dense())
    with collect_notices() as notices:
        quantize(tiny, IDS, None, replace(QUICK, seed=1), state=tmp_path)
    assert any("other settings" in item.message for item in notices)


def test_the_folder_holds_integers_and_static_ranges(tiny, tmp_path):
    with collect_notices():
        made = quantize(tiny, IDS, None, QUICK)
    write_folder(made, tmp_path / "m")
    back = read_folder(tmp_path / "m")
    weight = back.tensors["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(weight, QuantizedTensor)
    assert weight.format == QuantFormat.parse("int4/tensor/fp32")
    assert len(np.unique(weight.codes)) <= 16
    sites = activations_of(back.config)
    assert sites == activations_of(made.config)
    assert {site.split(".", 3)[3] for site in sites} == {
        *(f"self_attn.{part}_proj.input" for part in "qkv"), "mlp.gate_proj.input", "mlp.up_proj.input",
        "mlp.down_proj.input"}


def test_exported_weights_are_those_that_were_trained(tiny):
    student = train_edgeqat(tiny, IDS, QUICK)
    from edgewise.train.edgeqat import exported

    with collect_notices():
        made = exported(student, tiny, QUICK)
    for index, layer in enumerate(student.layers):
        name = f"model.layers.{index}.mlp.up_proj"
        trained = layer.weights["mlp_up_proj"](student.float_model.get_submodule(name).weight).detach().numpy()
        np.testing.assert_array_equal(made.tensors[f"{name}.weight"].dense(), trained)


def test_gradients_reach_weights_steps_and_zero_points(tiny):
    student, teacher = QuantisedLlama(llama_of(tiny), QUICK), QuantisedLlama(llama_of(tiny), None)
    loss, _ = edgeqat_loss(student, teacher, next(batches(IDS, 2, 16, 0)), QUICK)
    loss.backward()
    for layer in student.layers:
        assert all(float(quantiser.step.grad.abs()) > 0 for quantiser in layer.weights.values())
        assert all(float(site.high.step.grad.abs()) > 0 for site in layer.sites.values())


def test_what_cannot_be_is_said(tiny):
    with pytest.raises(UnsupportedError, match="Llama family"):
        train_edgeqat(tiny_encoder(), IDS, QUICK)
    with pytest.raises(InvalidValueError, match="one learned scale"):
        quantize(tiny, IDS, QuantFormat.parse("int4/g32"), QUICK)
    with pytest.raises(InvalidValueError, match="2 to 8 bits"):
        EdgeQat(weight_bits=1)
