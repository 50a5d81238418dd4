"""The workloads of xr-npe, and the smoke scale of its recipe."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.papers import reproduce
from edgewise.papers.xr_npe_workloads import WORKLOADS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_knows_its_own_answer(name):
    pytest.importorskip("sklearn")
    torch = pytest.importorskip("torch")
    data = {"digits": {"train": 1700}, "gaze": {"train": 20, "test": 30},
            "odometry": {"drives": 1, "frames": 200, "tests": 2}}[name]
    task = WORKLOADS[name](0, **data)
    outputs = task.build().eval()(*map(torch.from_numpy, task.inputs))
    assert len(outputs) == len(task.targets)
    assert np.isfinite(float(task.loss(outputs, torch.from_numpy(task.targets)).detach()))
    truth = np.eye(10, dtype=np.float32)[task.test_targets] if name == "digits" else task.test_targets
    lengths = np.cumsum([len(part[0]) for part in task.test_inputs])[:-1]
    assert task.error(np.split(truth, lengths)) < 0.05
    assert task.error(np.split(np.zeros_like(truth), lengths)) > 5


@pytest.mark.slow
def test_the_smoke_scale_shows_that_the_mechanism_acts(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("torch")
    report = reproduce("xr-npe", ablate=True, out=tmp_path)
    outcomes = {verdict.claim: verdict.outcome for verdict in report.verdicts}
    for claim in ("Every code survives decoding and encoding", "Posit(4,1) is the table of powers of two",
                  "Dot products are exact and rounded once", "Posit(16,1) is as good as float: within 0.3 points",
                  "The mixed model is 5.6 times as small as float",
                  "Rounding each product doubles the squared error of 4-bit dot products",
                  "gaze: training regains 60 % of what P4 lost",
                  "gaze: with a broken gradient training regains less"):
        assert outcomes[claim] == "reproduced", claim
    errors = {(row[0], row[1]): row[3] for row in report.tables[1].rows}
    for name in WORKLOADS:
        assert abs(errors[name, "P16"] - errors[name, "float"]) < 0.1 * errors[name, "float"] + 0.3
    assert (tmp_path / "xr-npe.md").exists()
