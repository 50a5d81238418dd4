"""Filters are ranked on what their layer saw, and the lowest go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgewise.compress.prune.filter_ranks import BetaRank, beta_scores, hrank_scores, l1_scores, normalised
from edgewise.core.errors import InvalidValueError
from edgewise.models.convnets import ResNet, Stack
from edgewise.train.filter_pruning import FilterPruning, prune_filters, rank_filters
from edgewise.train.surgery import units_of

pytestmark = pytest.mark.slow
NET = Stack(((6, 3, True), (10, 3, True)), (), 3, 3, 12, norm=True, padded=True, flat=False)


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    model, pictures = NET.build(), torch.randn(8, 3, 12, 12)
    model(pictures)  # statistics
    model.eval()
    return model, units_of(model, pictures[:1]), pictures


def test_scores_are_those_of_the_layers_own_inputs_and_outputs(made):
    model, units, pictures = made
    with torch.no_grad():
        first = model[0](pictures)
        inside = model[:4](pictures)  # what the second convolution reads
        second = model[4](inside)
        maps = functional.relu(model[5](second))
    weight = model[4].weight.detach().numpy()
    config = BetaRank(padding=(1, 1))
    expected = {"beta": normalised(beta_scores(weight, inside.numpy(), second.numpy(), config)),
                "l1": normalised(l1_scores(weight)), "hrank": normalised(hrank_scores(maps.numpy()))}
    for rank, scores in expected.items():
        found = rank_filters(model, units, pictures, FilterPruning(rank))
        np.testing.assert_allclose(found["4"], scores, rtol=1e-6)
    assert first.shape[1] == len(found["0"])
    raw = rank_filters(model, units, pictures, FilterPruning("l1", raw=True))["4"]
    np.testing.assert_allclose(raw, l1_scores(weight), rtol=1e-6)


def test_the_highest_stay_in_their_order(made):
    model, units, pictures = made
    scores = rank_filters(model, units, pictures, FilterPruning())
    smaller = prune_filters(model, units, pictures, FilterPruning(rate=0.5))
    kept = np.sort(np.argsort(-scores["0"])[:3])
    np.testing.assert_array_equal(smaller[0].weight.detach(), model[0].weight.detach()[kept])
    np.testing.assert_array_equal(smaller[1].running_var, model[1].running_var[kept])
    other = prune_filters(model, units, pictures, FilterPruning("random", rate=0.5, seed=3))
    again = prune_filters(model, units, pictures, FilterPruning("random", rate=0.5, seed=3))
    np.testing.assert_array_equal(other[0].weight.detach(), again[0].weight.detach())


def test_the_programs_scaling_and_fresh_normalisation(made):
    model, units, pictures = made
    scores = rank_filters(model, units, pictures, FilterPruning())["0"]
    smaller = prune_filters(model, units, pictures, FilterPruning(rate={"0": 0.5}, scaled=True, fresh_norm=True))
    kept = np.sort(np.argsort(-scores)[:3])
    factors = (1 + scores[kept]).astype(np.float32)[:, None, None, None]
    np.testing.assert_allclose(smaller[0].weight.detach(), model[0].weight.detach().numpy()[kept] * factors, rtol=1e-6)
    assert smaller[4].out_channels == 10
    np.testing.assert_array_equal(smaller[1].running_var, 1)
    np.testing.assert_array_equal(smaller[1].running_mean, 0)


def test_tied_channels_share_their_score():
    torch.manual_seed(0)
    model, pictures = ResNet(1, (4,), 3, 3, 8).build().eval(), torch.randn(4, 3, 8, 8)
    units = units_of(model, pictures[:1])
    scores = rank_filters(model, units, pictures, FilterPruning("l1"))
    weights = [model.stem.weight, model.blocks[0].conv2.weight]
    np.testing.assert_allclose(scores["stem"], np.mean([normalised(l1_scores(w.detach().numpy())) for w in weights],
                                                       axis=0), rtol=1e-6)
    smaller = prune_filters(model, units, pictures, FilterPruning("beta", rate=0.5))
    assert smaller.stem.out_channels == smaller.blocks[0].conv2.out_channels == 2
    assert isinstance(smaller, nn.Module)


def test_a_rate_of_one_is_refused(made):
    model, units, pictures = made
    with pytest.raises(InvalidValueError, match="rate"):
        prune_filters(model, units, pictures, FilterPruning(rate=1.0))
