"""docs/quantization.md, made from the table of methods. `python docs/quantization.py` writes it; a test compares it."""

from __future__ import annotations

from pathlib import Path

from edgewise.fit.methods import methods_markdown

if __name__ == "__main__":
    (Path(__file__).resolve().parent / "quantization.md").write_text(methods_markdown(), "utf-8")
