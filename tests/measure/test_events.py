"""The event log: one clock, rows that survive a file, failures on record."""

from __future__ import annotations

import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.measure.events import Event, EventLog


def ticking(*times):
    return iter(times).__next__


def test_a_block_is_logged_with_its_tokens():
    log = EventLog(clock=ticking(10.0, 12.5))
    with log.record("decode", turn=3) as tokens:
        tokens.append(4)
        tokens.append(5)
    assert log.events == [Event("decode", 10.0, 2.5, 9, 3)]
    assert log.events[0].end_s == 12.5


def test_a_block_that_fails_is_logged_as_such():
    log = EventLog(clock=ticking(1.0, 2.0))
    with pytest.raises(RuntimeError), log.record("load"):
        raise RuntimeError
    assert log.events == [Event("load failed", 1.0, 1.0)]
    assert log.of("load") == ()


def test_csv_and_back_is_exact():
    log = EventLog((Event("load", 0.1, 0.2), Event("What is, or was, a \"leaf\"?", 1 / 3, 1e-9, 7, 2)))
    assert EventLog.from_csv(log.to_csv()).events == log.events


def test_shifted_onto_another_clock():
    log = EventLog((Event("load", 5.0, 1.0),))
    assert log.shifted(-2.0).events == [Event("load", 3.0, 1.0)]
    assert log.events[0].start_s == 5.0


def test_refusals():
    with pytest.raises(InvalidValueError, match="not negative"):
        EventLog().add("load", 0.0, -1.0)
    with pytest.raises(InvalidValueError, match="line 2"):
        EventLog.from_csv("start_s,duration_s,state,tokens,turn\n1.0,x,load,0,0\n")
