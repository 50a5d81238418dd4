"""A small share of `make fuzz`, without AddressSanitizer."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RUN: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("run.py")))


@pytest.mark.parametrize("name", RUN["TARGETS"])
def test_mutated_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    outcome = RUN["fuzz"](name, 300, 1, tmp_path)
    assert outcome.failures == []
    assert outcome.counts["read"] > 0
    assert outcome.counts["FormatError"] > 50


def test_an_unexpected_exception_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(place: Path) -> Any:
        path = place / "x"
        path.write_bytes(b"x")
        return RUN["Target"]([b"x" * 50], [path], lambda: 1 // 0)

    monkeypatch.setitem(RUN["TARGETS"], "gguf", broken)
    outcome = RUN["fuzz"]("gguf", 3, 1, tmp_path, tmp_path)
    assert [case for case, _ in outcome.failures] == [0, 1, 2]
    assert len(list(tmp_path.glob("gguf-1-*.bin"))) == 3


def test_mutations_are_a_function_of_the_seed() -> None:
    data = bytes(range(256)) * 4
    made = [RUN["mutate"](data, np.random.default_rng([0, case])) for case in range(50)]
    again = [RUN["mutate"](data, np.random.default_rng([0, case])) for case in range(50)]
    assert made == again
    assert sum(one != data for one in made) > 40
