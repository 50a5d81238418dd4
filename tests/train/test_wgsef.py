"""At most k groups stay, of whatever kind they are, and what is zero is really cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgewise.core.errors import InvalidValueError
from edgewise.models.convnets import ResNet, Stack
from edgewise.train.pictures import Epochs, learn, predictions, scores
from edgewise.train.surgery import cut, remove_blocks, units_of
from edgewise.train.wgsef import (
    Level,
    Wgsef,
    _multiply,
    _sums,
    block_level,
    norms_of,
    tensor_level,
    train_wgsef,
    unit_levels,
    zeros,
)

pytestmark = pytest.mark.slow
NET = Stack(((6, 3, True), (10, 3, True)), (), 3, 3, 16, norm=True, padded=True, flat=False)
SHORT = Wgsef(strength=0.5, growth=2.0, plain=0.25, debias=0.25, epochs=Epochs(12, 16, 0.05, weight_decay=0.0))


@pytest.fixture(scope="module")
def data():
    """Stripes that are brighter along rows, along columns, or along neither, by colour."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, 256)
    wave = np.sin(np.arange(16) * 1.6 + rng.uniform(0, 6, (256, 1)))
    pictures = rng.normal(0, 0.5, (256, 3, 16, 16)) + np.where(
        kinds[:, None, None] == 2, 0, np.where(kinds[:, None, None] == 1, wave[:, None, :], wave[:, :, None]))[:, None]
    return torch.from_numpy(pictures.astype(np.float32)), torch.from_numpy(kinds)


def net(config=NET, seed=0):
    torch.manual_seed(seed)
    return config.build()


def test_norms_are_those_of_a_loop(data):
    model = net()
    units = units_of(model, data[0][:1])
    level = next(level for level in unit_levels(model, units, 0.5) if level.name == "0")
    state = dict(model.named_parameters())
    for channel in range(6):
        parts = [state["1.weight"][channel], state["1.bias"][channel]]  # the filter is normalised
        squares = sum(float((part.detach() ** 2).sum()) for part in parts)
        assert norms_of(model, level)[channel] == pytest.approx(squares**0.5, rel=1e-6)
    for kind, loop in (("channel", lambda w, i: w[:, i]), ("shape", lambda w, i: w.flatten(1)[:, i]),
                       ("weight", lambda w, i: w.reshape(-1)[i]), ("layer", lambda w, i: w)):
        level = tensor_level(model, "4.weight", kind, 0.5)
        weight = state["4.weight"].detach()
        np.testing.assert_allclose(norms_of(model, level), [float((loop(weight, i) ** 2).sum()) ** 0.5
                                                            for i in range(level.count)], rtol=1e-5)


def test_entries_outside_of_every_group_are_left_alone():
    level = Level("some", {"w": np.array([[0], [-1], [1]])}, 1)
    tensors = {"w": torch.ones(3, 2)}
    np.testing.assert_array_equal(_sums(tensors, level), [2, 2])
    _multiply(tensors, level, np.array([0.0, 0.5]))
    np.testing.assert_array_equal(tensors["w"], [[0, 0], [1, 1], [0.5, 0.5]])


def test_a_filter_without_a_normalisation_is_in_its_group(data):
    model = net(replace(NET, norm=False))
    level = unit_levels(model, units_of(model, data[0][:1]), 0.5)[0]
    assert set(level.labels) == {"0.weight", "0.bias"}
    assert not level.hidden


def test_normalised_filters_keep_their_size_or_become_zero(data):
    """Shrunk with its scale, a filter would be turned ever further by the same learning rate."""
    pictures, kinds = data
    sizes = []
    for penalty in ("wgsef", "none"):
        model = net()
        levels = unit_levels(model, units_of(model, pictures[:1]), 0.5)
        train_wgsef(model, levels, pictures, kinds, replace(SHORT, penalty=penalty))
        norms = model[0].weight.detach().flatten(1).norm(dim=1)
        sizes.append(norms[norms > 0].numpy())
        assert set(levels[0].hidden) == {"0.weight"}
    assert len(sizes[0]) == 3
    assert sizes[0].min() > 0.8 * sizes[1].min()


def test_the_penalty_brings_each_layer_near_its_level_and_the_cut_is_exact(data):
    pictures, kinds = data
    model = net()
    units = units_of(model, pictures[:1])
    levels = unit_levels(model, units, 0.5)
    trained = train_wgsef(model, levels, pictures, kinds, SHORT)
    for level in levels:
        assert level.k <= trained.before[level.name] <= 1.25 * level.k  # by the penalty, before the projection
        assert trained.kept[level.name].sum() == level.k
        assert trained.survivors[2][level.name] == level.count  # not before it acts
    assert trained.steps is not None
    smaller = cut(model, units, zeros(trained))
    with torch.no_grad():
        np.testing.assert_allclose(smaller(pictures), model(pictures), rtol=0, atol=1e-5)
    assert smaller[0].out_channels == 3
    assert scores(predictions(smaller, pictures), kinds.numpy(), 3)["accuracy"] > 0.5


@pytest.mark.parametrize("penalty", ["ridge", "none"])
def test_without_the_envelope_nothing_becomes_zero(penalty, data):
    pictures, kinds = data
    model = net()
    levels = unit_levels(model, units_of(model, pictures[:1]), 0.5)
    trained = train_wgsef(model, levels, pictures, kinds, replace(SHORT, penalty=penalty))
    assert all(trained.survivors[7][level.name] == level.count for level in levels)
    assert trained.steps is None


def test_the_level_is_set_by_k_and_group_lasso_knows_none(data):
    pictures, kinds = data
    found = {}
    for penalty, strength in (("wgsef", 4.0), ("group lasso", 1.0)):
        for share in (0.3, 0.6):
            model = net()
            levels = unit_levels(model, units_of(model, pictures[:1]), share)
            config = replace(SHORT, penalty=penalty, strength=strength, stop=False, ramp=False)
            before = train_wgsef(model, levels, pictures, kinds, config).before
            found[penalty, share] = [before[level.name] / level.count for level in levels]
    assert found["group lasso", 0.3] == found["group lasso", 0.6]  # it knows no k
    assert min(found["wgsef", 0.6]) > max(found["wgsef", 0.3])


@pytest.mark.parametrize("kind", ["filter", "channel", "shape", "weight"])
def test_groups_are_freely_defined(kind, data):
    pictures, kinds = data
    model = net()
    level = tensor_level(model, "4.weight", kind, 0.5)
    trained = train_wgsef(model, [level], pictures, kinds, SHORT)
    assert 0 < trained.kept[level.name].sum() <= level.k < level.count
    weight = model[4].weight.detach().numpy()
    empty = {"filter": (weight == 0).all((1, 2, 3)), "channel": (weight == 0).all((0, 2, 3)),
             "shape": (weight == 0).all(0), "weight": weight == 0}[kind]
    assert empty.sum() >= level.count - level.k


def test_blocks_go_in_depth(data):
    pictures, kinds = data
    model = net(ResNet(3, (6,), 3, 3, 16))
    level = block_level(model, 1)
    assert level.count == 3
    trained = train_wgsef(model, [level], pictures, kinds, SHORT)
    names = [name for name, module in model.named_modules() if getattr(module, "removable", False)]
    gone = [names[place] for place in zeros(trained)["blocks"]]
    assert len(gone) == 2
    smaller = remove_blocks(model, gone)
    with torch.no_grad():
        np.testing.assert_allclose(smaller.eval()(pictures), model.eval()(pictures), rtol=0, atol=1e-5)


def test_half_space_steps_take_groups_that_move_towards_zero(data):
    pictures, kinds = data
    model = net()
    levels = unit_levels(model, units_of(model, pictures[:1]), 0.5)
    base = replace(SHORT, stop=False, ramp=False, strength=0.1)
    proximal = train_wgsef(model, levels, pictures, kinds, base)
    model = net()
    halves = train_wgsef(model, levels, pictures, kinds, replace(base, half_space=0.999))
    assert sum(halves.before.values()) < sum(proximal.before.values())


def test_training_is_deterministic_and_learns(data):
    pictures, kinds = data
    first, second = net(), net()
    for model in (first, second):
        learn(model, pictures, kinds, Epochs(14, 16, 0.05))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        np.testing.assert_array_equal(a.detach(), b.detach())
    assert scores(predictions(first, pictures), kinds.numpy(), 3)["accuracy"] > 0.7


def test_distillation_pulls_towards_the_teacher(data):
    pictures, kinds = data
    teacher = net(seed=5)
    learn(teacher, pictures, kinds, Epochs(4, 32, 0.05))
    apart = []
    for share in (0.0, 1.0):
        student = net(seed=1)
        learn(student, pictures, kinds, Epochs(6, 32, 0.05, distilled=share), teacher=teacher)
        with torch.no_grad():
            wanted, found = (torch.log_softmax(each(pictures), dim=1) for each in (teacher, student))
        apart.append(float((wanted.exp() * (wanted - found)).sum(dim=1).mean()))
    assert apart[1] < apart[0]


def test_scores_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    found, kinds = rng.integers(0, 3, 50), rng.integers(0, 3, 50)
    recalls, f1s = [], []
    for kind in range(3):
        hit = ((found == kind) & (kinds == kind)).sum()
        recall, precision = hit / (kinds == kind).sum(), hit / (found == kind).sum()
        recalls.append(recall)
        f1s.append(2 * recall * precision / (recall + precision))
    made = scores(found, kinds, 3)
    assert made["accuracy"] == pytest.approx((found == kinds).mean())
    assert made["recall"] == pytest.approx(np.mean(recalls))
    assert made["f1"] == pytest.approx(np.mean(f1s))


def test_what_cannot_be_is_refused(data):
    with pytest.raises(InvalidValueError, match="k from 1"):
        Level("none", {"w": np.arange(3)}, 4)
    with pytest.raises(InvalidValueError, match="no block"):
        block_level(net(), 1)
    with pytest.raises(InvalidValueError, match="leave epochs"):
        Wgsef(plain=0.5, debias=0.5)
    with pytest.raises(InvalidValueError, match="batches of 2"):
        Epochs(batch=1)
    assert Epochs(schedule="steps", learning_rate=1.0).rate(0.5) == pytest.approx(0.1)
    assert Epochs(schedule="cosine", learning_rate=1.0).rate(0.5) == pytest.approx(0.5)
