"""Imports point downwards: the contract holds, and would notice if it did not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(directory: Path, package: Path) -> subprocess.CompletedProcess[str]:
    """lint-imports with the configuration of `directory` on the package found in `package`."""
    return subprocess.run([sys.executable, "-c", LINT, "--no-cache", "--config", str(directory / "pyproject.toml")],
                          cwd=directory, env={**os.environ, "PYTHONPATH": str(package)}, capture_output=True, text=True,
                          check=False)


@pytest.fixture
def copy(root, tmp_path):
    """The package's Python files and the contract, to break."""
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(root / "src/edgewise", tmp_path / "src/edgewise", ignore=unwanted)
    shutil.copy(root / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contract_holds(root):
    done = lint(root, root / "src")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "KEPT" in done.stdout


@pytest.mark.parametrize(("file", "line"), [
    ("core/errors.py", "import edgewise.report"),  # upwards
    ("report/text.py", "import edgewise.native.io"),  # rooms on one line do not import each other
    ("measure/repeat.py", "import edgewise.formats"),
    ("formats/hostile.py", "    import edgewise.engine.plan"),  # inside a function counts too
])
def test_a_forbidden_import_is_noticed(copy, file, line):
    path = copy / "src/edgewise" / file
    path.write_text(path.read_text() + (f"\n\ndef late():\n{line}\n" if line.startswith(" ") else f"\n{line}\n"))
    done = lint(copy, copy / "src")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout


def test_a_room_without_a_place_is_noticed(copy):
    (copy / "src/edgewise/attic").mkdir()
    (copy / "src/edgewise/attic/__init__.py").write_text("")
    done = lint(copy, copy / "src")
    assert done.returncode == 1
    assert "attic" in done.stdout + done.stderr


def test_every_room_says_what_it_is_for(root):
    for room in sorted(path.parent for path in (root / "src/edgewise").glob("*/__init__.py")):
        text = (room / "__init__.py").read_text()
        assert text.startswith('"""'), room.name
        assert len(text.split('"""')[1].strip()) > 20, room.name


def test_no_drawers(root):
    drawers = {"utils", "util", "misc", "extra", "common", "helpers", "v2", "new", "old"}
    for path in (root / "src").rglob("*"):
        assert path.stem.lower() not in drawers, path


def test_the_contract_names_the_rooms_that_exist(root):
    contract = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    names = {name.strip() for line in contract["layers"] for name in line.split("|")}
    built = {name for name in names if not name.startswith("(")}
    rooms = {path.parent.name for path in (root / "src/edgewise").glob("*/__init__.py")}
    assert built == rooms, "take a room out of its parentheses when something moves in"
