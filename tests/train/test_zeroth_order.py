"""The estimate is the gradient on average, noise is replayed exactly, and a step is what the slow loop does."""

from __future__ import annotations

import math

import pytest
import torch

from edgewise.core.errors import InvalidValueError
from edgewise.train.zeroth_order import Moved, ZerothOrder, move, step

pytestmark = pytest.mark.slow


def toy(seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4)).double()
    x, y = torch.randn(64, 16).double(), torch.randint(0, 4, (64,))
    return net, lambda: torch.nn.functional.cross_entropy(net(x), y)


def test_the_mean_of_many_estimates_points_along_the_gradient():
    net, loss = toy()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), list(net.parameters()))])
    parameters = {name: value.detach() for name, value in net.named_parameters()}
    total = torch.zeros_like(gradient)
    epsilon, count = 1e-4, 2000
    with torch.no_grad():
        for seed in range(count):
            before = {name: value.clone() for name, value in parameters.items()}
            config = ZerothOrder(epsilon=epsilon, learning_rate=1.0, clip=None, exact=True)
            step([Moved(parameters)], lambda: float(loss()), config, seed)
            total += torch.cat([(before[name] - value).flatten() for name, value in parameters.items()])
            for name, value in parameters.items():
                value.copy_(before[name])
    dimensions = len(gradient)
    expected = math.sqrt(count / (count + dimensions + 1))  # of noise whose mean over draws is the gradient
    assert 480 < dimensions < 540
    cosine = float(torch.nn.functional.cosine_similarity(total, gradient, dim=0))
    assert cosine == pytest.approx(expected, abs=0.05)


def test_a_step_is_the_slow_loop():
    a, b = torch.tensor([1.0, -2.0]).double(), torch.tensor([[0.5]]).double()

    def loss():
        return float((a**2).sum() + 3 * b.sum())

    groups = [Moved({"b": b}, epsilon_factor=2.0, rate_factor=5.0), Moved({"a": a})]
    config = ZerothOrder(epsilon=1e-3, learning_rate=1e-2, directions=2, clip=None)
    expected_a, expected_b = a.clone(), b.clone()
    for direction in (7, 8):
        generator = torch.Generator().manual_seed(direction)
        ub, ua = (torch.randn(shape, generator=generator) for shape in ((1, 1), (2,)))
        high = float(((a + 1e-3 * ua)**2).sum() + 3 * (b + 2e-3 * ub).sum())
        low = float(((a - 1e-3 * ua)**2).sum() + 3 * (b - 2e-3 * ub).sum())
        slope = (high - low) / 2e-3
        expected_a -= 1e-2 / 2 * slope * ua
        expected_b -= 5e-2 / 2 * slope * ub
    step(groups, loss, config, 7)
    torch.testing.assert_close(a, expected_a, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(b, expected_b, rtol=1e-9, atol=1e-9)


def test_noise_is_the_same_each_time_and_in_the_order_of_names():
    one, two = {"x": torch.zeros(3), "y": torch.zeros(2)}, {"y": torch.zeros(2), "x": torch.zeros(3)}
    for parameters in (one, two):
        move([Moved(parameters)], 5, 1.0)
    assert all(torch.equal(one[name], two[name]) for name in one)
    move([Moved(one)], 5, -1.0)
    assert all(not value.any() for value in one.values())


def test_exact_restores_to_the_bit_and_in_place_does_not_quite():
    for exact in (True, False):
        torch.manual_seed(0)
        parameter = torch.randn(10_000)
        before = parameter.clone()
        step([Moved({"p": parameter})], lambda: 0.0, ZerothOrder(epsilon=0.3, exact=exact), 1)
        assert torch.equal(parameter, before) == exact
        torch.testing.assert_close(parameter, before, rtol=0, atol=1e-6)


def test_differences_are_clipped():
    parameter = torch.zeros(1)
    noise = torch.randn(1, generator=torch.Generator().manual_seed(3))
    step([Moved({"p": parameter})], lambda: 1e6 * float(parameter), ZerothOrder(epsilon=1e-3, learning_rate=1e-4), 3)
    assert float(parameter.abs()) == pytest.approx(1e-4 * 0.2 / 1e-3 * float(noise.abs()), rel=1e-4)


def test_a_loss_that_is_not_finite_changes_nothing():
    parameter = torch.ones(4)
    with pytest.raises(InvalidValueError, match="not finite"):
        step([Moved({"p": parameter})], lambda: math.nan, ZerothOrder(exact=True), 0)
    assert torch.equal(parameter, torch.ones(4))
    with pytest.raises(InvalidValueError, match="positive epsilon"):
        ZerothOrder(epsilon=0.0)
