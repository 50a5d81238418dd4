"""The envelope and its proximal operator are exact, and cost what they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.compress.prune import wgsef
from edgewise.core.errors import InvalidValueError


def slow_shares(z, k, strength, d):
    """The root by 200 bisections, not by bends."""
    low, high = 0.0, 1.0
    grow = lambda eta: np.clip(eta * np.sqrt(d) * z - strength * d, 0, 1)  # noqa: E731
    if (z > 0).sum() <= k:
        return (z > 0).astype(float)
    while grow(high).sum() < k:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if grow(middle).sum() < k else (low, middle)
    return grow(high)


cases = st.integers(1, 12).flatmap(lambda m: st.tuples(
    st.lists(st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-3, 1e3)), min_size=m, max_size=m), st.integers(1, m),
    st.floats(1e-4, 1e3), st.lists(st.floats(0.1, 10), min_size=m, max_size=m)))


@given(cases)
@settings(max_examples=300, deadline=None)
def test_the_proximal_operator_satisfies_fenchels_equality(case):
    """x minimises t GS(x) + |x - y|^2 / 2 if and only if GS(x) + GS*((y - x)/t) = <x, (y - x)/t>.

    GS* is a sum of the k largest, by sorting: nothing of the code under test is in it.
    """
    z, k, strength, d = np.array(case[0]), case[1], case[2], np.array(case[3])
    x = z * wgsef.prox_factors(z, k, strength, d)
    slope = (z - x) / strength
    largest = 0.5 * np.sort(slope**2 / d)[::-1][:k].sum()
    inner = float(x @ slope)
    assert wgsef.value(x, k, d) + largest == pytest.approx(inner, rel=1e-8, abs=1e-12)
    assert wgsef.conjugate(slope, k, d) == pytest.approx(largest, rel=1e-12)
    np.testing.assert_allclose(wgsef.shares(z, k, strength, d), slow_shares(z, k, strength, d), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_the_value_is_that_of_a_slow_convex_solution(seed):
    """1/2 min_u sum d z^2 / u by SLSQP, and the prox by minimising its objective over x and u together."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(seed)
    m = int(rng.integers(3, 8))
    k, z, d, t = int(rng.integers(1, m)), rng.uniform(0.1, 2, m), rng.uniform(0.3, 3, m), float(rng.uniform(0.05, 3))
    bound = {"type": "ineq", "fun": lambda p: k - p[:m].sum(),
             "jac": lambda p: np.r_[-np.ones(m), np.zeros(len(p) - m)]}
    inside = [(1e-9, 1)] * m
    u = minimize(lambda p: 0.5 * (d * z**2 / p).sum(), np.full(m, k / m), jac=lambda p: -0.5 * d * z**2 / p**2,
                 bounds=inside, constraints=[bound], options={"maxiter": 2000, "ftol": 1e-15}, method="SLSQP")
    assert wgsef.value(z, k, d) == pytest.approx(u.fun, rel=1e-6)

    def cost(p):
        u, x = p[:m], p[m:]
        return t * 0.5 * (d * x**2 / u).sum() + 0.5 * ((x - z) ** 2).sum()

    def slope(p):
        u, x = p[:m], p[m:]
        return np.r_[-t * 0.5 * d * x**2 / u**2, t * d * x / u + x - z]

    ours = z * wgsef.prox_factors(z, k, t, d)
    best = t * wgsef.value(ours, k, d) + 0.5 * ((ours - z) ** 2).sum()
    found = minimize(cost, np.r_[np.full(m, k / m), z / 2], jac=slope, bounds=[*inside, *[(0, None)] * m],
                     constraints=[bound], options={"maxiter": 2000, "ftol": 1e-15}, method="SLSQP")
    assert best <= found.fun + 1e-9
    assert best == pytest.approx(found.fun, rel=1e-4)


def test_its_ends_are_known():
    rng = np.random.default_rng(0)
    z, d = rng.uniform(0, 2, 9), rng.uniform(0.5, 2, 9)
    assert wgsef.value(z, 9, d) == pytest.approx(0.5 * (d * z**2).sum(), rel=1e-12)  # weight decay
    np.testing.assert_allclose(wgsef.prox_factors(z, 9, 0.7, d), 1 / (1 + 0.7 * d), rtol=1e-12)
    assert wgsef.value(z, 1) == pytest.approx(0.5 * z.sum() ** 2, rel=1e-12)  # the squared group lasso
    sparse = np.where(np.arange(9) < 3, z, 0)
    assert wgsef.value(sparse, 3, d) == pytest.approx(0.5 * (d * sparse**2).sum(), rel=1e-12)  # tight where it matters
    values = [wgsef.value(z, k, d) for k in range(1, 10)]
    assert np.diff(values).max() <= 1e-12  # a larger level costs no more
    u = wgsef.shares(z, 4, 0.0)
    z2 = np.sort(z)[::-1]  # the closed form of unit weights
    r = next(r for r in range(4) if (np.inf if r == 3 else z2[2 - r]) > z2[3 - r:].sum() / (r + 1) >= z2[3 - r])
    assert wgsef.value(z, 4) == pytest.approx(
        0.5 * ((z2[:3 - r] ** 2).sum() + z2[3 - r:].sum() ** 2 / (r + 1)), rel=1e-12)
    assert u.sum() == pytest.approx(4)


def test_the_cards_example():
    y = np.array([1, 0.9, 0.8, 0.5, 0.3, 0.1])
    for strength, expected in ((0.01, (0.983, 0.883, 0.783, 0.483, 0.283, 0.083)),
                               (0.1, (0.86, 0.76, 0.66, 0.36, 0.16, 0)), (1, (0.46, 0.36, 0.26, 0, 0, 0)),
                               (10, (0.091, 0.082, 0, 0, 0, 0))):
        np.testing.assert_allclose(y * wgsef.prox_factors(y, 2, strength), expected, rtol=0, atol=6e-4)


def test_convex_along_every_line():
    rng = np.random.default_rng(1)
    for _ in range(50):
        a, b, d = rng.normal(size=6), rng.normal(size=6), rng.uniform(0.5, 2, 6)
        ends = wgsef.value(abs(a), 2, d) + wgsef.value(abs(b), 2, d)
        assert wgsef.value(abs(a + b) / 2, 2, d) <= ends / 2 + 1e-12


@pytest.mark.parametrize("norms", [np.ones(1000), np.r_[np.ones(500), np.zeros(500)], np.full(1000, 1e-200),
                                   np.geomspace(1e-300, 1, 1000)])
def test_ties_zeros_and_wide_ranges(norms):
    for strength in (1e-6, 1.0, 1e6):
        u = wgsef.shares(norms, 100, strength)
        assert u.sum() == pytest.approx(100, rel=1e-6)
        assert (u >= 0).all()
        assert (u <= 1).all()


def test_it_looks_at_each_bend_a_fixed_number_of_times(monkeypatch):
    """Linear: the elements that np.partition is given, per group, do not grow with the number of groups."""
    seen = []
    plain = np.partition
    monkeypatch.setattr(np, "partition", lambda values, place: seen.append(len(values)) or plain(values, place))
    work = []
    for m in (1_000, 10_000, 100_000, 1_000_000):
        seen.clear()
        rng = np.random.default_rng(m)
        wgsef.shares(rng.exponential(size=m), m // 10, 0.1, rng.uniform(0.5, 2, m))
        work.append(sum(seen) / m)
    assert max(work) < 5
    assert work[-1] < 1.5 * work[0]


def test_group_lasso_is_its_own_minimiser():
    rng = np.random.default_rng(2)
    z, d = rng.uniform(0, 2, 20), rng.uniform(0.5, 2, 20)
    ours = z * wgsef.group_lasso_factors(z, 0.6, d)
    grid = np.linspace(0, 2, 20001)
    for norm, weight, x in zip(z, d, ours, strict=True):
        costs = 0.6 * np.sqrt(weight) * grid + 0.5 * (grid - norm) ** 2
        assert x == pytest.approx(grid[costs.argmin()], abs=1e-4)


@pytest.mark.parametrize(("kind", "count", "shape"), [
    ("filter", 4, (4, 1, 1, 1)), ("channel", 3, (1, 3, 1, 1)), ("shape", 12, (1, 3, 2, 2)), ("layer", 1, (1, 1, 1, 1)),
    ("weight", 48, (4, 3, 2, 2))])
def test_groups_of_a_convolution(kind, count, shape):
    labels = wgsef.labels_of((4, 3, 2, 2), kind)
    assert labels.shape == shape
    assert sorted(labels.ravel()) == list(range(count))


def test_what_is_no_group_is_refused():
    with pytest.raises(InvalidValueError, match="level from 1"):
        wgsef.value(np.ones(3), 4)
    with pytest.raises(InvalidValueError, match="finite"):
        wgsef.value(np.array([1, np.nan]), 1)
    with pytest.raises(InvalidValueError, match="positive"):
        wgsef.prox_factors(np.ones(2), 1, 0.0)
    with pytest.raises(InvalidValueError, match="groups of a weight"):
        wgsef.labels_of((4,), "filter")
    assert wgsef.largest(np.array([1, 2, 2, 0]), 2).tolist() == [False, True, True, False]
