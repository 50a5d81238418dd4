"""Statistics on a disk: equal to the bit, refused when damaged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgewise.core.errors import FormatError, InvalidValueError
from edgewise.core.stats import InputGatherer, Stats
from edgewise.formats.stats_folder import StatsFolder


def stats(seed=0):
    gatherer = InputGatherer(gram=True, samples=4)
    gatherer.add(np.random.default_rng(seed).standard_normal((9, 5)))
    return replace(gatherer.stats(), gradient_square=np.ones((2, 5)))


def test_back_to_the_bit(tmp_path):
    folder = StatsFolder(tmp_path / "s", key="k")
    folder.add(("a", "b"), stats())
    folder.add(("c",), stats(1))
    again = Stats(StatsFolder(tmp_path / "s", key="k"))
    assert sorted(again) == ["a", "b", "c"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        for field in ("count", "min", "max", "total", "total_square", "gram", "samples", "gradient_square"):
            assert np.array_equal(getattr(again[name], field), getattr(stats(seed), field)), field
    with pytest.raises(InvalidValueError, match="another run"):
        StatsFolder(tmp_path / "s", key="other")


def test_damage_is_said(tmp_path):
    folder = StatsFolder(tmp_path / "s")
    folder.add(("a",), stats())
    (tmp_path / "s" / "00000.npz").write_bytes(b"PK not an archive")
    with pytest.raises(FormatError, match="damaged statistics"):
        folder["a"]
    (tmp_path / "s" / "stats.json").write_text('{"key": "", "files": {"a": "../x"}}')
    with pytest.raises(FormatError, match="file names"):
        StatsFolder(tmp_path / "s")
