"""Ranks of filters against plain loops, and what they do under scaling, death and indifference."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.prune.filter_ranks import (
    BetaRank,
    beta_scores,
    hrank_scores,
    l1_scores,
    normalised,
    random_scores,
    stability,
)
from edgewise.core.errors import InvalidValueError


def convolved(weight, x, config):
    """Outputs by loops."""
    x = np.pad(x, ((0, 0), (0, 0), *((pad, pad) for pad in config.padding)))
    kernel = weight.shape[2:]
    size = [(x.shape[2 + axis] - config.dilation[axis] * (kernel[axis] - 1) - 1) // config.stride[axis] + 1
            for axis in (0, 1)]
    out = np.zeros((len(x), len(weight), *size))
    for row in range(size[0]):
        for column in range(size[1]):
            out[:, :, row, column] = np.einsum("nchw,kchw->nk", patch(x, row, column, kernel, config), weight)
    return out


def patch(x, row, column, kernel, config):
    top, left = row * config.stride[0], column * config.stride[1]
    return x[:, :, top:top + config.dilation[0] * kernel[0]:config.dilation[0],
             left:left + config.dilation[1] * kernel[1]:config.dilation[1]][:, :, :kernel[0], :kernel[1]]


def slow(weight, x, y, config):
    """The released program's loops, with the axes and the padding of the convolution."""
    padded = np.pad(x, ((0, 0), (0, 0), *((pad, pad) for pad in config.padding)))
    scores = np.zeros(weight.shape)
    for k in range(len(weight)):
        for row in range(y.shape[2]):
            for column in range(y.shape[3]):
                a = np.std(y[:, k, row, column])
                b = np.std(patch(padded, row, column, weight.shape[2:], config)) if config.input_term else 1.0
                above, below = (a, b) if config.direction == "out over in" else (b, a)
                if below > 1e-12:
                    scores[k] += np.abs(weight[k]) * above / below
    return scores.mean(axis=(1, 2, 3))


@pytest.mark.parametrize("config", [
    BetaRank(), BetaRank("in over out"), BetaRank(padding=(1, 1)), BetaRank(stride=(2, 2), padding=(1, 1)),
    BetaRank("in over out", (2, 1), (0, 2), (1, 2)), BetaRank(input_term=False)])
def test_it_is_what_the_loops_say(config):
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(4, 3, 3, 2)), rng.normal(3, 2, size=(5, 3, 8, 9))
    y = convolved(weight, x, config)
    np.testing.assert_allclose(beta_scores(weight, x, y, config), slow(weight, x, y, config), rtol=1e-9)


@pytest.mark.parametrize("padding", [(0, 0), (1, 1)])
def test_scaling_a_filter_and_scaling_the_data(padding):
    rng = np.random.default_rng(1)
    weight, x = rng.normal(size=(4, 3, 3, 3)), rng.normal(size=(6, 3, 7, 7))
    for direction, by_filter, by_data in (("out over in", 9, 1), ("in over out", 1, 1)):
        config = BetaRank(direction, padding=padding)
        before = beta_scores(weight, x, convolved(weight, x, config), config)
        larger = weight * np.array([3, 1, 1, 1])[:, None, None, None]
        after = beta_scores(larger, x, convolved(larger, x, config), config)
        np.testing.assert_allclose(after / before, [by_filter, 1, 1, 1], rtol=1e-9)
        after = beta_scores(weight, 5 * x, convolved(weight, 5 * x, config), config)
        np.testing.assert_allclose(after / before, by_data, rtol=1e-9)


def test_a_filter_that_never_changes_is_last():
    rng = np.random.default_rng(2)
    weight, x = rng.normal(size=(5, 3, 3, 3)), rng.normal(size=(6, 3, 7, 7))
    x[:, 2] = 0.25  # a channel that says nothing, and a filter that reads only that, with the largest weights
    weight[3] = 0
    weight[3, 2] = 10.0
    y = convolved(weight, x, BetaRank())
    y[:, 3] += 7.0
    assert l1_scores(weight).argmax() == 3
    assert beta_scores(weight, x, y).argmin() == 3
    assert normalised(beta_scores(weight, x, y))[3] == pytest.approx(0, abs=1e-12)
    assert beta_scores(weight, x, y, BetaRank("in over out")).shape == (5,)


def test_a_constant_input_has_no_spread():
    weight, x = np.ones((2, 1, 3, 3)), np.full((4, 1, 6, 6), 0.1)
    y = convolved(weight, x, BetaRank())
    np.testing.assert_array_equal(beta_scores(weight, x, y), [0, 0])


def test_the_others():
    maps = np.zeros((2, 3, 4, 4))
    maps[:, 1] = np.eye(4)
    maps[0, 2] = np.outer([1, 2, 3, 4], [1, 0, 1, 0])
    np.testing.assert_array_equal(hrank_scores(maps), [0, 4, 0.5])
    np.testing.assert_array_equal(l1_scores(np.array([[[[1.0, -3.0]]], [[[0.0, 0.5]]]])), [2, 0.25])
    np.testing.assert_array_equal(random_scores(5, 1), random_scores(5, 1))
    np.testing.assert_array_equal(normalised(np.array([2.0, 4.0, 3.0])), [0, 1, 0.5])
    np.testing.assert_array_equal(normalised(np.ones(3)), 0)


def test_stability_is_the_share_itself_when_runs_agree():
    scores = np.arange(8.0)
    assert stability([scores, 2 * scores], 0.25) == 0.25
    assert stability([scores, scores[::-1]], 0.25) == 0.5


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(InvalidValueError, match="a weight"):
        beta_scores(np.ones((2, 3, 1, 1)), np.ones((4, 2, 5, 5)), np.ones((4, 2, 5, 5)))
