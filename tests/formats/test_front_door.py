"""The front door of the room: its list is its table, and opening it imports nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgewise
from edgewise import formats


def test_every_name_is_there() -> None:
    for name in set(formats.__all__) - {"read_gguf", "write_gguf"}:
        assert getattr(formats, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        formats.absent  # noqa: B018 - asking for it is the test


def test_gguf_is_behind_it_too() -> None:
    pytest.importorskip("edgewise.native._core")
    assert formats.read_gguf.__name__ == "read_gguf"
    assert formats.write_gguf.__name__ == "write_gguf"


@pytest.mark.parametrize("statement", [
    "import edgewise.formats", "from edgewise.formats import resolve, open_checkpoint, write_folder",
    "import edgewise.data.texts"])
def test_imports_stay_light(statement: str) -> None:
    program = (f"import sys; {statement}; "
               "heavy = {'torch', 'transformers', 'huggingface_hub', 'gensim', 'safetensors', 'pip', 'tokenizers'}; "
               "print(sorted(heavy & sys.modules.keys()))")
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONPATH": str(Path(edgewise.__file__).parent.parent)})
    assert shown.stdout == "[]\n"
