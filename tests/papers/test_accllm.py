"""The smoke scale of AccLLM: the mask holds, feedback helps, the cache is constant, recovery recovers."""

from __future__ import annotations

import pytest

from edgewise.papers import reproduce


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_smoke_scale_shows_that_the_mechanism_acts(tmp_path):
    report = reproduce("accllm", ablate=True, out=tmp_path)
    assert report["fours that keep other than two"] == 0
    assert report["places that recovery moved"] == 0
    assert report["error of the linears by masked GPTQ over rounding, W2"] < 1
    assert report["error of the linears by SparseGPT over magnitude"] < 0.7
    assert report["cache bytes of a long text over those of a short"] == 1
    assert report["rise of perplexity by KV4"] < 0.05
    arms = next(table for table in report.tables if table.title == "Weights, activations, cache")
    assert [row[0] for row in arms.rows][:2] == ["dense", "2:4 magnitude"]
    assert len(arms.rows) == 15
