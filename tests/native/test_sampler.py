"""The sampler against NumPy: which tokens each filter leaves, how often each is drawn, and what is reported."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.native import _core

VOCAB = 40


def sampler(**options):
    return _core.Sampler(**options)


def some_logits(seed: int = 0, size: int = VOCAB) -> np.ndarray:
    return (2 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def warped(logits: np.ndarray, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """Probabilities after the filters, in their order: temperature, top-k, top-p, min-p. Ties to the lower number."""
    scores = logits.astype(np.float64) / temperature
    order = np.lexsort((np.arange(len(scores)), -scores))
    kept = order[:top_k] if top_k else order
    p = np.exp(scores[kept] - scores.max())
    p /= p.sum()
    before = np.cumsum(p) - p  # the shortest run of the likeliest that holds top_p, and at least one
    kept, p = kept[(before < top_p) | (np.arange(len(p)) == 0)], p[(before < top_p) | (np.arange(len(p)) == 0)]
    kept, p = kept[p >= min_p * p[0]], p[p >= min_p * p[0]]
    out = np.zeros(len(logits))
    out[kept] = p / p.sum()
    return out


def counts(logits: np.ndarray, draws: int, **options) -> np.ndarray:
    made = sampler(seed=7, **options)
    return np.bincount([made.sample(logits).token for _ in range(draws)], minlength=len(logits))


def chi_square(found: np.ndarray, p: np.ndarray) -> float:
    """Pearson's statistic over its degrees of freedom; tokens expected fewer than five times are taken together."""
    expected = p * found.sum()
    rare = expected < 5
    observed = np.append(found[~rare], found[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    use = expected > 0
    return float(((observed[use] - expected[use]) ** 2 / expected[use]).sum() / max(use.sum() - 1, 1))


@pytest.mark.parametrize("options", [
    {"temperature": 1.0}, {"temperature": 0.4}, {"temperature": 2.5}, {"temperature": 1.0, "top_k": 6},
    {"temperature": 1.3, "top_p": 0.8}, {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05}], ids=str)
def test_draws_follow_the_distribution(options):
    logits = some_logits()
    p = warped(logits, **options)
    found = counts(logits, 20_000, **options)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(p))
    # Of twenty or so degrees of freedom: beyond 2 with probability below 1 %; the seed is fixed.
    assert chi_square(found, p) < 2
    wrong = warped(logits, **{**options, "temperature": options["temperature"] * 1.2})
    assert chi_square(found, wrong) > 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("options", [
    {"top_k": 1}, {"top_k": 7}, {"top_k": VOCAB}, {"top_k": 1000}, {"top_p": 0.5}, {"top_p": 0.0}, {"top_p": 0.99},
    {"min_p": 0.5}, {"min_p": 1.0}, {"min_p": 0.01}, {"top_k": 9, "top_p": 0.7}, {"top_p": 0.85, "min_p": 0.2},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.3}], ids=str)
def test_filters_leave_exactly_these(options, seed):
    """At a high temperature every token that is left comes up in a few thousand draws."""
    logits = some_logits(seed, 15)
    options = {"temperature": 3.0, **options}
    assert set(np.flatnonzero(counts(logits, 3000, **options))) == set(np.flatnonzero(warped(logits, **options)))


def test_the_order_of_the_filters_shows():
    """top-p 0.82 of all keeps three, and min-p all of those; min-p first would leave two of 0.82 to top-p."""
    logits = np.log(np.float32([0.5, 0.3, 0.15, 0.05]))
    found = counts(logits, 2000, temperature=1.0, top_p=0.82, min_p=0.2)
    assert set(np.flatnonzero(found)) == {0, 1, 2}
    found = counts(logits, 2000, temperature=1.0, top_k=3, top_p=0.82)
    assert set(np.flatnonzero(found)) == {0, 1}


def test_ties_go_to_the_lower_number():
    logits = np.float32([1, 3, 3, 0, 3])
    assert sampler().sample(logits).token == 1
    assert set(np.flatnonzero(counts(logits, 500, temperature=1.0, top_k=2))) == {1, 2}
    assert set(np.flatnonzero(counts(logits, 500, temperature=1.0, top_p=0.5))) == {1, 2}


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-38, 1e-6])
def test_low_temperatures_are_greedy(temperature):
    logits = some_logits(3)
    made = sampler(temperature=temperature, seed=5)
    assert {made.sample(logits).token for _ in range(50)} == {int(logits.argmax())}


def test_a_seed_fixes_the_draws():
    logits = some_logits()

    def draws(seed):
        made = sampler(temperature=1.0, seed=seed)
        return [made.sample(logits).token for _ in range(30)]

    assert draws(1) == draws(1)
    assert len({tuple(draws(seed)) for seed in (0, 1, 2, 2**63, 2**64 - 1)}) == 5


def test_masked_tokens_are_never_drawn():
    logits = some_logits()
    logits[::2] = -np.inf
    assert not counts(logits, 3000, temperature=5.0)[::2].any()


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty(penalty):
    """arXiv:1909.05858, section 4.1, as everyone applies it: positive logits are divided, negative ones multiplied."""
    logits = np.float32([2.0, 1.9, -1.0, -1.1, 0.0])
    seen = np.int32([0, 2, 0, 4])
    expected = logits.copy()
    expected[[0, 2, 4]] = [2.0 / np.float32(penalty), -1.0 * np.float32(penalty), 0.0]
    greedy = sampler(repetition_penalty=penalty)
    greedy.observe(seen)
    assert greedy.sample(logits).token == int(expected.argmax())
    drawn = []
    for seed in range(3000):
        made = sampler(repetition_penalty=penalty, temperature=1.0, seed=seed)
        made.observe(seen)
        drawn.append(made.sample(logits).token)
    assert chi_square(np.bincount(drawn, minlength=5), warped(expected)) < 2.5


def test_the_penalty_sees_the_window_and_what_was_drawn():
    logits = np.float32([2.0, 1.9, 1.8])
    made = sampler(repetition_penalty=2.0, penalty_window=2)
    assert [made.sample(logits).token for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    made = sampler(repetition_penalty=2.0, penalty_window=0)
    assert [made.sample(logits).token for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_k": 3, "repetition_penalty": 1.5, "seed": 4}])
def test_log_probabilities_are_the_models_own(options):
    """Before any warping, so that they can be summed and compared."""
    logits = some_logits(8)
    wide = logits.astype(np.float64)
    own = wide - np.log(np.exp(wide).sum())
    made = sampler(logprobs=5, **options)
    made.observe(np.int32([1, 2, 3]))
    for _ in range(10):
        choice = made.sample(logits)
        assert choice.logprob == pytest.approx(own[choice.token], abs=1e-5)
        assert [token for token, _ in choice.alternatives] == np.argsort(-own, kind="stable")[:5].tolist()
        assert [p for _, p in choice.alternatives] == pytest.approx(np.sort(own)[::-1][:5], abs=1e-5)


def test_more_alternatives_than_tokens():
    assert len(sampler(logprobs=100).sample(some_logits()).alternatives) == VOCAB
    assert sampler().sample(some_logits()).alternatives == []


def test_a_large_vocabulary():
    logits = some_logits(1, 50_000)
    found = counts(logits, 300, temperature=1.0, top_k=50)
    assert set(np.flatnonzero(found)) <= set(np.argsort(-logits)[:50])
    with pytest.raises(ValueError, match="no logits"):
        sampler().sample(np.zeros(0, np.float32))
