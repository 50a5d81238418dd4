"""How native/tests/run.py counts; the runs themselves are `make test-arm`, `make test-wasm` and `make test-host`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("kernel_check_run", ROOT / "native" / "tests" / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(("output", "status", "expected"), [
    ("neon: 3 cases equal\n3 passed, 0 failed\n", 0, "3 passed, 0 failed"),
    ("3 passed, 2 failed\n", 1, "3 passed, 2 failed"),
    ("3 passed, 0 failed\n", 139, "3 passed, 1 failed"),
    ("neon: 3 cases equal\n", 0, "0 passed, 1 failed"),
    ("3 passed, 0 failed\nIllegal instruction\n", 132, "0 passed, 1 failed"),
    ("", 0, "0 passed, 1 failed"),
])
def test_a_run_is_counted_by_its_closing_line(run, output, status, expected):
    tally = run.Tally()
    tally.add(output, status)
    assert str(tally) == expected


@pytest.mark.parametrize(("target", "reason"), [
    ("arm", "apt-get install qemu-user"), ("wasm", "pip install"), ("host", "pip install ziglang")])
def test_what_is_missing_is_named_and_nothing_passes(run, target, reason, monkeypatch, capsys):
    monkeypatch.setattr(run.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(run, "find_spec", lambda _: None)
    assert run.main([target]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert reason in lines[-2]
    assert lines[-1] == "0 passed, 0 failed, 1 skipped"


def test_a_build_that_fails_is_a_failure(run, monkeypatch, capsys):
    monkeypatch.setattr(run, "compilers", lambda _: [run.Compiler("broken", ())])
    monkeypatch.setattr(run, "build", lambda *_, **__: None)
    assert run.main(["host"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 1 failed"
