"""edgewise prune: one published method, one share of the weights, a folder that the engine runs and torch loads."""

from __future__ import annotations

from typing import Annotated

import typer

from edgewise.cli import methods
from edgewise.cli import options as shared
from edgewise.cli.frame import current
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
    model: methods.Model = None,
    method: Annotated[str, typer.Option("--method", "-m", help="A method of --list.")] = "wanda",
    sparsity: Annotated[float | None, typer.Option("--sparsity", "-s", help="Share of the layers' weights that go; of "
                                                   "shortgpt, of the layers. By default the method's own.",
                                                   show_default=False)] = None,
    pattern: Annotated[str, typer.Option("--pattern", help="N of every M weights kept, such as 2:4, in place of a "
                                         "share.", show_default=False)] = "",
    out: methods.Out = None,
    calibrate: methods.Calibrate = "wikipedia_pages/calibration",
    windows: methods.Windows = None,
    settings: methods.Settings = None,
    threads: shared.Threads = None,
    resume: methods.Resume = False,
    check: methods.Check = True,
    overwrite: methods.Overwrite = False,
    offline: methods.Offline = False,
    list_methods: methods.ListMethods = False,
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
    target = out or methods.folder_of(model, method)
    with current().progress("opening") as update:
        def progress(title: str, done: int, total: int) -> None:
            update(done, total=total, title=title)

        return prune(model, method, sparsity, out=target, pattern=pattern, calibrate=calibrate, windows=windows,
                     settings=methods.settings_of(settings), threads=threads, resume=resume,
                     overwrite=overwrite, check=check, offline=True if offline else None, progress=progress)
