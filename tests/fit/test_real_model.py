"""SmolLM2 fitted to 90 MB: the promise of --memory, kept by the model and by the process that runs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from edgewise import load
from edgewise.core.budget import Budget
from edgewise.core.errors import collect_notices
from edgewise.fit import fit
from edgewise.measure import run_child

pytestmark = pytest.mark.slow
MEMORY = 90_000_000
PROCESS = 90_000_000
"""What the interpreter, the tokenizer and the libraries may take beside the model."""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("fit") / "smollm2"
    with collect_notices():
        return folder, fit("smollm2", Budget(memory_bytes=MEMORY), out=folder, methods=("rtn",))


def test_the_model_keeps_the_budget_and_most_of_its_quality(fitted):
    folder, result = fitted
    with collect_notices() as notices:
        model = load(folder)
    assert model.memory.total_bytes <= MEMORY
    assert model.context == result.checkpoint.config["edgewise_run"]["context"] >= 1024
    assert not [item for item in notices if item.kind != "info"]
    assert result.report["quality"] > 0.7
    assert [len(table.rows) for table in result.report.tables[1:3]] == [8, 31]
    assert "Paris" in model.generate("What is the capital of France?", max_tokens=32).result().text


def test_the_process_keeps_its_promise_from_the_first_start(fitted, tmp_path):
    folder, _ = fitted
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        used = run_child([sys.executable, "-m", "edgewise", "run", str(folder), "What is the capital of France?",
                          "--max-tokens", "32"], env=environment)
        assert used.returncode == 0, used.stderr
        assert "Paris" in used.stdout
        assert used.peak_bytes <= MEMORY + PROCESS
