"""The three-phase loop, the layers it wraps, and the choice of formats by sensitivity."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgewise.core.elements import FP4, FP32, INT4, POSIT4, POSIT8, POSIT16, round_to
from edgewise.core.errors import BudgetError, InvalidValueError
from edgewise.core.numbers import Granularity, QuantFormat, best_peak, dequantize, quantize

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from edgewise.train.qat import Phase, Qat, QuantizedLayer, calibrate, prepare, quantisable, stored_bits, train_phases  # noqa: E402
from edgewise.train.sensitivity import layer_fisher, layer_scores, under_budget, weight_error, widest_first  # noqa: E402

pytestmark = pytest.mark.slow


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                         nn.Linear(8 * 36, 16), nn.ReLU(), nn.Linear(16, 3))


def data(count=192, seed=0):
    """Which third of a picture is brightest."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    images = rng.normal(0, 1, (count, 1, 6, 6))
    for place, label in enumerate(labels):
        images[place, 0, :, 2 * label:2 * label + 2] += 0.7
    return torch.tensor(images, dtype=torch.float32), torch.tensor(labels)


X, Y = data()


def batches(rng):
    order = torch.from_numpy(rng.permutation(len(Y)))
    return [((X[part],), Y[part]) for part in order.split(32)]


def loss(model, batch):
    return nn.functional.cross_entropy(model(*batch[0]), batch[1])


def loss_on(model, x=None, y=None):
    x, y = data(2000, 1) if x is None else (x, y)
    model.eval()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), y))



@pytest.fixture(scope="module")
def trained():
    model = net()
    history = train_phases(model, batches, loss, [Phase("float", 12, 3e-3)])
    assert history[-1] < history[0] / 2
    return model


def test_a_layer_multiplies_what_the_core_says():
    torch.manual_seed(0)
    for layer, x in ((nn.Linear(20, 5), torch.randn(7, 20)), (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)),
                     (nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), torch.randn(2, 3, 9))):
        for element in (FP4, POSIT4, POSIT8, INT4):
            wrapped = QuantizedLayer(layer, element).eval()
            y = wrapped(x)
            weight = layer.weight.detach().numpy().reshape(len(layer.weight), -1)
            fmt = QuantFormat(element, Granularity("axis"), FP32)
            fmt = fmt if element is INT4 else best_peak(weight, fmt)
            codes, scales, _ = quantize(weight, fmt)
            exact = torch.from_numpy(dequantize(codes, scales, fmt)).reshape(layer.weight.shape)
            scale = np.float32(x.abs().max()) / np.float32(wrapped.inputs.limit)
            inputs = torch.from_numpy(round_to(x.numpy() / scale, element) * scale)
            twin = type(layer)(*((20, 5) if isinstance(layer, nn.Linear) else (3, 4, 3)),
                               **({} if isinstance(layer, nn.Linear) else
                                  {"padding": layer.padding, "padding_mode": layer.padding_mode}))
            twin.load_state_dict({"weight": exact, "bias": layer.bias.detach()})
            assert torch.equal(y, twin(inputs))


def test_preparing_leaves_the_model_as_it_was_and_names_what_is_unknown(trained):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    made = prepare(trained, {"0": POSIT8, "4": FP4, "6": None})
    calibrate(made, [(X,)])
    assert [type(made[place]) for place in (0, 4, 6)] == [QuantizedLayer, QuantizedLayer, nn.Linear]
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    sizes = [72, 8 * 36 * 16, 48]
    assert stored_bits(made) == pytest.approx((8 * sizes[0] + 4 * sizes[1] + 32 * sizes[2]) / sum(sizes))
    assert list(quantisable(trained)) == list(quantisable(made)) or len(quantisable(made)) == 3
    with pytest.raises(InvalidValueError, match="no layer 'x'"):
        prepare(trained, {"x": FP4})


def test_finer_formats_lose_less(trained):
    exact = loss_on(trained)
    gaps = []
    for element in (POSIT16, POSIT8, FP4):
        made = prepare(trained, dict.fromkeys(quantisable(trained), element))
        calibrate(made, [(X,)])
        gaps.append(abs(loss_on(made) - exact))
    assert gaps == sorted(gaps)
    assert gaps[0] < 1e-3 * exact


def test_training_regains_what_rounding_lost_and_a_broken_gradient_does_not(trained):
    exact = loss_on(trained, X, Y)
    formats = dict.fromkeys(quantisable(trained), POSIT4)
    phases = (Phase("weights", 4, 1e-3, weights=True), Phase("both", 8, 1e-3, weights=True, inputs=True))

    def made(broken):
        model = prepare(trained, formats)
        calibrate(model, [(X,)])
        rounded = loss_on(model, X, Y)
        for layer in model.modules():
            if isinstance(layer, QuantizedLayer):
                layer.broken_gradient = broken
        weights = [layer.weight.detach().clone() for layer in quantisable(model).values()]
        train_phases(model, batches, loss, phases, config=Qat(weight_decay=0.0))
        moved = any(not torch.equal(a, b.weight) for a, b in zip(weights, quantisable(model).values(), strict=True))
        return rounded, loss_on(model, X, Y), moved

    rounded, regained, moved = made(False)
    assert moved
    assert rounded > exact
    assert rounded - regained > 0.5 * (rounded - exact)
    _, broken, moved = made(True)
    assert not moved
    assert regained < broken


def test_statistics_of_norms_and_ranges_are_held(trained):
    model = prepare(trained, dict.fromkeys(quantisable(trained), FP4))
    norm = model[1].running_mean.clone()
    train_phases(model, batches, loss, [Phase("both", 1, 1e-3, weights=True, inputs=True)])
    assert torch.equal(model[1].running_mean, norm)
    peak = model[4].inputs.peak.clone()
    assert peak > 0
    model.train()
    model(X * 100)
    assert torch.equal(model[4].inputs.peak, peak)
    moved = prepare(trained, dict.fromkeys(quantisable(trained), FP4))
    train_phases(moved, batches, loss, [Phase("weights", 1, 1e-3, weights=True)])
    assert not torch.equal(moved[1].running_mean, norm)


def test_the_same_seed_trains_the_same(trained):
    def weights():
        model = prepare(trained, dict.fromkeys(quantisable(trained), FP4))
        train_phases(model, batches, loss, [Phase("both", 2, 1e-3, weights=True, inputs=True)], seed=3)
        return model[4].layer.weight

    assert torch.equal(weights(), weights())


# ---- sensitivity --------------------------------------------------------------------------------------------------

def test_scores_match_a_slow_transcription(trained):
    rng = np.random.default_rng(0)
    small = list(batches(rng))[:3]
    scores = layer_scores(trained, small, loss, FP4)
    fisher, size, error = {}, {}, {}
    for name, layer in quantisable(trained).items():
        squares, sizes = [], []
        for batch in small:
            trained.zero_grad()
            loss(trained, batch).backward()
            values = layer.weight.grad.flatten().tolist()
            squares.append(sum(v * v for v in values) / len(values))
            sizes.append(sum(abs(v) for v in values) / len(values))
        fisher[name], size[name], error[name] = sum(squares) / 3, sizes[0], weight_error(layer, FP4)

    for name, value in layer_fisher(trained, small, loss).items():
        assert value == pytest.approx(fisher[name], rel=1e-4)

    def unit(part):
        low, high = min(part.values()), max(part.values())
        return {name: (value - low) / (high - low) for name, value in part.items()}

    for name in scores:
        expected = 0.5 * unit(fisher)[name] + 0.3 * unit(size)[name] + 0.2 * unit(error)[name]
        assert scores[name] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(InvalidValueError, match="at least one layer"):
        layer_scores(nn.ReLU(), small, loss, FP4)


def test_the_highest_scores_are_wide():
    scores = {"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.0, "e": 0.2, "f": 0.3}
    assert [name for name, element in widest_first(scores, POSIT8, FP4).items() if element == POSIT8] == ["b"]
    assert [name for name, element in widest_first(scores, POSIT8, FP4, 0.5).items() if element == POSIT8] == [
        "b", "c", "f"]


def test_a_budget_is_met_by_the_best_choice(trained):
    layers = quantisable(trained)
    fisher = layer_fisher(trained, list(batches(np.random.default_rng(0)))[:2], loss)
    offered = [FP4, POSIT4, POSIT8, POSIT16]
    total = sum(layer.weight.numel() for layer in layers.values())

    def squares(name, element):
        weight = layers[name].weight.detach().numpy().reshape(len(layers[name].weight), -1)
        fmt = best_peak(weight, QuantFormat(element, Granularity("axis"), FP32))
        codes, scales, _ = quantize(weight, fmt)
        return float(np.square(dequantize(codes, scales, fmt) - weight).sum())

    error = {(name, element): squares(name, element) for name in layers for element in offered}

    def cost(choice):
        return sum(fisher[name] * error[name, element] for name, element in choice.items())

    def bits(choice):
        return sum(layers[name].weight.numel() * element.bits for name, element in choice.items()) / total

    every = [dict(zip(layers, picks, strict=True)) for picks in itertools.product(offered, repeat=len(layers))]
    for budget in (4.0, 4.1, 6.0, 8.1, 16.0):
        found = under_budget(trained, fisher, offered, budget)
        assert bits(found) <= budget
        assert cost(found) == pytest.approx(min(cost(each) for each in every if bits(each) <= budget), rel=1e-5)
    with pytest.raises(BudgetError, match="narrowest choice"):
        under_budget(trained, fisher, offered, 3.9)
