"""What a program did and when: rows of start, duration and state, on one clock.

A power meter has a clock of its own; `EventLog.shifted` moves the rows onto it. Times are seconds throughout: meters
that count in milliseconds or nanoseconds are converted where they are read, once.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from edgewise.core.errors import InvalidValueError

__all__ = ["Event", "EventLog"]


@dataclass(frozen=True)
class Event:
    """state: what went on, such as "load", "prefill", "decode". tokens: made or read meanwhile; turn: of a talk."""

    state: str
    start_s: float
    duration_s: float
    tokens: int = 0
    turn: int = -1

    @property
    def end_s(self) -> float:
        return self.start_s + self.duration_s


class EventLog:
    """Events in the order they ended."""

    def __init__(self, events: tuple[Event, ...] = (), *, clock: Callable[[], float] = time.time) -> None:
        self.events = list(events)
        self._clock = clock

    @contextmanager
    def record(self, state: str, *, turn: int = -1) -> Iterator[list[int]]:
        """Log the block. It may append numbers of tokens to what it is given. A block that fails is logged as such."""
        tokens: list[int] = []
        start = self._clock()
        try:
            yield tokens
        except BaseException:
            self.events.append(Event(f"{state} failed", start, self._clock() - start, sum(tokens), turn))
            raise
        self.events.append(Event(state, start, self._clock() - start, sum(tokens), turn))

    def add(self, state: str, start_s: float, duration_s: float, *, tokens: int = 0, turn: int = -1) -> None:
        """An event that was timed elsewhere."""
        if duration_s < 0:
            raise InvalidValueError(f"event {state!r} lasts {duration_s} s; a duration is not negative")
        self.events.append(Event(state, start_s, duration_s, tokens, turn))

    def of(self, *states: str) -> tuple[Event, ...]:
        """The events of these states."""
        return tuple(event for event in self.events if event.state in states)

    def shifted(self, seconds: float) -> EventLog:
        """The same events on a clock that is ahead by so much."""
        return EventLog(tuple(replace(event, start_s=event.start_s + seconds) for event in self.events))

    def to_csv(self) -> str:
        """Header and one row per event; `from_csv` is its inverse."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("start_s", "duration_s", "state", "tokens", "turn"))
        writer.writerows((repr(e.start_s), repr(e.duration_s), e.state, e.tokens, e.turn) for e in self.events)
        return out.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> EventLog:
        """Raises InvalidValueError with the line that is not an event."""
        events = []
        for number, row in enumerate(csv.reader(io.StringIO(text)), 1):
            if number == 1 and row[:1] == ["start_s"]:
                continue
            try:
                start, duration, state, tokens, turn = row
                events.append(Event(state, float(start), float(duration), int(tokens), int(turn)))
            except ValueError as error:
                raise InvalidValueError(f"line {number} of the event log is not start, duration, state, tokens, turn: "
                                        f"{','.join(row)[:80]!r}") from error
        return cls(tuple(events))
