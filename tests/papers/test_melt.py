"""The synthetic trace and the smoke scale of the recipe."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.measure.events import Event, EventLog
from edgewise.papers import reproduce
from edgewise.papers.melt import IDLE_W, WATTS, synthetic_trace


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_synthetic_trace_has_the_watts_it_says():
    log = EventLog((Event("load", 0.0, 1.0), Event("decode", 2.0, 3.0, 9, 0)))
    trace = synthetic_trace(log, 0)
    inside = (trace.times_s > 2.0) & (trace.times_s < 5.0)
    assert set(trace.power_w[inside]) == {WATTS["decode"]}
    assert set(trace.power_w[(trace.times_s > 1.0) & (trace.times_s < 2.0)]) == {IDLE_W}
    assert len(np.unique(np.diff(trace.times_s))) > 100  # irregular


@pytest.mark.slow
def test_the_smoke_scale_shows_that_the_mechanism_acts(tmp_path):
    report = reproduce("melt", ablate=True, out=tmp_path)
    outcomes = {verdict.claim: verdict.outcome for verdict in report.verdicts}
    for claim in ("Every step down the ladder costs accuracy", "The integrator is within 1 % at a kilohertz",
                  "A turn's energy is within 1 % of the watts that made it", "Sustained use slows the device down",
                  "Turns add up to the run less load and pauses", "With infinite heat capacity nothing slows down",
                  "Without aligned clocks a turn's energy is wrong by more than 10 %",
                  "Without separating the load, a short answer looks costly"):
        assert outcomes[claim] == "reproduced", claim
    assert outcomes["4 bits decode at least twice as fast as float32"] == "not-checkable"
    origins = {q.name: q.origin for q in report.quantities}
    assert origins["drop of speed under sustained use"] == "simulated"
    assert origins["decode token/s at 4 bits"] == "measured"
    ladder = report.tables[1]
    assert [row[0] for row in ladder.rows] == ["float32", "8 bits", "4 bits", "3 bits"]
    sizes = [row[1] for row in ladder.rows]
    assert sizes == sorted(sizes, reverse=True)
    assert {table.title for table in report.tables} >= {"A talk at 4 bits", "Energy of the talk, watts assumed"}
