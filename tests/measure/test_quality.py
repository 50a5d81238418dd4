"""Perplexity and divergence on models whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgewise.core.errors import InvalidValueError, collect_notices
from edgewise.measure.quality import divergence, kl_divergence, log_softmax, perplexity, windows

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 7, 40)
TABLE = RNG.normal(size=(7, 7)) * 2


def bigram(ids):
    return TABLE[ids].astype(np.float32)


def test_uniform_model_has_the_vocabulary_as_perplexity():
    result = perplexity(lambda ids: np.zeros((len(ids), 7)), IDS, window=8)
    assert result.value == pytest.approx(7)
    assert (result.positions, result.windows) == (5 * 7, 5)
    assert result.error == pytest.approx(0, abs=1e-12)


def test_against_a_loop_over_windows_and_positions():
    losses = []
    for start in range(0, 40, 8):
        for i in range(1, 8):
            row = TABLE[IDS[start + i - 1]].astype(np.float32).astype(float)
            losses.append(math.log(sum(math.exp(v) for v in row)) - row[IDS[start + i]])
    result = perplexity(bigram, IDS, window=8)
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-12)
    low, high = result.quantity().spread
    assert low < result.value < high


def test_limit_takes_the_first_windows():
    told = []
    assert perplexity(bigram, IDS, window=8, limit=2, progress=told.append) == perplexity(bigram, IDS[:16], window=8)
    assert told == [1, 2]


def test_what_is_left_out_is_said():
    with collect_notices() as notices:
        assert [list(w) for w in windows(np.arange(10), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert len(list(windows(np.arange(8), 4, limit=5))) == 2
    assert [n.kind for n in notices] == ["info", "clamp"]
    with collect_notices() as notices:
        assert len(list(windows(np.arange(10), 4, limit=1))) == 1
    assert notices == []


def test_kl_against_the_definition():
    p, q = RNG.normal(size=(2, 5, 9))
    ours = kl_divergence(p, q)
    for i in range(5):
        a, b = np.exp(p[i]) / np.exp(p[i]).sum(), np.exp(q[i]) / np.exp(q[i]).sum()
        assert ours[i] == pytest.approx((a * np.log(a / b)).sum(), rel=1e-10)
    assert (ours > 0).all()
    np.testing.assert_allclose(kl_divergence(p, p + 3.0), 0, atol=1e-12)  # a constant shift changes nothing


def test_kl_of_impossible_tokens():
    assert kl_divergence(np.array([[0.0, -np.inf]]), np.array([[0.0, 0.0]]))[0] == pytest.approx(math.log(2))


def test_divergence_is_one_for_the_same_model_and_falls_with_noise():
    def noisy(scale):
        return lambda ids: bigram(ids) + np.random.default_rng(1).normal(0, scale, (len(ids), 7))

    same = divergence(bigram, bigram, IDS, window=8)
    assert (same.quality, same.agreement, same.positions) == (1.0, 1.0, 35)
    little, much = (divergence(bigram, noisy(s), IDS, window=8) for s in (0.1, 1.0))
    assert 1 > little.quality > much.quality > 0
    low, high = much.quantity().spread
    assert low < much.quality < high
    assert much.kl == pytest.approx(-math.log(much.quality))


def test_log_softmax_of_large_logits():
    np.testing.assert_allclose(log_softmax(np.array([1e4, 1e4])), [-math.log(2)] * 2)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: perplexity(bigram, IDS[:5], window=8), "5 tokens, fewer than one window of 8"),
    (lambda: perplexity(bigram, IDS[None]), "ids are"),
    (lambda: perplexity(bigram, IDS, window=1), "window"),
    (lambda: perplexity(bigram, IDS, window=8, limit=0), "limit"),
    (lambda: perplexity(lambda ids: bigram(ids)[1:], IDS, window=8), r"\(7, 7\) for 8 ids"),
    (lambda: perplexity(lambda ids: bigram(ids) * np.nan, IDS, window=8), "position 0"),
    (lambda: kl_divergence(np.zeros((2, 3)), np.zeros((2, 4))), "one shape"),
])
def test_refusals(make, message):
    with pytest.raises(InvalidValueError, match=message):
        make()
