"""edgewise perplexity: how well a model predicts a text."""

from __future__ import annotations

from typing import Annotated

import typer

from edgewise.cli import options as shared
from edgewise.cli.frame import current
from edgewise.core.report import Report

EXAMPLES = (
    "edgewise perplexity smollm2 --windows 8",
    "edgewise perplexity model.gguf --text report.txt",
    "edgewise perplexity smollm2 --attention sink=4,window=512 --window 4096",
    "edgewise perplexity smollm2 --format int4/g32/fp16/min --windows 8 --json",
)


def command(
    model: shared.Model,
    text: Annotated[str, typer.Option("--text", help="A UTF-8 file, or lee_background, wikipedia_pages, "
                                      "wikipedia_pages/calibration, wikipedia_pages/training, pydoc.",
                                      )] = "lee_background",
    windows: Annotated[int | None, typer.Option("--windows", min=1, help="Only the first so many windows; by default "
                                                "the whole text.", show_default=False)] = None,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens per window.")] = 512,
    memory: shared.Memory = None,
    kv: shared.Kv = None,
    attention: shared.Attention = None,
    threads: shared.Threads = None,
    format: shared.Format = None,
    cache: shared.Cache = True,
) -> Report:
    """Perplexity of a text: windows side by side without BOS, every position but the first of each, natural mean."""
    from edgewise.data import texts
    from edgewise.engine import load
    from edgewise.engine.evaluate import perplexity_report

    with shared.loading("loading") as progress:
        measured = texts.text(text, progress=progress)
        loaded = load(model, format=format, memory_bytes=memory, threads=threads, context=window, kv=kv,
                      attention=attention, cache=cache, progress=progress)
    with current().progress("perplexity", unit="windows") as update:
        return perplexity_report(loaded, measured, windows=windows, window=window,
                                 progress=lambda what, done, total: update(done, total, what))
