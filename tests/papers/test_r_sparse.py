"""The smoke scale of R-Sparse: thresholds leave what they should, chance is worse, the low rank takes the rest."""

from __future__ import annotations

import pytest

from edgewise.papers import reproduce


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_smoke_scale_shows_that_the_mechanism_acts(tmp_path):
    report = reproduce("r-sparse", ablate=True, out=tmp_path)
    assert report["share of the weights read at 50 %, alpha 1"] == pytest.approx(0.5, abs=0.08)
    assert report["perplexity over dense at 50 %"] < report["random inputs over dense"]
    assert report["error with nothing in the low rank, over R-Sparse"] > 1
    assert report["error with all inputs in the low rank, over R-Sparse"] > 1
    arms = report.tables[-1] if report.tables[-1].title.startswith("Perplexity") else report.tables[1]
    assert [row[0] for row in arms.rows] == ["dense", "low rank alone", "random inputs", "|x|", "alpha 1",
                                             "alpha 0.95", "alpha 0.8", "searched"]
