"""The runtimes beside each other, and the smoke scale of the recipe."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from edgewise.core.errors import MissingExtraError, UnsupportedError, collect_notices
from edgewise.engine.archs import plan_of
from edgewise.papers import reproduce
from edgewise.papers.encoder_backends import backends, edgewise_backend, mlx_backend, onnx_backend
from tiny_checkpoint import tiny_checkpoint, tiny_encoder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def batch():
    ids = np.random.default_rng(0).integers(4, 200, (3, 16))
    mask = np.arange(16)[None, :] < np.array([16, 5, 11])[:, None]
    return ids, mask


def test_rows_are_read_alone_unless_padding_is_read_too():
    plan = plan_of(tiny_encoder())
    ids, mask = batch()
    ours = edgewise_backend(plan, 1)(ids, mask)
    assert ours.shape == (3, 16, 64)
    alone = edgewise_backend(plan, 1)(ids[1:2, :5], mask[1:2, :5])
    assert np.array_equal(ours[1, :5], alone[0])
    assert not ours[1, 5:].any()
    padded = edgewise_backend(plan, 1, padding=True)(ids, mask)
    assert np.array_equal(padded[0], ours[0])
    assert np.abs(padded - ours)[1, :5].max() > 1e-2


@pytest.mark.parametrize("make", [onnx_backend, mlx_backend])
def test_another_runtime_computes_the_same(make):
    plan = plan_of(tiny_encoder())
    ids, mask = batch()
    try:
        theirs = make(plan, 1)(ids, mask)
    except MissingExtraError as error:
        pytest.skip(str(error))
    assert np.abs(theirs - edgewise_backend(plan, 1)(ids, mask))[mask].max() < 1e-4


def test_a_runtime_that_is_not_installed_is_named(monkeypatch):
    for name in ("torch", "onnx", "onnxruntime", "mlx", "mlx.core"):
        monkeypatch.setitem(sys.modules, name, None)
    with collect_notices() as notices:
        found = backends(plan_of(tiny_encoder()), lambda *a, **k: None, 1)
    assert found.keys() == {"edgewise"}
    assert any("edgewise[onnx]" in item.message for item in notices)
    assert any("edgewise[mlx]" in item.message for item in notices)


def test_decoders_are_refused():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    with pytest.raises(UnsupportedError, match="encoders"):
        onnx_backend(plan_of(tiny_checkpoint()), 1)


@pytest.mark.slow
def test_the_smoke_scale_shows_that_the_mechanism_acts(tmp_path):
    pytest.importorskip("torch")
    report = reproduce("mlx-transformers", ablate=True, out=tmp_path)
    outcomes = {verdict.claim: verdict.outcome for verdict in report.verdicts}
    assert outcomes["Checkpoints of BERT, RoBERTa and XLM-RoBERTa load directly and agree with torch"] == "reproduced"
    assert outcomes["Parameter names of the second runtime are those of the checkpoint"] == "reproduced"
    assert outcomes["Every runtime computes the same"] == "reproduced"
    assert outcomes["Without the attention mask, padding leaks"] == "reproduced"
    assert outcomes["Without RoBERTa's position offset, nothing agrees"] == "reproduced"
    assert outcomes["On Apple silicon batch 1 takes less than on an A10"] == "not-checkable"
    grid = report.tables[1]
    assert {row[0] for row in grid.rows} >= {"edgewise", "torch"}
    assert (tmp_path / "mlx-transformers.json").is_file()
