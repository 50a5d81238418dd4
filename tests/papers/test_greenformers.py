"""The smoke scale of Greenformers: each saves where it should, in numbers that do not depend on the machine."""

from __future__ import annotations

import pytest

from edgewise.papers import reproduce
from edgewise.papers.greenformers import _crossing


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_smoke_scale_shows_that_the_mechanism_acts(tmp_path):
    pytest.importorskip("sklearn")
    report = reproduce("greenformers", ablate=True, out=tmp_path)
    assert report["parameters of layers, thin pairs over dense"] < 0.6
    assert report["parameters of layers, Linformer over dense"] > 1
    assert report["parameters by design over dense"] < 0.7
    assert report["memory of Linformer over dense, longest, ONNX Runtime"] < 1
    assert report["points lost by random pairs, not trained"] > report["points lost by SVD at the largest fraction"]
    assert report["share of BERT-base's training that thin pairs save, counted"] > 0.3
    assert len(report.tables) == 3


def test_where_a_ratio_passes_one():
    assert _crossing([10, 100, 1000], [0.5, 0.5, 2.0]) == pytest.approx(10**2.5)
    assert _crossing([10, 100], [1.5, 2.0]) is None
    assert _crossing([10, 100, 1000, 10000], [0.5, 2.0, 0.5, 2.0]) is None
