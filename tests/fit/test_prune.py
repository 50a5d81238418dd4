"""`edgewise prune` from end to end: what every row of its table keeps."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from edgewise.cli import app
from edgewise.compress.prune.masks import Prune
from edgewise.core.errors import InvalidValueError, collect_notices
from edgewise.core.shapes import shapes_of
from edgewise.engine.loading import load
from edgewise.fit.dispatch import calibration_of
from edgewise.fit.prune import prune, pruned
from edgewise.fit.pruners import PRUNERS, pruner_of, pruners_markdown
from edgewise.formats.folder import read_folder
from edgewise.formats.folder_writer import write_folder
from tiny_checkpoint import tiny_checkpoint

BASE = tiny_checkpoint(layers=4, width=192)
IDS = np.random.default_rng(0).integers(4, 260, 12_000).tolist()
NAMES = [pytest.param(row.name, marks=pytest.mark.slow if row.kind == "trained" else ()) for row in PRUNERS]
SHARE = 0.25


def made_by(name, **settings):
    row = pruner_of(name)
    sample = calibration_of(BASE, IDS, 4 if row.needs != "nothing" else 0)
    return pruned(BASE, row, row.settings({"sparsity": SHARE, **settings}), sample)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_pure_deterministic_through_a_file_and_in_the_engine(name, tmp_path):
    before = {key: BASE.tensors[key].dense().copy() for key in BASE.tensors}
    first, second = made_by(name), made_by(name)
    for key, values in before.items():
        np.testing.assert_array_equal(BASE.tensors[key].dense(), values)
    back = read_folder(write_folder(first, tmp_path / "made"))
    assert sorted(back.tensors) == sorted(second.tensors)
    for key in back.tensors:
        np.testing.assert_array_equal(back.tensors[key].dense(), second.tensors[key].dense())
    model = load(tmp_path / "made", cache=False)
    assert np.isfinite(model.forward(np.arange(10, 30, dtype=np.int32))).all()
    assert back.lineage[-1].name == "prune"
    assert back.lineage[-1].config["method"] == name


@pytest.mark.parametrize("name", NAMES)
def test_a_report_says_what_went_and_what_it_cost(name, tmp_path):
    settings = {"multiple": 8} if name in ("units", "llm-pruner") else {}
    report = prune(BASE, name, SHARE, out=tmp_path / "made", calibrate=IDS, settings=settings)
    assert report["sparsity"] == pytest.approx(SHARE, abs=0.02)
    assert 0 < report["quality"] <= 1
    if pruner_of(name).format == "cut":
        assert report["parameters"] < report["parameters before"]
        assert report["storage_bytes"] < report["tensor_bytes_before"]
    else:
        assert report["parameters"] == report["parameters before"]


def test_two_of_four_takes_less_room_and_runs(tmp_path):
    report = prune(BASE, "sparsegpt", out=tmp_path / "made", pattern="2:4", calibrate=IDS, windows=4)
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert report["tensor_bytes"] < 0.75 * report["tensor_bytes_before"]


def test_a_killed_run_goes_on(tmp_path):
    row, sample = pruner_of("wanda"), calibration_of(BASE, IDS, 4)

    class Killed(Exception):
        pass

    def until(title, done, total):
        if done >= 9:
            raise Killed

    with pytest.raises(Killed):
        pruned(BASE, row, Prune(0.3), sample, state=tmp_path / "state", progress=until)
    assert len(list((tmp_path / "state").glob("block-*"))) >= 1
    done = pruned(BASE, row, Prune(0.3), sample, state=tmp_path / "state")
    whole = pruned(BASE, row, Prune(0.3), sample)
    for key in whole.tensors:
        np.testing.assert_array_equal(done.tensors[key].dense(), whole.tensors[key].dense())


def test_cut_layers_differ_and_dropped_ones_do_not():
    assert shapes_of(made_by("units", first=0.25).config) is not None
    fewer = made_by("shortgpt")
    assert fewer.config["num_hidden_layers"] == 3
    assert shapes_of(fewer.config) is None


@pytest.mark.parametrize(("arguments", "message"), [
    ({"method": "magic"}, "no method 'magic'"), ({"method": "units", "pattern": "2:4"}, "whole units"),
    ({"method": "wanda", "pattern": "2:4", "sparsity": 0.5}, "by itself"), ({"sparsity": 1.5}, "share of weights"),
    ({"sparsity": 0.5, "settings": {"sparsity": 0.4}}, "given twice"),
    ({"settings": {"speed": 1}}, "no setting 'speed'")])
def test_what_cannot_be_done_is_named_before_anything_is_written(arguments, message, tmp_path):
    with pytest.raises(InvalidValueError, match=message):
        prune(BASE, out=tmp_path / "made", calibrate=IDS, **arguments)
    assert not (tmp_path / "made").exists()


def test_the_verb_prunes_and_lists(tmp_path):
    write_folder(BASE, tmp_path / "base")
    notes = tmp_path / "notes.txt"
    notes.write_text("A leaf is green, and the sea is blue; what is near is not far.\n" * 100, "utf-8")
    done = CliRunner().invoke(app, ["prune", str(tmp_path / "base"), "--method", "wanda", "--sparsity", "0.3", "--out",
                                    str(tmp_path / "made"), "--calibrate", str(notes), "--windows", "8", "--json"])
    assert done.exit_code == 0, done.output
    values = {quantity["name"]: quantity["value"] for quantity in json.loads(done.stdout)["quantities"]}
    assert values["sparsity"] == pytest.approx(0.3, abs=0.02)
    listed = CliRunner().invoke(app, ["prune", "--list"])
    assert listed.exit_code == 0
    for row in PRUNERS:
        assert row.name in listed.output


def test_zeros_alone_are_said_to_be_no_faster(tmp_path):
    with collect_notices() as notices:
        prune(BASE, "magnitude", 0.5, out=tmp_path / "made", calibrate=IDS, check=False)
    assert any("no model faster" in str(one) for one in notices)


def test_the_table_is_in_the_documentation(root):
    assert (root / "docs" / "pruning.md").read_text("utf-8") == pruners_markdown()
