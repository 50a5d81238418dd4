"""The smoke scale of MoDeGPT: nothing gone changes nothing, and each mechanism acts on the model that it is for."""

from __future__ import annotations

import pytest

from edgewise.papers import reproduce


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_smoke_scale_shows_that_the_mechanism_acts(tmp_path):
    report = reproduce("modegpt", ablate=True, out=tmp_path)
    assert report["perplexity over dense, nothing gone"] == pytest.approx(1, abs=1e-3)
    losses = [report[f"perplexity over dense, {share} of the weights gone"] for share in ("10%", "20%", "30%")]
    assert losses == sorted(losses)
    assert report["loss over the whole method, rotary pairs torn"] > 1.5
    assert report["error of values by weights alone over whitened"] > 1.1
    arms = next(table for table in report.tables if table.title == "Arms")
    for name, removed, *_ in arms.rows:
        wanted = {"dense": (0.0,)}.get(name, (0.1, 0.2, 0.3))
        assert min(abs(removed - share) for share in wanted) < 0.04, name
    assert len(arms.rows) == 15
