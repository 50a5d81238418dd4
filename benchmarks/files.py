"""Model files to compare engines on: as given, rounded to another block type by edgewise, or with random weights."""

from __future__ import annotations

from pathlib import Path

from random_llama import SHAPES, random_file

from edgewise.fit.convert import convert
from edgewise.formats.cache import cache_root, file_sha256
from edgewise.formats.sources import resolve

__all__ = ["model_file"]

AS_IT_IS = "keep"


def model_file(source: str, block_type: str = AS_IT_IS) -> Path:
    """A GGUF file. source: what edgewise loads, or random:NAME. What is made lies in the cache, by its source's hash.

    The embedding table, which is the output head of a small model too, becomes Q8_0, as llama.cpp's own tool has it
    where rows are no multiple of 256.
    """
    if source.startswith("random:"):
        name = source.removeprefix("random:")
        if name not in SHAPES:
            raise SystemExit(f"no random model {name!r}; there are {', '.join(SHAPES)}")
        return random_file(name, "Q4_0" if block_type == AS_IT_IS else block_type)
    path = resolve(source)
    if block_type == AS_IT_IS:
        return path
    made = cache_root() / "benchmarks" / f"{path.stem}-{file_sha256(path)[:12]}.{block_type}.gguf"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        convert(path, made, block_type, embedding="Q8_0")
    return made
