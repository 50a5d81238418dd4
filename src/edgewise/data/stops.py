"""Stop strings in text that arrives in pieces.

    matcher = StopMatcher(["\\nUser:"])
    for piece in stream:
        text, stopped = matcher.push(piece)
        ...
    text = matcher.finish()
"""

from __future__ import annotations

from collections.abc import Iterable

from edgewise.core.errors import InvalidValueError

__all__ = ["StopMatcher"]


class StopMatcher:
    """Passes text on until the first stop string, which itself is not passed on.

    Text that may be the beginning of a stop string is held back until that is decided. The first stop string is the
    one that begins first; of several that begin at the same place, the shortest.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        if isinstance(stops, str):
            raise InvalidValueError(f"stops are a list of strings; given the string {stops!r}; write [{stops!r}]")
        self.stops = tuple(dict.fromkeys(stops))
        for stop in self.stops:
            if not isinstance(stop, str) or not stop:
                raise InvalidValueError(f"a stop is a string with at least one character; given {stop!r}")
        self.stopped: str | None = None
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Adds a piece. Returns the text that is certain now, and whether a stop string was found.

        Nothing is passed on after a stop string.
        """
        if self.stopped is not None:
            return "", True
        self._held += text
        open_at = self._open_at()
        # An unfinished stop string that began earlier than a complete one comes first, should it become complete.
        if (certain := self._until_stop(open_at)) is not None:
            return certain, True
        certain, self._held = self._held[:open_at], self._held[open_at:]
        return certain, False

    def finish(self) -> str:
        """What is still held back when the text is over. `stopped` may name a stop string afterwards."""
        if (certain := self._until_stop(len(self._held))) is not None:
            return certain
        rest, self._held = self._held, ""
        return rest

    def _until_stop(self, limit: int) -> str | None:
        """The held text before the first stop string, if one begins at `limit` or before; it ends the matching."""
        found = min(((place, len(stop), stop) for stop in self.stops if (place := self._held.find(stop)) >= 0),
                    default=None)
        if found is None or found[0] > limit:
            return None
        self.stopped = found[2]
        certain, self._held = self._held[:found[0]], ""
        return certain

    def _open_at(self) -> int:
        """Where the earliest unfinished stop string at the end of the held text begins; its length if there is none."""
        longest = max(map(len, self.stops), default=0)
        for place in range(max(0, len(self._held) - longest + 1), len(self._held)):
            tail = self._held[place:]
            if any(len(tail) < len(stop) and stop.startswith(tail) for stop in self.stops):
                return place
        return len(self._held)
