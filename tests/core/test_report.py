"""Reports are plain data."""

from __future__ import annotations

import json

import pytest

from edgewise.core.checkpoint import Step
from edgewise.core.errors import InvalidValueError, Notice
from edgewise.core.report import Quantity, Report, Table, Verdict

REPORT = Report(
    "fit", (Quantity("memory", 90_000_000, "B"), Quantity("quality", 0.98, spread=(0.97, 0.99)),
            Quantity("speed", None, "tokens/s", origin="quoted")),
    (Table("candidates", ("name", "bytes"), (("int4", 10), ("int8", None)), ("", "B")),),
    (Verdict("it fits", "reproduced"),), {"cpu": "x"}, (Step("quantize", {"bits": 4}, "0.1", 3),),
    (Notice("clamp", "context"),),
)


def test_json_round_trip():
    assert Report.from_json(json.loads(json.dumps(REPORT.to_json()))) == REPORT
    assert Report.from_json({"title": "empty"}) == Report("empty")


def test_quantities_by_name():
    assert REPORT["quality"] == 0.98
    with pytest.raises(InvalidValueError, match="no quantity 'size'; it has memory, quality, speed"):
        REPORT["size"]


def test_more_notices():
    more = REPORT.with_notices([Notice("fallback", "scalar")])
    assert [n.kind for n in more.notices] == ["clamp", "fallback"]
    assert len(REPORT.notices) == 1


def test_wrong_rows_and_origins_are_refused():
    with pytest.raises(InvalidValueError, match="2 columns; a row has 1"):
        Table("t", ("a", "b"), ((1,),))
    with pytest.raises(InvalidValueError, match="guessed"):
        Quantity("q", 1, origin="guessed")
