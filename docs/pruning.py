"""docs/pruning.md, made from the table of methods. `python docs/pruning.py` writes it; a test compares it."""

from __future__ import annotations

from pathlib import Path

from edgewise.fit.pruners import pruners_markdown

if __name__ == "__main__":
    (Path(__file__).resolve().parent / "pruning.md").write_text(pruners_markdown(), "utf-8")
