"""The smoke scale of ZeroQAT: each piece acts."""

from __future__ import annotations

import pytest

from edgewise.papers import reproduce


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_smoke_scale_shows_that_the_mechanism_acts(tmp_path):
    report = reproduce("zeroqat", ablate=True, out=tmp_path)
    assert report["cosine of the mean estimate to the gradient"] > 0.3
    assert report["memory of light training over its forward pass"] < 1.2
    assert report["memory of back-propagation over the full forward pass"] > 1.5
    assert report["loss without smoothing less that with it"] > 0.05
    assert report["share that straight-through gradients regain"] > 0
    recovery = next(table for table in report.tables if table.title == "Recovery at 2 bits")
    assert len(recovery.rows) == 8
