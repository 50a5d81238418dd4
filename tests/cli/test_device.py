"""edgewise device, as a user types it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from edgewise.cli import app
from edgewise.core.report import Report
from edgewise.cost import devices


def run(*args):
    return CliRunner().invoke(app, ["device", *map(str, args)])


def test_list_shows_every_device_and_source():
    result = run("--list", "--json")
    assert result.exit_code == 0
    report = Report.from_json(json.loads(result.stdout))
    assert [t.title.split(":")[0] for t in report.tables] == list(devices.list_devices())
    assert all(row[2] and row[2] != "unknown" for table in report.tables for row in table.rows)


def test_one_device_as_a_table_and_as_a_file(tmp_path):
    out = tmp_path / "copy.toml"
    result = run("pi5", "--out", out)
    assert result.exit_code == 0
    assert "Raspberry Pi 5" in result.stdout
    assert devices.load(out) == devices.load("pi5")
    assert run(out, "--json").exit_code == 0


def test_this_machine(tmp_path):
    out = tmp_path / "here.toml"
    result = run("--storage", tmp_path, "--out", out, "--json")
    assert result.exit_code == 0
    report = Report.from_json(json.loads(result.stdout))
    assert report["cores"] >= 1
    assert report["memory read, 1 thread"] > 0
    device = devices.load(out)
    assert device.tier("ram").capacity_bytes == report["memory"]
    energy = report["energy counter"]
    assert energy in ("rapl", "battery") or any("energy unknown" in n.message for n in report.notices)


@pytest.mark.parametrize(("args", "code", "message"), [
    (("pi6",), 3, "pi5"), (("pi5", "--list"), 2, "--list"), (("--out", "/no/such/folder/d.toml", "pi5"), 1, "folder"),
])
def test_mistakes(args, code, message):
    result = run(*args)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_tune(tmp_path, monkeypatch):
    from edgewise.engine import tune as room

    small = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "width": 96, "vocab": 96, "context": 600}
    plan = room.synthetic_plan(**small)
    monkeypatch.setattr(room, "synthetic_plan", lambda: plan)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = run("--tune", "--budget", "300ms", "--json")
    assert result.exit_code == 0
    report = Report.from_json(json.loads(result.stdout))
    stored = json.loads(next((tmp_path / "edgewise" / "tuning").glob("*.json")).read_text())
    assert report.environment["settings"] == stored["settings"]
    assert report.environment["budget_s"] == 0.3
    assert "huge_pages" in [row[0] for row in report.tables[0].rows]


def test_tune_is_of_this_machine():
    for more in (["pi5"], ["--list"], ["--out", "x.toml"]):
        result = run("--tune", *more)
        assert result.exit_code == 2
        assert "--tune is of this machine" in result.stderr
