"""The smoke scale of Beta-Rank: the score has its published direction, and what is pruned is smaller."""

from __future__ import annotations

import pytest

from edgewise.papers import reproduce


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_smoke_scale_shows_that_the_mechanism_acts(tmp_path):
    report = reproduce("beta-rank", ablate=True, out=tmp_path)
    assert report["score of a filter times three, out over in"] == pytest.approx(9)
    assert report["score of a filter times three, in over out"] == pytest.approx(1)
    assert report["place of the indifferent filter by L1"] == 0
    assert report["filters below the indifferent one by beta"] == 0
    assert report["parameters beside what the widths give"] == 1
    assert report["multiplications left"] < 0.42
    tables = {table.title: table for table in report.tables}
    assert len(tables["Unequal kinds"].rows) == 10
    assert len(tables["Equal kinds"].rows) == 6
