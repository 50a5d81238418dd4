"""The smoke scale of WGSEF: the penalty is exact, reaches its level, and what is zero is cut."""

from __future__ import annotations

import pytest

from edgewise.papers import reproduce


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_smoke_scale_shows_that_the_mechanism_acts(tmp_path):
    report = reproduce("wgsef", ablate=True, out=tmp_path)
    assert report["largest gap of the proximal operator to its optimum, relative"] < 1e-8
    assert report["largest deviation from weight decay at k = m"] < 1e-12
    assert report["fewest survivors over k, lambda of 1 and more"] >= 1
    assert report["fewest survivors of group lasso over k"] < 1
    assert report["least rise of survivors from level to level"] > 0
    assert report["most groups left over k"] == 1
    assert report["most groups left by the penalty itself over k"] <= 1.5
    assert report["share of groups zero by ridge"] == 0
    assert report["largest difference of the cut net's outputs"] < 1e-4
    assert report["multiplications of the cut net over the dense"] < 0.6
    assert len(next(table for table in report.tables if table.title == "Networks").rows) == 8
