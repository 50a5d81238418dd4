"""The integrator of a power trace against integrals that are known."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.measure.events import Event, EventLog
from edgewise.measure.power import PowerTrace, energy_of_turns


def trace(power, end_s=10.0, rate_hz=1000, seed=None, volts=4.0):
    """Samples of a power function of time; seed: irregular times."""
    count = int(end_s * rate_hz)
    times = np.linspace(0, end_s, count + 1) if seed is None else np.sort(
        np.random.default_rng(seed).uniform(0, end_s, count))
    return PowerTrace(times, power(times) / volts, np.full(len(times), volts))


def slow_sum(samples, start, end):
    """The report script's loop."""
    total, before = 0.0, None
    for t, i, v in zip(samples.times_s, samples.current_a, samples.voltage_v, strict=True):
        if start < t < end:
            total += i * v * (0.0 if before is None else t - before)
            before = t
    return total


SHAPES = {
    "constant": (lambda t: np.full_like(t, 3.0), 30.0),
    "ramp": (lambda t: 2 * t, 100.0),
    "square": (lambda t: np.where(np.floor(t) % 2 == 0, 6.0, 1.0), 35.0),
}


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("name", SHAPES)
def test_within_a_per_cent_at_a_kilohertz(name, seed):
    power, expected = SHAPES[name]
    assert trace(power, seed=seed).energy_j() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("window", [(0.0, 10.0), (2.5, 7.3), (-1.0, 0.5), (4.0, 4.0), (20.0, 30.0)])
def test_the_sum_is_the_scripts_loop(window):
    samples = trace(SHAPES["square"][0], rate_hz=50, seed=3)
    assert samples.energy_j(*window) == pytest.approx(slow_sum(samples, *window), abs=1e-12)


def test_the_window_excludes_its_ends():
    samples = PowerTrace(np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0, 1.0]), np.ones(4))
    assert samples.energy_j(0.0, 3.0) == 1.0  # samples 1 and 2; the first of them has no step
    assert samples.energy_j(-0.5, 3.5) == 3.0


def test_charge_is_energy_without_the_voltage():
    samples = trace(lambda t: np.full_like(t, 4.0), volts=4.0)
    assert samples.charge_c() == pytest.approx(10.0)


def turns():
    log = EventLog((Event("load", 0.0, 2.0), Event("prefill", 2.0, 1.0, 40, 0), Event("decode", 3.0, 2.0, 10, 0),
                    Event("prefill", 6.0, 1.0, 20, 1), Event("decode", 7.0, 3.0, 30, 1)))
    return trace(lambda t: np.where(t < 2, 8.0, np.where(t < 3, 6.0, 4.0))), log


def test_turns_add_up_to_the_run_less_load_and_gaps():
    samples, log = turns()
    found = energy_of_turns(samples, log)
    assert [turn.tokens for turn in found] == [10, 30]
    assert found[0].joules == pytest.approx(6.0 + 8.0, rel=0.01)
    assert found[0].joules_per_token == pytest.approx(1.4, rel=0.01)
    assert found[0].split_j == (pytest.approx(6 / 40, rel=0.01), pytest.approx(8 / 10, rel=0.01))
    gaps = samples.energy_j(0, 2) + samples.energy_j(5, 6)
    assert sum(turn.joules for turn in found) == pytest.approx(samples.energy_j() - gaps, rel=0.01)


def test_load_counts_where_it_is_asked_for():
    samples, log = turns()
    apart, together = energy_of_turns(samples, log), energy_of_turns(samples, log, also=("load",))
    assert together[0].joules - apart[0].joules == pytest.approx(16.0, rel=0.01)
    assert together[1].joules == apart[1].joules


def test_a_clock_that_is_off_shows():
    samples, log = turns()
    right, wrong = energy_of_turns(samples, log)[0], energy_of_turns(samples, log.shifted(-2.0))[0]
    assert abs(wrong.joules / right.joules - 1) > 0.1


@pytest.mark.parametrize(("arrays", "message"), [
    (([0.0, 1.0], [1.0], [1.0, 1.0]), "one length"), (([1.0, 0.0], [1.0, 1.0], [1.0, 1.0]), "ascend"),
    (([0.0, 1.0], [1.0, np.nan], [1.0, 1.0]), "finite"),
])
def test_refusals(arrays, message):
    with pytest.raises(InvalidValueError, match=message):
        PowerTrace(*map(np.asarray, arrays))
