"""The registry claims nothing that no test shows."""

from __future__ import annotations

import ast
import importlib
from collections import Counter

import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.papers.coverage import AREAS, ROWS, Row, coverage_report


def faults(row: Row, root) -> list[str]:
    """What is wrong with a row."""
    found = []
    if row.status == "missing":
        return [f"{name} is filled in" for name in ("module", "function", "test", "effect") if getattr(row, name)]
    try:
        if not callable(getattr(importlib.import_module(row.module), row.function, None)):
            found.append(f"{row.module} has no function {row.function!r}")
    except ImportError:
        found.append(f"{row.module} cannot be imported")
    path, _, name = row.test.partition("::")
    if not (root / path).is_file():
        return [*found, f"no file {path!r}"]
    tests = {node.name: node for node in ast.walk(ast.parse((root / path).read_text("utf-8")))
             if isinstance(node, ast.FunctionDef)}
    if name not in tests:
        return [*found, f"{path} has no test {name!r}"]
    names = {node.id for node in ast.walk(tests[name]) if isinstance(node, ast.Name)}
    # On and off are two runs with names of their own, and a comparison of them is asserted.
    if not {"on", "off"} <= names:
        found.append(f"{name} does not run the technique on and off")
    if not any(isinstance(test, ast.Compare) and {"on", "off"} & {n.id for n in ast.walk(test)
                                                                  if isinstance(n, ast.Name)}
               for node in ast.walk(tests[name]) if isinstance(node, ast.Assert) for test in ast.walk(node)):
        found.append(f"{name} asserts nothing about on and off")
    if any("skip" in ast.unparse(d) or "xfail" in ast.unparse(d) for d in tests[name].decorator_list):
        found.append(f"{name} may be skipped")
    if not row.effect:
        found.append("no effect is stated")
    if (row.status == "partial") != bool(row.missing):
        found.append("a partial row says what is missing, and no other does")
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_row_claims_only_what_a_test_shows(row, root):
    assert faults(row, root) == []


@pytest.mark.parametrize(("changes", "message"), [
    ({"function": "no_such_function"}, "no function"), ({"module": "edgewise.attic"}, "cannot be imported"),
    ({"test": "tests/papers/test_techniques.py::test_of_nothing"}, "no test"),
    ({"test": "tests/nowhere.py::x"}, "no file"),
    ({"test": "tests/papers/test_coverage.py::test_ids_are_unique"}, "on and off"), ({"effect": ""}, "no effect"),
    ({"missing": "a part"}, "partial"), ({"status": "missing"}, "filled in"),
])
def test_a_false_claim_is_noticed(changes, message, root):
    from dataclasses import replace

    row = next(row for row in ROWS if row.id == "F1")
    assert any(message in fault for fault in faults(replace(row, **changes), root))


def test_ids_are_unique():
    assert [name for name, count in Counter(row.id for row in ROWS).items() if count > 1] == []


def test_every_area_of_the_checklist_is_there():
    assert {row.area for row in ROWS} == set(AREAS)
    assert {row.id for row in ROWS if row.status == "have"} >= {"F1", "H1"}


def test_the_report_counts():
    report = coverage_report()
    assert report["rows"] == len(ROWS) == report["have"] + report["partial"] + report["missing"]
    assert sum(sum(row[1:]) for row in report.tables[0].rows) == len(ROWS)
    assert len(report.tables[1].rows) + len(report.tables[2].rows) == len(ROWS)
    only = coverage_report("compression")
    assert only["rows"] == sum(row.area == "compression" for row in ROWS)
    with pytest.raises(InvalidValueError, match="no area"):
        coverage_report("cooking")
