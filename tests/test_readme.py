"""README.md: its tables are the program's, its example runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest


def example(root) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text("utf-8"), re.DOTALL)
    return code


def test_the_tables_are_those_of_the_program(root):
    spec = importlib.util.spec_from_file_location("tables", root / "docs/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = (root / "README.md").read_text("utf-8")
    assert tables.filled(text) == text, "run: python docs/tables.py"


def test_the_example_is_short_and_compiles(root):
    code = example(root)
    assert len(code.strip().splitlines()) <= 15
    compile(code, "README.md", "exec")


def test_links_lead_somewhere(root):
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (root / name).read_text("utf-8")):
            assert (root / target).exists(), f"{name}: {target}"


def test_every_make_target_that_is_named_exists(root):
    rules = re.findall(r"^([a-z -]+):", (root / "Makefile").read_text("utf-8"), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    for name in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", (root / name).read_text("utf-8"), re.MULTILINE))
        assert named, name
        assert named <= targets, name


@pytest.mark.slow
def test_the_example_runs_and_then_runs_offline(root):
    fetched = subprocess.run([sys.executable, "-c", example(root)], capture_output=True, text=True, check=False)
    assert fetched.returncode == 0, fetched.stderr
    assert "sky" in fetched.stdout
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    offline = subprocess.run([sys.executable, "-c", example(root)], capture_output=True, text=True, check=False,
                             env={**os.environ, **nowhere, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""})
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout == fetched.stdout
