"""The smoke scale of MobileQuant: outliers break static ranges, learned scales mend them, integers agree."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.engine.loading import model_of
from edgewise.papers import reproduce
from edgewise.papers.mobilequant import with_outliers
from edgewise.papers.random_llama import random_llama


def test_outliers_keep_the_function():
    source = random_llama(0)
    made = with_outliers(source, 0, channels=3, factor=30.0)
    ids = np.random.default_rng(0).integers(0, 256, 30)
    before, after = (model_of(item, threads=1, kv="fp32", cache=False).forward(ids) for item in (source, made))
    assert np.abs(after - before).max() < 1e-4 * np.abs(before).max()
    gains = [np.sort(item.tensors["model.layers.1.input_layernorm.weight"].dense())[-4:] for item in (source, made)]
    assert gains[1][1] > 10 * gains[0][3] > gains[1][0]


@pytest.mark.slow
def test_the_smoke_scale_shows_that_the_mechanism_acts(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    report = reproduce("mobilequant", out=tmp_path)
    for name in ("W8A8", "W4A8"):
        assert report[f"error of static ranges over MobileQuant's, {name}"] > 2
        assert report[f"error of SmoothQuant over MobileQuant's, {name}"] > 1
        assert report[f"steps of the output that integers are off by, {name}"] <= 1
    assert report["worst folding error"] < 1e-4
    arms = next(table for table in report.tables if table.title == "Arms")
    assert len(arms.rows) == 10
