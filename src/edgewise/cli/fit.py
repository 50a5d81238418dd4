"""edgewise fit: choose number formats, or pipelines of steps, so that a model fits a memory or storage budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgewise.cli.frame import bytes_option, current
from edgewise.core.budget import Budget
from edgewise.core.errors import InvalidValueError
from edgewise.core.report import Report

_STEPS = "Search over pipelines"
EXAMPLES = (
    "edgewise fit smollm2 --memory 90MB --out small",
    "edgewise fit smollm2 --quality 0.9 --out small",
    "edgewise fit ./model.gguf --memory 300MB --context 4096 --text notes.txt --out small",
    "edgewise fit smollm2 --memory 80MB --search full --json",
    "edgewise fit smollm2 --memory 60MB --steps width,rank,sparsity,bits --trials 24 --out small",
)


def command(
    model: Annotated[str, typer.Argument(help="A path, short name, hub repository or wheel.", show_default=False)],
    memory: Annotated[int | None, bytes_option("--memory", help="Most that weights, KV cache and scratch may take.",
                                               show_default=False)] = None,
    storage: Annotated[int | None, bytes_option("--storage", help="Most that the folder may take on disk.",
                                                show_default=False)] = None,
    quality: Annotated[float | None, typer.Option("--quality", help="Least exp(-mean KL to the source), 0 to 1; alone, "
                                                  "the smallest model that reaches it.", show_default=False)] = None,
    context: Annotated[int | None, typer.Option("--context", help="Positions; by default as many as fit.",
                                                show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the fitted model to this folder.",
                                             show_default=False)] = None,
    text: Annotated[str, typer.Option("--text", help="What to measure on: a file, or a text by name.")] = "pydoc",
    search: Annotated[str, typer.Option("--search", help="quick, or full: every weight measured by itself, on more "
                                        "text.")] = "quick",
    formats: Annotated[str | None, typer.Option("--formats", help="Formats to choose from, by commas, such as "
                                                "int8/g32,int4/g32/fp16/min.", show_default=False)] = None,
    methods: Annotated[str, typer.Option("--methods", help="What may be tried, by commas: rtn, gptq.")] = "rtn,gptq",
    steps: Annotated[str | None, typer.Option("--steps", help="Search over pipelines of these steps, in any order: "
                                              "width, depth, rank, sparsity, bits, by commas.", rich_help_panel=_STEPS,
                                              show_default=False)] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Pipelines to measure.", rich_help_panel=_STEPS)] = 24,
    orders: Annotated[int, typer.Option("--orders", min=0, help="Orders in which the steps of the best pipeline are "
                                        "measured after the search.", rich_help_panel=_STEPS)] = 6,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same result.", rich_help_panel=_STEPS,
                                      )] = 0,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Pipelines measured at a time, each in a process of "
                                         "its own (Ray).", rich_help_panel=_STEPS)] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the trials of an earlier search for the same.",
                                         rich_help_panel=_STEPS)] = False,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads; by default one per usable core.",
                                                show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder that something else wrote.",
                                            )] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing.")] = False,
) -> Report:
    """Choose number formats so that a model fits a memory or storage budget, and measure what that costs.

    With --steps, also which units to cut, which weights to factor or thin out, and in which order.
    """
    from edgewise.fit import compose, fit

    if steps is None and (given := [name for name, value, default in (
            ("--trials", trials, 24), ("--orders", orders, 6), ("--seed", seed, 0), ("--workers", workers, 1),
            ("--resume", resume, False)) if value != default]):
        raise InvalidValueError(f"{', '.join(given)}: of a search over pipelines, which --steps starts, such as "
                                "--steps width,rank,sparsity,bits")
    if steps is not None and search != "quick":
        raise InvalidValueError("--search is of formats alone; a search over pipelines measures bands of layers")
    if search not in ("quick", "full"):
        raise InvalidValueError(f"--search is quick or full; given {search!r}")
    budget = Budget(memory_bytes=memory, storage_bytes=storage, quality=quality)
    with current().progress("opening") as update:
        def progress(title: str, done: int, total: int) -> None:
            update(done, total=total, title=title)

        common: dict[str, Any] = {
            "out": out, "context": context, "text_from": text,
            "formats": None if formats is None else [part.strip() for part in formats.split(",")],
            "methods": [part.strip() for part in methods.split(",") if part.strip()], "threads": threads,
            "overwrite": overwrite, "offline": True if offline else None, "progress": progress}
        if steps is None:
            result = fit(model, budget, search="full" if search == "full" else "quick", **common)
        else:
            result = compose(model, budget, steps=[part for part in steps.split(",") if part.strip()], trials=trials,
                             orders=orders, seed=seed, workers=workers, resume=resume, **common)
    report: Report = result.report
    return report
