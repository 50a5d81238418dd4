"""The loops behind `edgewise device` run on every tier; how fast is not asserted."""

from __future__ import annotations

import math

import pytest

from edgewise.native import probe


def test_tiers_go_up_to_the_best():
    assert probe.tiers()[0] == "reference"
    assert probe.tiers()[-1] == probe.best_tier()


def test_the_tier_in_use_can_be_chosen(monkeypatch):
    for tier in probe.tiers():
        monkeypatch.setenv("EDGEWISE_ISA", tier)
        assert probe.tier_in_use() == tier
    monkeypatch.setenv("EDGEWISE_ISA", "")
    assert probe.tier_in_use() == probe.best_tier()
    monkeypatch.setenv("EDGEWISE_ISA", "sse9")
    with pytest.raises(ValueError, match="expected reference, "):
        probe.tier_in_use()


@pytest.mark.parametrize("tier", probe.tiers())
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_loop_runs(tier, threads):
    rates = [*probe.read_rates(2**20, threads, repeats=3, tier=tier),
             probe.int8_rate(threads, 0.005, tier=tier), probe.fp32_rate(threads, 0.005, tier=tier)]
    assert len(rates) == 5
    assert all(rate > 0 and math.isfinite(rate) for rate in rates)


@pytest.mark.parametrize("call", [
    lambda: probe.read_rates(100, 1), lambda: probe.read_rates(2**20, 0), lambda: probe.read_rates(2**20, 1, repeats=0),
    lambda: probe.int8_rate(1, 0.0), lambda: probe.fp32_rate(-1, 0.1), lambda: probe.int8_rate(1, math.nan),
    lambda: probe.int8_rate(1, 0.1, tier="sse9"),
])
def test_refusals(call):
    with pytest.raises(ValueError):
        call()
