"""A budget names what is not kept."""

from __future__ import annotations

import math

import pytest

from edgewise.core.budget import Budget, Violation
from edgewise.core.errors import InvalidValueError
from edgewise.core.report import Quantity, Report


def report(**values):
    return Report("r", tuple(Quantity(name, value) for name, value in values.items()))


def test_ceilings_and_floors():
    budget = Budget(memory_bytes=100, tokens_per_s=10.0, quality=0.9)
    assert budget.check(report(memory_bytes=100, tokens_per_s=10, quality=0.9)) == ()
    violations = budget.check(report(memory_bytes=101, tokens_per_s=9, quality=0.95))
    assert [v.name for v in violations] == ["memory_bytes", "tokens_per_s"]
    assert str(violations[0]) == "memory_bytes is 101; the budget asks for at most 100"
    assert "at least 10" in str(violations[1])


@pytest.mark.parametrize("value", [None, "unknown"])
def test_what_is_not_known_is_not_kept(value):
    assert Budget(joules=1.0).check(report(joules=value)) == (Violation("joules", 1.0),)
    assert Budget(joules=1.0).check(report()) == (Violation("joules", 1.0),)


def test_nan_keeps_no_limit():
    assert len(Budget(latency_s=1.0, quality=0.5).check(report(latency_s=math.nan, quality=math.nan))) == 2


def test_no_limits_no_violations():
    assert Budget().check(report()) == ()
    assert repr(Budget(memory_bytes=5)) == "Budget(memory_bytes=5)"


def test_json_round_trip():
    budget = Budget(storage_bytes=5, latency_s=0.1)
    assert budget.to_json() == {"storage_bytes": 5, "latency_s": 0.1}
    assert Budget.from_json(budget.to_json()) == budget


@pytest.mark.parametrize("limits", [{"memory_bytes": 0}, {"latency_s": -1.0}, {"quality": 1.1}, {"joules": math.nan}])
def test_limits_make_sense(limits):
    with pytest.raises(InvalidValueError):
        Budget(**limits)
