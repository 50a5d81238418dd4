"""Errors carry their place and exit code; notices are never lost."""

from __future__ import annotations

import inspect
import warnings

import pytest

from edgewise.core import errors
from edgewise.core.errors import (
    EdgewiseError,
    EdgewiseWarning,
    FormatError,
    InvalidValueError,
    MissingExtraError,
    Notice,
    StrictError,
    collect_notices,
    notice,
    require,
)


def test_every_error_has_its_own_exit_code():
    kinds = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, EdgewiseError)]
    codes = [c.exit_code for c in kinds]
    assert len(set(codes)) == len(codes)
    assert all(0 < code < 64 for code in codes)


def test_the_docstring_draws_the_whole_tree():
    names = {c.__name__ for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, EdgewiseError)}
    assert all(name in errors.__doc__ for name in names)


def test_format_error_says_where():
    error = FormatError("offset beyond the end", path="m.gguf", tensor="blk.0.q", offset=4096)
    assert str(error) == "m.gguf, tensor 'blk.0.q', byte 4096: offset beyond the end"
    assert (error.path, error.tensor, error.offset, error.message) == ("m.gguf", "blk.0.q", 4096,
                                                                       "offset beyond the end")
    assert str(FormatError("bad")) == "bad"


def test_errors_are_also_what_python_expects():
    assert issubclass(InvalidValueError, ValueError)
    assert issubclass(MissingExtraError, ImportError)


def test_notices_go_to_the_innermost_collector_once():
    with collect_notices() as outer:
        notice("clamp", "a")
        with collect_notices() as inner:
            notice("fallback", "b", where="w")
            notice("fallback", "b", where="w")
        notice("info", "c")
    assert inner == [Notice("fallback", "b", "w")]
    assert [n.message for n in outer] == ["a", "c"]
    assert str(inner[0]) == "fallback: w: b"


def test_strict_raises_except_for_information():
    with collect_notices(strict=True) as notices:
        notice("info", "fine")
        with pytest.raises(StrictError, match="clamp: too big"):
            notice("clamp", "too big")
    assert len(notices) == 1


def test_without_a_collector_a_notice_is_a_warning():
    with pytest.warns(EdgewiseWarning, match="truncation: cut"):
        notice("truncation", "cut")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notice("info", "quiet")


def test_notice_json():
    item = Notice("ignored", "field x", "config.json")
    assert Notice.from_json(item.to_json()) == item


def test_require_names_the_command():
    assert require("json", extra="x", purpose="y").loads("1") == 1
    with pytest.raises(MissingExtraError, match=r"plotting needs the package 'no_such_thing'.*edgewise\[plot\]"):
        require("no_such_thing.sub", extra="plot", purpose="plotting")
