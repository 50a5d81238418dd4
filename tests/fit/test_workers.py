"""Two workers of Ray find what one process finds that asks for as many trials at a time."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.core.budget import Budget
from edgewise.core.errors import MissingExtraError, collect_notices
from edgewise.fit import compose, composition
from edgewise.fit.workers import Local
from tiny_checkpoint import tiny_checkpoint

IDS = np.random.default_rng(0).integers(4, 260, 16_000).astype(np.int32)


def composed():
    with collect_notices():
        return compose(tiny_checkpoint(hidden=128, width=256), Budget(memory_bytes=700_000), text_from=IDS, threads=2,
                       context=128, trials=8, orders=2, methods=("rtn",), workers=2)


def measured(result):
    tables = {table.title: table for table in result.report.tables}
    trials = tables["Pareto front of the trials"]
    orders = next(table for title, table in tables.items() if title.startswith("The same steps"))
    return [(row[0], row[2], row[5]) for row in trials.rows], [row[:3] for row in orders.rows]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_two_workers_find_what_one_process_finds(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    pytest.importorskip("ray")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    two = composed()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    monkeypatch.setattr(composition, "Workers", lambda problem, memo, state, count: Local(composition.Evaluator(
        problem, memo)))
    one = composed()
    assert measured(two) == measured(one)
    assert two.checkpoint.lineage == one.checkpoint.lineage
    ids = one.checkpoint.tensors
    assert all(np.array_equal(two.checkpoint.tensors[name].dense(), ids[name].dense()) for name in ids)


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"edgewise\[workers\]"):
        composed()
