"""edgewise quantize: one published method, one format, a folder that the engine runs and torch loads."""

from __future__ import annotations

from typing import Annotated

import typer

from edgewise.cli import methods
from edgewise.cli import options as shared
from edgewise.cli.frame import current
from edgewise.core.errors import InvalidValueError
from edgewise.core.report import Report, Table

EXAMPLES = (
    "edgewise quantize smollm2 --method gptq --format int4/g32 --out smollm2-gptq",
    "edgewise quantize ./model --method awq --format int3/g32/fp16/min --calibrate notes.txt --out small",
    "edgewise quantize smollm2 --method smoothquant --set alpha=0.6 --out smollm2-w8a8",
    "edgewise quantize --list",
)


def command(
    model: methods.Model = None,
    method: Annotated[str, typer.Option("--method", "-m", help="A method of --list.")] = "gptq",
    format: Annotated[str | None, typer.Option("--format", "-f", help="Of the linears of the layers, such as int4/g32 "
                                               "or int3/g64/fp16/min; by default the method's own.",
                                               show_default=False)] = None,
    out: methods.Out = None,
    calibrate: methods.Calibrate = "wikipedia_pages/calibration",
    windows: methods.Windows = None,
    embedding: Annotated[str | None, typer.Option("--embedding", help="Of embedding and head, rounded to nearest; by "
                                                  "default they stay as they are.", show_default=False)] = None,
    settings: methods.Settings = None,
    threads: shared.Threads = None,
    resume: methods.Resume = False,
    check: methods.Check = True,
    overwrite: methods.Overwrite = False,
    offline: methods.Offline = False,
    list_methods: methods.ListMethods = False,
) -> Report:
    """Quantise a model by a published method, and report what it cost."""
    from edgewise.fit.dispatch import quantize
    from edgewise.fit.methods import METHODS

    if list_methods:
        return Report("Methods", tables=(Table("edgewise quantize --method", (
            "method", "kind", "needs", "format by default", "what it does", "paper"), tuple(
            (row.name, row.kind, row.needs, row.format, row.says, row.citation) for row in METHODS)),))
    if model is None:
        raise InvalidValueError("which MODEL? For example: edgewise quantize smollm2 --method gptq --format int4/g32")
    target = out or methods.folder_of(model, method)
    with current().progress("opening") as update:
        def progress(title: str, done: int, total: int) -> None:
            update(done, total=total, title=title)

        return quantize(model, method, format, out=target, calibrate=calibrate, windows=windows, embedding=embedding,
                        settings=methods.settings_of(settings), threads=threads, resume=resume,
                        overwrite=overwrite, check=check, offline=True if offline else None, progress=progress)
