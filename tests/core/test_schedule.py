"""Schedules have no circles; timelines add up."""

from __future__ import annotations

import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.core.schedule import Buffer, Event, Schedule, Task, Timeline

READ, COMPUTE = Task("read", "disk", 100), Task("compute", "cpu", 5, ("read",), action=print)
BUFFERS = (Buffer("weights", 100, "read", "compute"), Buffer("scratch", 10, "compute", "compute"))
EVENTS = (Event("read", "disk", 1.0, 3.0), Event("compute", "cpu", 3.0, 5.0))


def test_order_respects_after():
    assert [t.name for t in Schedule((COMPUTE, READ)).order()] == ["read", "compute"]


def test_json_leaves_actions_out():
    schedule = Schedule((READ, COMPUTE), BUFFERS)
    assert "action" not in schedule.to_json()["tasks"][1]
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert repr(schedule) == "Schedule(2 tasks on cpu, disk)"


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Schedule((READ, READ)), "one name"),
    (lambda: Schedule((COMPUTE,)), "waits for 'read'"),
    (lambda: Schedule((Task("a", "r", after=("b",)), Task("b", "r", after=("a",)))), "wait for each other"),
    (lambda: Schedule((READ,), BUFFERS[:1]), "buffer 'weights' names task 'compute'"),
    (lambda: Task("a", "r", -1), "not negative"),
    (lambda: Event("a", "r", 2, 1), "before it starts"),
])
def test_refusals(make, message):
    with pytest.raises(InvalidValueError, match=message):
        make()


def test_timeline_adds_up():
    timeline = Timeline.of(EVENTS, BUFFERS)
    assert timeline.seconds == 4.0
    assert timeline.busy == {"disk": 0.5, "cpu": 0.5}
    assert timeline.peak_bytes == 110
    assert Timeline.from_json(timeline.to_json()) == timeline


def test_a_buffer_that_ends_makes_room_for_the_next():
    events = (Event("a", "r", 0, 1), Event("b", "r", 1, 2))
    assert Timeline.of(events, (Buffer("x", 5, "a", "a"), Buffer("y", 7, "b", "b"))).peak_bytes == 7


def test_nothing_ran():
    assert (Timeline(()).seconds, Timeline(()).busy) == (0.0, {})
