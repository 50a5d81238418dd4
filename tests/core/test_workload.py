"""Totals of a workload."""

from __future__ import annotations

import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.core.workload import Op, Workload


def test_totals_and_json():
    work = Workload("w", "decode", (Op("q", "linear", ((1, 8), (1, 4)), 32, 16, 32, 16, "int4/g32"),
                                    Op("n", "norm", in_bytes=32, out_bytes=32)))
    assert (work.macs, work.weight_bytes, work.moved_bytes) == (32, 16, 128)
    assert Workload.from_json(work.to_json()) == work
    assert repr(work) == "Workload(w decode: 2 ops, 32 MAC, 128 B)"


def test_negative_amounts_and_unknown_phases_are_refused():
    with pytest.raises(InvalidValueError, match="macs"):
        Op("q", "linear", macs=-1)
    with pytest.raises(InvalidValueError, match="expected one of prefill, decode"):
        Workload.from_json({"name": "w", "phase": "sleep"})
