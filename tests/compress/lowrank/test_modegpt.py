"""MoDeGPT on arrays: each module type beside its transcription, and what the paper proves of it."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from edgewise.compress.lowrank.modegpt import (
    Heads,
    ModeGpt,
    Sizes,
    feed_forward,
    influence_of,
    query_key,
    removed_shares,
    sizes_of,
    value_output,
    with_ones,
)
from edgewise.core.errors import InvalidValueError

RNG = np.random.default_rng(4)
HIDDEN, SIZE, HEADS = 24, 8, Heads(6, 2)
X = RNG.standard_normal((600, HIDDEN)) @ (RNG.standard_normal((HIDDEN, HIDDEN)) * np.exp(RNG.standard_normal(HIDDEN)))
GRAM = X.T @ X
VALUE = RNG.standard_normal((2 * SIZE, HIDDEN))
OUTPUT = RNG.standard_normal((HIDDEN, 6 * SIZE))
QUERY, KEY = RNG.standard_normal((6 * SIZE, HIDDEN)), RNG.standard_normal((2 * SIZE, HIDDEN))
H = np.abs(RNG.standard_normal((500, 20))) @ np.where(RNG.random((20, 20)) < 0.3, RNG.standard_normal((20, 20)), 0)
DOWN = RNG.standard_normal((HIDDEN, 20))


# ---- allocation -----------------------------------------------------------------------------------------------------

def test_shares_maximise_influence_kept_and_entropy():
    influence, config = RNG.random(7), ModeGpt(sparsity=0.25, smoothing=0.3, most=0.9)
    phi = removed_shares(influence, config)
    assert phi.mean() == pytest.approx(0.25)

    def objective(shares):
        return float((influence * (1 - shares)).sum() - 0.3 * (shares * np.log(shares)).sum())

    for _ in range(200):
        step = RNG.standard_normal(7) * 0.01
        moved = phi + step - step.mean()
        if (moved > 0).all():
            assert objective(moved) <= objective(phi) + 1e-12
    assert (np.argsort(phi) == np.argsort(-influence)).all()  # what turns the states least goes first


def test_no_layer_gives_more_than_the_most_and_the_rest_is_shared_in_proportion():
    influence = np.array([0.0, 0.5, 0.6, 0.7, 1.0])
    phi = removed_shares(influence, ModeGpt(sparsity=0.4, smoothing=0.15, most=0.7))
    assert phi.mean() == pytest.approx(0.4)
    assert phi[0] == 0.7
    free = phi[phi < 0.7]
    np.testing.assert_allclose(free / free[-1], np.exp(-(influence[-len(free):] - 1.0) / 0.15))
    assert (removed_shares(influence, ModeGpt(sparsity=0.4, allocation="uniform")) == 0.4).all()


def test_influence_is_nothing_where_a_layer_only_scales():
    states = RNG.standard_normal((50, 6))
    assert influence_of(states, 3 * states) == pytest.approx(0)
    assert influence_of(states, -states) == pytest.approx(2)


def test_sizes_are_multiples_and_add_up():
    phi = np.linspace(0.02, 0.55, 30)
    made = sizes_of(Sizes(1536, 64, 64), phi, ModeGpt())
    for full, name, multiple in ((1536, "width", 32), (64, "head_dim", 4), (64, "value_dim", 4)):
        sizes = np.array([getattr(each, name) for each in made])
        assert (sizes % multiple == 0).all()
        assert abs(sizes.sum() - full * (1 - phi).sum()) <= multiple / 2 + 1e-9
    only = sizes_of(Sizes(1536, 64, 64), phi, ModeGpt(parts="mlp"))
    assert {(each.head_dim, each.value_dim) for each in only} == {(64, 64)}
    assert sizes_of(Sizes(1536, 64, 64), np.zeros(3), ModeGpt(sparsity=0)) == [Sizes(1536, 64, 64)] * 3


# ---- I --------------------------------------------------------------------------------------------------------------

def slow_feed_forward(down, gram, keep, ridge):
    """Algorithm 1 as the card has it, with the inverse and a selection matrix."""
    width = len(gram)
    scores = np.diag(gram @ np.linalg.inv(gram + ridge * np.trace(gram) / width * np.eye(width)))
    kept = np.sort(np.argsort(-scores)[:keep])
    selection = np.eye(width)[:, kept]
    return kept, (np.linalg.pinv(selection.T @ gram @ selection) @ selection.T @ gram @ down.T).T


def test_the_feed_forward_is_its_transcription_and_its_error_is_that_on_the_inputs():
    gram = H.T @ H
    kept, down = slow_feed_forward(DOWN, gram, 9, 1e-2)
    made = feed_forward(DOWN, gram, 9)
    np.testing.assert_array_equal(made.neurons, kept)
    np.testing.assert_allclose(made.down, down, atol=1e-6)
    actual = np.linalg.norm(H @ DOWN.T - H[:, kept] @ made.down.T) / np.linalg.norm(H @ DOWN.T)
    assert made.error == pytest.approx(actual, rel=1e-6)


def test_a_copied_neuron_costs_nothing():
    plain = RNG.standard_normal((300, 20))
    copied = np.column_stack([plain, plain[:, 3]])
    down = RNG.standard_normal((HIDDEN, 21))
    made = feed_forward(down, copied.T @ copied, 20)
    assert {3, 20} - set(made.neurons)
    assert made.error < 1e-6
    np.testing.assert_allclose(copied[:, made.neurons] @ made.down.T, copied @ down.T, atol=1e-6)


def test_what_each_switch_of_the_feed_forward_costs():
    gram = H.T @ H

    def error(**switches):
        return feed_forward(DOWN, gram, 12, ModeGpt(**switches)).error

    assert error(reconstruct=False) > 1.3 * error()
    random = np.mean([feed_forward(DOWN, gram, 12, ModeGpt(neurons="random", seed=s)).error for s in range(20)])
    assert error() < random
    assert error(neurons="magnitude", reconstruct=False) > error()
    assert feed_forward(DOWN, gram, 20).error == 0.0


# ---- II -------------------------------------------------------------------------------------------------------------

def slow_query_key(keep):
    """Algorithm 2 with square roots of the correlations, pairs and groups by hand."""
    found = []
    for g in range(2):
        squares = np.zeros(SIZE // 2)
        key = KEY[g * SIZE:(g + 1) * SIZE]
        for h in range(3):
            query = QUERY[(3 * g + h) * SIZE:(3 * g + h + 1) * SIZE]
            roots = []
            for weight in (query, key):
                values, vectors = np.linalg.eigh(weight @ GRAM @ weight.T)
                roots.append(vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T)
            score = [np.linalg.norm(roots[0][:, i]) * np.linalg.norm(roots[1][:, i]) for i in range(SIZE)]
            squares += [score[i]**2 + score[i + SIZE // 2]**2 for i in range(SIZE // 2)]
        pairs = sorted(np.argsort(-squares)[:keep // 2])
        found.append([*pairs, *(i + SIZE // 2 for i in pairs)])
    return np.array(found)


@pytest.mark.parametrize("keep", [2, 4, 6, 8])
def test_query_and_key_are_their_transcription(keep):
    np.testing.assert_array_equal(query_key(QUERY, KEY, GRAM, HEADS, keep), slow_query_key(keep))


def test_without_rotation_single_dimensions_keep_the_smallest_bound():
    one = Heads(1, 1)
    query, key = QUERY[:SIZE], KEY[:SIZE]
    kept = query_key(query, key, GRAM, one, 3, rotary=False)[0]
    scores = np.sqrt(np.einsum("ij,jk,ik->i", query, GRAM, query) * np.einsum("ij,jk,ik->i", key, GRAM, key))
    bounds = {some: sum(scores[i] for i in range(SIZE) if i not in some) for some in combinations(range(SIZE), 3)}
    assert tuple(kept) == min(bounds, key=bounds.get)
    np.testing.assert_array_equal(query_key(query, key, GRAM, one, 4, ModeGpt(dimensions="first")), [[0, 1, 4, 5]])
    np.testing.assert_array_equal(query_key(query, key, GRAM, one, 3, ModeGpt(dimensions="first"), rotary=False),
                                  [[0, 1, 2]])


# ---- III ------------------------------------------------------------------------------------------------------------

def product_error(value, output, x=X, keep=SIZE):
    """Of what every head gives every token, all heads apart."""
    lost = whole = 0.0
    for h in range(6):
        g = h // 3
        before = x @ VALUE[g * SIZE:(g + 1) * SIZE].T @ OUTPUT[:, h * SIZE:(h + 1) * SIZE].T
        after = x @ value[g * keep:(g + 1) * keep].T @ output[:, h * keep:(h + 1) * keep].T
        lost, whole = lost + ((before - after)**2).sum(), whole + (before**2).sum()
    return float(np.sqrt(lost / whole))


@pytest.mark.parametrize("keep", [1, 3, 6])
def test_value_and_output_drop_the_singular_values_of_the_card(keep):
    """Algorithm 3 with the inverse root, of stacked outputs: the same product, and its error."""
    value, output, error = value_output(VALUE, OUTPUT, GRAM, HEADS, keep)
    assert (value.shape, output.shape) == ((2 * keep, HIDDEN), (HIDDEN, 6 * keep))
    assert error == pytest.approx(product_error(value, output, keep=keep), rel=1e-6)
    values, vectors = np.linalg.eigh(GRAM)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    dropped = 0.0
    for g in range(2):
        own = VALUE[g * SIZE:(g + 1) * SIZE]
        outs = np.concatenate([OUTPUT[:, h * SIZE:(h + 1) * SIZE] for h in range(3 * g, 3 * g + 3)]).T
        u, s, vt = np.linalg.svd(root @ own.T, full_matrices=False)
        u2, s2, vt2 = np.linalg.svd(np.diag(s) @ vt @ outs, full_matrices=False)
        slow = np.linalg.inv(root) @ u @ u2[:, :keep] @ np.diag(s2[:keep]) @ vt2[:keep]
        mine = value[g * keep:(g + 1) * keep].T @ np.concatenate(
            [output[:, h * keep:(h + 1) * keep] for h in range(3 * g, 3 * g + 3)]).T
        np.testing.assert_allclose(mine, slow, atol=1e-6 * np.abs(slow).max())
        dropped += float((s2[keep:]**2).sum())
    whole = sum(((X @ VALUE[h // 3 * SIZE:(h // 3 + 1) * SIZE].T @ OUTPUT[:, h * SIZE:(h + 1) * SIZE].T)**2).sum()
                for h in range(6))
    assert error == pytest.approx(np.sqrt(dropped / whole), rel=1e-6)


def test_stacked_beats_each_head_with_the_values_alone_and_weights_alone():
    _, _, error = value_output(VALUE, OUTPUT, GRAM, HEADS, 4)
    blind = value_output(VALUE, OUTPUT, GRAM, HEADS, 4, ModeGpt(whiten=False))[2]
    assert blind > 1.1 * error
    u = np.concatenate([np.linalg.svd(VALUE[g * SIZE:(g + 1) * SIZE] @ np.linalg.cholesky(GRAM))[0][:, :4].T
                        @ VALUE[g * SIZE:(g + 1) * SIZE] for g in range(2)])
    outs = [OUTPUT[:, h * SIZE:(h + 1) * SIZE] @ np.linalg.svd(
        VALUE[h // 3 * SIZE:(h // 3 + 1) * SIZE] @ np.linalg.cholesky(GRAM))[0][:, :4] for h in range(6)]
    assert product_error(u, np.concatenate(outs, axis=1), keep=4) >= error
    np.testing.assert_array_equal(value_output(VALUE, OUTPUT, GRAM, HEADS, SIZE)[0], VALUE)


def test_a_bias_is_an_input_that_is_always_one():
    bias = 3 * RNG.standard_normal(2 * SIZE)
    ones = np.column_stack([X, np.ones(len(X))])
    gram = with_ones(GRAM, X.sum(axis=0), len(X))
    np.testing.assert_allclose(gram, ones.T @ ones)
    with_bias = value_output(np.column_stack([VALUE, bias]), OUTPUT, gram, HEADS, 6)
    assert with_bias[0].shape == (12, HIDDEN + 1)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: ModeGpt(sparsity=1.0), "sparsity and most"), (lambda: ModeGpt(head_multiple=3), "even"),
    (lambda: ModeGpt(parts="mlp,xy"), "some of"), (lambda: removed_shares([], ModeGpt()), "one finite influence"),
    (lambda: feed_forward(DOWN, H.T @ H, 0), "of 20 neurons"), (lambda: query_key(QUERY, KEY, GRAM, HEADS, 3), "pairs"),
    (lambda: value_output(VALUE, OUTPUT, GRAM, HEADS, 9), "of 8 dimensions"),
])
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(InvalidValueError, match=words):
        call()
