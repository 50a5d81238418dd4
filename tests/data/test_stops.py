"""Stop strings against a search through the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.core.errors import InvalidValueError
from edgewise.data.stops import StopMatcher


def whole(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that begins first, the shortest of several; slow."""
    for place in range(len(text)):
        here = [stop for stop in stops if text.startswith(stop, place)]
        if here:
            return text[:place], min(here, key=len)
    return text, None


def in_pieces(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown += text
        assert stopped == (matcher.stopped is not None)
    return shown + matcher.finish(), matcher.stopped


@given(st.lists(st.text("abc", max_size=4), max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@settings(max_examples=600, deadline=None)
def test_pieces_equal_the_whole(pieces, stops):
    assert in_pieces(pieces, stops) == whole("".join(pieces), stops)


def test_what_cannot_be_a_stop_any_more_is_shown_at_once():
    matcher = StopMatcher(["\nUser:"])
    assert matcher.push("Hello\n") == ("Hello", False)
    assert matcher.push("Us") == ("", False)
    assert matcher.push("ed cars") == ("\nUsed cars", False)
    assert matcher.push("\nUser: x") == ("", True)
    assert matcher.stopped == "\nUser:"
    assert matcher.push("more") == ("", True)
    assert matcher.finish() == ""


def test_a_complete_stop_waits_for_an_earlier_unfinished_one():
    assert in_pieces(["abc", "d"], ["abcd", "c"]) == ("", "abcd")
    assert in_pieces(["abc", "e"], ["abcd", "c"]) == ("ab", "c")
    assert in_pieces(["abc"], ["abcd", "c"]) == ("ab", "c")


def test_without_stops_everything_is_shown_at_once():
    assert StopMatcher().push("any text") == ("any text", False)


@pytest.mark.parametrize("bad", ["stop", [""], [7], [b"x"]])
def test_malformed_stops_are_refused(bad):
    with pytest.raises(InvalidValueError, match="stop"):
        StopMatcher(bad)
