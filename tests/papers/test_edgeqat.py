"""The smoke scale of EdgeQAT: the terms act, in the direction that the paper states."""

from __future__ import annotations

import pytest

from edgewise.papers import reproduce


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_smoke_scale_shows_that_the_mechanism_acts(tmp_path):
    report = reproduce("edgeqat", ablate=True, out=tmp_path)
    assert report["gain of cosine by L_D"] > 0
    assert report["gain of variance by L_E"] > 0.1
    assert report["fall of cosine with the sign of L_D turned"] > 0.1
    assert report["packed dot products that are wrong"] == 0
    assert report["packed multiplications over plain ones"] == 0.5
    assert report["held-out loss in the engine over torch's"] == pytest.approx(1, abs=0.01)
    assert report["bytes of the linears over float32"] < 0.13
    arms = next(table for table in report.tables if table.title == "Arms")
    assert len(arms.rows) == 13
