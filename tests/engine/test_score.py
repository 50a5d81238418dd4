"""Log-probabilities, windows and perplexity against the logits they come from; the distance of two models."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_checkpoints import llama

from edgewise.core.errors import ContextOverflowError, InvalidValueError
from edgewise.engine.loading import model_of
from edgewise.engine.score import log_probs, windows_of
from edgewise.measure.quality import kl_divergence


@pytest.fixture(scope="module")
def model():
    return model_of(llama(), threads=1, batch=32)


IDS = np.random.default_rng(0).integers(0, 256, 100).astype(np.int32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    wide = wide - wide.max(1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(1, keepdims=True))


@pytest.mark.parametrize("n", [2, 31, 32, 33, 64, 65, 100])
def test_log_probs_are_the_log_softmax_of_forward(model, n):
    """Around the passes of 32: the target of a pass's last row is the next pass's first token."""
    expected = log_softmax(model.forward(IDS[:n]))[np.arange(n - 1), IDS[1:n]]
    assert log_probs(model, IDS[:n]) == pytest.approx(expected, abs=1e-6)


def test_one_token_has_nothing_before_it(model):
    assert log_probs(model, IDS[:1]).shape == (0,)


def test_perplexity_takes_windows_side_by_side(model):
    losses = [-log_softmax(model.forward(w))[np.arange(29), w[1:]] for w in IDS[:90].reshape(3, 30)]
    assert model.perplexity(IDS, window=30) == pytest.approx(np.exp(np.mean(losses)), rel=1e-6)
    assert model.perplexity(IDS, window=30, windows=2) == pytest.approx(np.exp(np.mean(losses[:2])), rel=1e-6)
    text = model.tokenizer.decode(range(33, 90))
    assert model.perplexity(text, window=20) == pytest.approx(
        model.perplexity(model.encode(text, add_special=False), window=20))
    seen = []
    model.perplexity(IDS, window=50, progress=lambda *args: seen.append(args))
    assert seen == [("perplexity", 1, 2), ("perplexity", 2, 2)]


def test_windows_leave_a_shorter_rest_out(model):
    cut = windows_of(model, IDS, window=30)
    assert np.array_equal(cut.reshape(-1), IDS[:90])
    with pytest.raises(InvalidValueError, match="has 100 tokens, fewer than one window of 512"):
        windows_of(model, IDS)
    with pytest.raises(InvalidValueError, match="at least 2 tokens"):
        windows_of(model, IDS, window=1)


def test_wrong_sequences(model):
    for call in (model.forward, model.states, lambda ids: log_probs(model, ids)):
        with pytest.raises(InvalidValueError, match="token 300 is outside the vocabulary of 257"):
            call([1, 300])
        with pytest.raises(InvalidValueError, match="at least one token"):
            call([])
        with pytest.raises(ContextOverflowError, match="129 tokens do not fit the context of 128"):
            call([1] * 129)


def test_kl_divergence():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 5, 20)).astype(np.float32) * 4
    p, q = np.exp(log_softmax(a)), np.exp(log_softmax(b))
    assert kl_divergence(a, b) == pytest.approx((p * np.log(p / q)).sum(1), rel=1e-9)
    assert kl_divergence(a, a + 7) == pytest.approx(np.zeros(5), abs=1e-6)
    assert (kl_divergence(a, b) > 0).all()
    with pytest.raises(InvalidValueError, match=r"\(5, 20\) and \(5, 19\)"):
        kl_divergence(a, b[:, :19])
