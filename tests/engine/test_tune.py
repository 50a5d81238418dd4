"""Tuning: what is kept and what is not, under a clock and runs of our own; and the whole of it on a small model."""

from __future__ import annotations

import random

import pytest

from edgewise.core.errors import InvalidValueError, collect_notices
from edgewise.engine.tune import Candidate, candidates, search, synthetic_plan, tune
from edgewise.engine.tuning import Tuning, stored_tuning

SMALL = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "width": 96, "vocab": 96, "context": 600}


class Machine:
    """Runs that take the time we say, on a clock that nothing else moves."""

    def __init__(self, speed, noise=0.0, seed=0):
        self.now, self.runs, self.starts = 100.0, 0, []
        self._speed, self._noise, self._random = speed, noise, random.Random(seed)

    def clock(self):
        return self.now

    def measure(self, tuning, work):
        self.starts.append(self.now)
        seconds = 0.1 / self._speed(tuning, work) * (1 + self._noise * self._random.uniform(-1, 1))
        self.now += seconds
        return seconds

    def search(self, tries, budget_s=1000.0):
        return search(self.measure, tries, budget_s=budget_s, clock=self.clock)


FAST = Candidate("ahead_nbytes", 1, ("decode",))
PLAIN = Candidate("runs_per_thread", 4, ("prefill",))


def test_a_gain_is_kept_and_no_gain_is_not():
    found = Machine(lambda t, w: 1.2 if t.ahead_nbytes == 1 and w == "decode" else 1.0).search([PLAIN, FAST])
    assert found.tuning == Tuning(ahead_nbytes=1)
    assert [trial.outcome for trial in found.trials] == ["no gain", "kept"]
    assert found.trials[1].gains[0].ratio == pytest.approx(1.2)
    assert found.gains["decode"].ratio == pytest.approx(1.2)
    assert found.gains["prefill"].ratio == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_gain(seed):
    machine = Machine(lambda t, w: 1.0, noise=0.3, seed=seed)
    assert machine.search(candidates(4)).tuning == Tuning()


@pytest.mark.parametrize("seed", range(5))
def test_a_gain_well_above_the_noise_is_found(seed):
    machine = Machine(lambda t, w: 1.3 if t.ahead_nbytes == 1 and w == "decode" else 1.0, noise=0.1, seed=seed)
    assert machine.search([FAST]).tuning == Tuning(ahead_nbytes=1)


def test_a_gain_within_the_margin_is_not_worth_a_setting():
    assert Machine(lambda t, w: 1.005 if t.ahead_nbytes else 1.0).search([FAST]).tuning == Tuning()


def test_a_gain_of_one_kind_that_costs_the_other_is_not_kept():
    both = Candidate("threads", 1, ("decode", "prefill"))
    machine = Machine(lambda t, w: {None: 1.0, 1: 1.5 if w == "decode" else 0.7}[t.threads])
    assert machine.search([both]).tuning == Tuning()


def test_a_loss_elsewhere_shows_in_the_end():
    """Something about decode alone that makes prefill slower: the comparison with the defaults looks at both."""
    machine = Machine(lambda t, w: 1.0 if t.ahead_nbytes is None else 1.5 if w == "decode" else 0.8)
    found = machine.search([FAST])
    assert found.trials[0].outcome == "kept"
    assert found.tuning == Tuning()
    assert found.gains["prefill"].ratio == pytest.approx(0.8)


def test_later_values_are_held_against_what_was_kept():
    speeds = {None: 1.0, 1: 1.1, 2: 1.3, 3: 1.2}
    machine = Machine(lambda t, w: speeds[t.ahead_nbytes] if w == "decode" else 1.0)
    found = machine.search([Candidate("ahead_nbytes", n, ("decode",)) for n in (1, 2, 3)])
    assert found.tuning == Tuning(ahead_nbytes=2)
    assert [(trial.before, trial.outcome) for trial in found.trials] == [(None, "kept"), (1, "kept"), (2, "no gain")]
    assert found.gains["decode"].ratio == pytest.approx(1.3)


@pytest.mark.parametrize("budget_s", [0.05, 0.3, 1.0, 5.0, 7.3, 20.0, 60.0])
@pytest.mark.parametrize("seed", range(3))
def test_no_run_begins_after_the_budget(budget_s, seed):
    """Runs that suddenly take ten times as long included."""
    moods = random.Random(seed)
    machine = Machine(lambda t, w: (1.5 if t.ahead_nbytes == 1 else 1.0) * (0.1 if moods.random() < 0.1 else 1.0))
    found = machine.search([FAST, *candidates(8)], budget_s)
    assert max(machine.starts) < 100.0 + budget_s
    assert len(found.trials) == 1 + len(candidates(8))
    if budget_s < 1:
        assert {trial.outcome for trial in found.trials} == {"no time left"}
        assert found.tuning == Tuning()


def test_every_candidate_is_a_setting_within_its_limits():
    for threads in (1, 2, 3, 64):
        tried = candidates(threads)
        assert len(set(tried)) == len(tried)
        for one in tried:
            assert Tuning(**{one.setting: one.value}).changed == {one.setting: one.value}
        assert {one.value for one in tried if one.setting == "threads"} <= set(range(1, threads))


class TestTheWhole:
    @pytest.fixture(autouse=True)
    def home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.delenv("EDGEWISE_TUNING")

    def test_it_reports_and_stores(self):
        told = []
        with collect_notices() as notices:
            report = tune(budget_s=0.4, plan=synthetic_plan(**SMALL), progress=lambda what, spent: told.append(what))
        assert told[0] == "a model of random weights"
        assert report.environment["settings"] == stored_tuning().changed
        assert report["changed settings"] == len(stored_tuning().changed)
        assert {item.kind for item in notices} <= {"info"}
        table = report.tables[0]
        assert {row[-1] for row in table.rows} <= {"kept", "no gain", "no time left"}
        assert {row[0] for row in table.rows} >= {"huge_pages", "batch", "runs_per_thread"}

    def test_it_stores_nothing_when_told_so(self, tmp_path):
        tune(budget_s=0.05, plan=synthetic_plan(**SMALL), store=False)
        assert not (tmp_path / "edgewise" / "tuning").exists()

    def test_it_needs_time(self):
        with pytest.raises(InvalidValueError, match="takes time"):
            tune(budget_s=0)
