"""Thin pairs are the layer at full rank, the best of their rank below it, and save what the formula says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgewise.core.errors import InvalidValueError, collect_notices
from edgewise.models.short_encoder import ShortEncoder, ThinPair
from edgewise.train.greenformers import (
    Greenformers,
    TrainingCost,
    crossover,
    factorised,
    largest_rank,
    layer_macs,
)
from edgewise.train.surgery import parameters

pytestmark = pytest.mark.slow


def of_rank(layer, rank):
    """Make a layer's weight of that rank."""
    weight = layer.weight.detach().reshape(len(layer.weight), -1)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    layer.weight = nn.Parameter(((u[:, :rank] * s[:rank]) @ vt[:rank]).reshape(layer.weight.shape))
    return layer


@pytest.mark.parametrize("split", ["even", "left"])
@pytest.mark.parametrize(("layer", "x"), [
    (nn.Linear(20, 30), torch.randn(4, 20)), (nn.Linear(16, 12, bias=False), torch.randn(2, 3, 16)),
    (nn.Conv2d(6, 10, 3, 2, 1), torch.randn(2, 6, 9, 9)), (nn.Conv2d(8, 8, 1, bias=False), torch.randn(2, 8, 4, 4))])
def test_a_layer_of_low_rank_is_its_pair(layer, x, split):
    layer = of_rank(layer, 3)
    made = factorised(nn.Sequential(layer), Greenformers(3, split=split))
    np.testing.assert_allclose(made(x).detach(), layer(x).detach(), rtol=0, atol=2e-5)
    assert parameters(made) < parameters(layer)


def test_the_error_is_what_svd_leaves():
    torch.manual_seed(0)
    layer = nn.Linear(40, 24)
    rank = int(0.5 * largest_rank(layer))
    assert rank == int(0.5 * 40 * 24 / 64)
    pair = factorised(nn.Sequential(layer), Greenformers(0.5))[0]
    gap = pair.second.weight @ pair.first.weight - layer.weight
    dropped = torch.linalg.svdvals(layer.weight)[rank:]
    assert float(gap.detach().norm()) == pytest.approx(float(dropped.detach().norm()), rel=1e-5)
    np.testing.assert_array_equal(pair.second.bias.detach(), layer.bias.detach())


def test_half_of_the_largest_rank_is_half_of_the_weights():
    layer = nn.Linear(100, 100, bias=False)
    assert parameters(factorised(nn.Sequential(layer), Greenformers(0.5))) == 5000


def test_what_would_not_save_stays_and_is_named():
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(4, 4, 3, groups=4))
    tied[1].weight = tied[0].weight
    with collect_notices() as notices:
        made = factorised(tied, Greenformers(0.5))
    assert [type(layer) for layer in made] == [nn.Linear, nn.Linear, nn.Conv2d]
    assert "3 layers" in notices[0].message
    with collect_notices() as notices:
        assert isinstance(factorised(nn.Sequential(nn.Linear(8, 8)), Greenformers(4))[0], nn.Linear)
    assert notices
    with pytest.raises(InvalidValueError, match="saves below"):
        ThinPair(8, 8, 4)


def test_only_named_submodules_are_walked_and_the_source_stays():
    model = ShortEncoder(4, 16, 2, 2, 32, 3, 8).build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = factorised(model, Greenformers(0.5, inside=("layers.0",)))
    assert isinstance(made.layers[0].up, ThinPair)
    assert isinstance(made.layers[1].up, nn.Linear)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_random_pairs_are_not_the_layer_and_follow_their_seed():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32)), torch.randn(64, 32)
    drawn = [factorised(model, Greenformers(0.9, "random", seed=seed))(x).detach() for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    wanted = model(x).detach()
    kept = factorised(model, Greenformers(0.9))(x).detach()
    assert (drawn[0] - wanted).norm() > 2 * (kept - wanted).norm()


def test_linformer_projects_along_the_sequence():
    torch.manual_seed(0)
    config = ShortEncoder(4, 16, 1, 2, 32, 3, 12, projected=5)
    layer = config.build().layers[0]
    x = torch.randn(2, 7, 16)
    normed = layer.norm1(x)
    slow = torch.zeros(2, 7, 16)
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        query = layer.query(normed)[..., part]
        key, value = (torch.einsum("kn,bnd->bkd", project[:, :7], linear(normed))[..., part] for project, linear in (
            (layer.project_keys, layer.key), (layer.project_values, layer.value)))
        slow[..., part] = torch.softmax(query @ key.transpose(1, 2) / 8**0.5, dim=-1) @ value
    inside = x + layer.out(slow)
    expected = inside + layer.down(functional.gelu(layer.up(layer.norm2(inside))))
    np.testing.assert_allclose(layer(x).detach(), expected.detach(), rtol=0, atol=1e-5)
    with pytest.raises(InvalidValueError, match="longer than 12"):
        config.build()(torch.randn(1, 13, 4))


def test_macs_are_the_formulas_and_cross_where_both_save_the_same():
    n, d, r, k = 100, 256, 64, 64
    assert layer_macs(n, d, 4 * d).linears == 12 * n * d * d
    assert layer_macs(n, d, 4 * d, rank=r).linears == 18 * n * d * r
    assert layer_macs(n, d, 4 * d).attention == 2 * n * n * d
    assert crossover(d, r, k) == 6 * d - 9 * r + 2 * k == 1088
    at = int(crossover(d, r, k))
    assert layer_macs(at, d, 4 * d, rank=r).total == layer_macs(at, d, 4 * d, projected=k).total
    assert layer_macs(at // 2, d, 4 * d, rank=r).total < layer_macs(at // 2, d, 4 * d, projected=k).total
    assert layer_macs(2 * at, d, 4 * d, rank=r).total > layer_macs(2 * at, d, 4 * d, projected=k).total


def test_the_calculator_of_training():
    cost = TrainingCost(79, 64 * 12041 / 1000)  # any machine
    assert cost.kwh == pytest.approx(1.58 * 64 * 12.041 * 79 / 1000)
    assert cost.co2_kg == pytest.approx(cost.kwh * 0.954 * 0.45359237)
    assert TrainingCost(10, 100, dollars_per_kwh=0.5).dollars == pytest.approx(0.79)
