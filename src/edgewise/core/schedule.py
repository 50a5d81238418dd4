"""Tasks over resources, and what became of them. `cost` simulates a Schedule, `stream` executes the same one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from edgewise.core.errors import InvalidValueError
from edgewise.core.plain import Plain

__all__ = ["Buffer", "Event", "Schedule", "Task", "Timeline"]


@dataclass(frozen=True)
class Task(Plain):
    """amount: bytes, operations or seconds, in the unit that the resource's rate divides. action: what executes it."""

    name: str
    resource: str
    amount: float = 0.0
    after: tuple[str, ...] = ()
    action: Callable[[], Any] | None = field(default=None, metadata={"plain": False}, compare=False)

    def __post_init__(self) -> None:
        if not self.amount >= 0:
            raise InvalidValueError(f"task {self.name!r}: amount is not negative; given {self.amount}")


@dataclass(frozen=True)
class Buffer(Plain):
    """Bytes that live from the start of the task `first` to the end of the task `last`."""

    name: str
    nbytes: int
    first: str
    last: str


@dataclass(frozen=True, repr=False)
class Schedule(Plain):
    """Tasks of one resource run one at a time; a task starts when those in `after` have ended."""

    tasks: tuple[Task, ...]
    buffers: tuple[Buffer, ...] = ()

    def __post_init__(self) -> None:
        names = {task.name for task in self.tasks}
        if len(names) != len(self.tasks):
            raise InvalidValueError("schedule has two tasks of one name")
        for task in self.tasks:
            for name in task.after:
                if name not in names:
                    raise InvalidValueError(f"task {task.name!r} waits for {name!r}, which is not in the schedule")
        for buffer in self.buffers:
            for name in (buffer.first, buffer.last):
                if name not in names:
                    raise InvalidValueError(f"buffer {buffer.name!r} names task {name!r}, which is not in the schedule")
        self.order()

    def order(self) -> tuple[Task, ...]:
        """Tasks so that each stands behind those it waits for. Raises InvalidValueError for a circle."""
        by_name = {task.name: task for task in self.tasks}
        sorter = TopologicalSorter({task.name: task.after for task in self.tasks})
        try:
            return tuple(by_name[name] for name in sorter.static_order())
        except CycleError as error:
            raise InvalidValueError(f"tasks wait for each other: {' -> '.join(error.args[1])}") from None

    def __repr__(self) -> str:
        resources = sorted({task.resource for task in self.tasks})
        return f"Schedule({len(self.tasks)} tasks on {', '.join(resources)})"


@dataclass(frozen=True)
class Event(Plain):
    """A task that ran, on the clock of its timeline."""

    task: str
    resource: str
    start_s: float
    end_s: float

    def __post_init__(self) -> None:
        if not self.end_s >= self.start_s:
            raise InvalidValueError(f"event {self.task!r} ends at {self.end_s} before it starts at {self.start_s}")


@dataclass(frozen=True, repr=False)
class Timeline(Plain):
    """When every task ran, and the most bytes that its buffers held at once."""

    events: tuple[Event, ...]
    peak_bytes: int = 0

    @classmethod
    def of(cls, events: tuple[Event, ...], buffers: tuple[Buffer, ...] = ()) -> Timeline:
        """peak_bytes from the buffers' lives; a buffer that ends when another starts has gone by then."""
        start = {event.task: event.start_s for event in events}
        end = {event.task: event.end_s for event in events}
        changes = [(start[b.first], b.nbytes) for b in buffers] + [(end[b.last], -b.nbytes) for b in buffers]
        held = peak = 0
        for _, change in sorted(changes):
            held += change
            peak = max(peak, held)
        return cls(events, peak)

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        return max(e.end_s for e in self.events) - min(e.start_s for e in self.events) if self.events else 0.0

    @property
    def busy(self) -> dict[str, float]:
        """Share of `seconds` in which each resource worked."""
        totals: dict[str, float] = {}
        for event in self.events:
            totals[event.resource] = totals.get(event.resource, 0.0) + event.end_s - event.start_s
        return {name: total / self.seconds if self.seconds else 0.0 for name, total in totals.items()}

    def __repr__(self) -> str:
        return f"Timeline({len(self.events)} events, {self.seconds:.3g} s, peak {self.peak_bytes:.3g} B)"
