"""What runs on a device stays light: rooms without torch pull in nothing heavy, at any depth."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LIGHT_ROOMS = ("core", "native", "report", "formats", "measure", "worlds", "data", "cost", "engine", "fit", "cli")
HEAVY = {"torch", "transformers", "huggingface_hub", "onnx", "onnxruntime", "scipy", "sklearn", "optuna", "pandas",
         "matplotlib", "gguf", "ml_dtypes", "psutil", "pytest", "hypothesis", "starlette", "uvicorn", "llguidance"}

IMPORT_ALL = """
import importlib, json, pkgutil, sys
room = importlib.import_module(sys.argv[1])
for found in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
    if not found.name.rpartition(".")[2].startswith("_core"):
        importlib.import_module(found.name)
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def modules_after(code: str, *args: str) -> set[str]:
    """Top-level names in sys.modules after the code has run in a new interpreter."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *args],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("room", LIGHT_ROOMS)
def test_every_module_of_a_light_room_is_light(room):
    assert modules_after(IMPORT_ALL, f"edgewise.{room}") & HEAVY == set()


def test_the_package_itself_imports_only_itself():
    code = ("import json, sys\nbefore = set(sys.modules)\nimport edgewise\n"
            "print(json.dumps(sorted(set(sys.modules) - before)))")
    names = {name.split(".")[0] for name in modules_after(code)}
    assert names - sys.stdlib_module_names == {"edgewise"}


def test_public_names_are_there_and_others_are_not():
    import edgewise

    for name in edgewise.__all__:
        assert getattr(edgewise, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = edgewise.lode


@pytest.mark.parametrize("room", LIGHT_ROOMS)
def test_front_doors_open(room):
    code = ("import importlib, json, sys\nroom = importlib.import_module(sys.argv[1])\n"
            "print(json.dumps([n for n in getattr(room, '__all__', []) if not hasattr(room, n)]))")
    assert modules_after(code, f"edgewise.{room}") == set()


def test_a_start_imports_what_it_uses():
    """A model in a GGUF file needs no reader of folders or wheels, no writer of reports, no statistics."""
    code = ("import json, sys\nfrom edgewise.engine.loading import load\nimport edgewise.formats.gguf\n"
            "print(json.dumps(sorted(sys.modules)))")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    modules = set(json.loads(done.stdout))
    unwanted = {"core.report", "core.device", "core.schedule", "core.stats", "formats.folder", "formats.wheels",
                "measure.machine", "measure.quality"}
    assert modules & {f"edgewise.{name}" for name in unwanted} == set()
    assert modules & {"importlib.metadata", "email.message", "difflib", "logging"} == set()
