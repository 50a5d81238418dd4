"""docs/methods.md, made from the recipes and docs/results. `python docs/methods.py` writes it; a test compares it."""

from __future__ import annotations

from pathlib import Path

from edgewise.papers.methods import methods_markdown

HERE = Path(__file__).resolve().parent


def made() -> str:
    return methods_markdown(HERE / "results")


if __name__ == "__main__":
    (HERE / "methods.md").write_text(made(), "utf-8")
