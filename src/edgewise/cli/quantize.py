"""edgewise quantize: one published method, one format, a folder that the engine runs and torch loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A path, a short name such as smollm2, "
                                                "ORG/REPO[:FILE] of the Hugging Face hub, or pip:NAME[:FILE].",
                                                show_default=False)] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="A method of --list.")] = "gptq",
    format: Annotated[str | None, typer.Option("--format", "-f", help="Of the linears of the layers, such as int4/g32 "
                                               "or int3/g64/fp16/min; by default the method's own.",
                                               show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder to write; by default MODEL-METHOD here.",
                                             show_default=False)] = None,
    calibrate: Annotated[str, typer.Option("--calibrate", help="What to calibrate on: a file, or a text by name; pydoc "
                                           "needs no download.")] = "wikipedia_pages/calibration",
    windows: Annotated[int | None, typer.Option("--windows", min=1, help="Calibrate on so many windows of 512 tokens; "
                                                "by default what the method needs.", show_default=False)] = None,
    embedding: Annotated[str | None, typer.Option("--embedding", help="Of embedding and head, rounded to nearest; by "
                                                  "default they stay as they are.", show_default=False)] = None,
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
    """Quantise a model by a published method, and report what it cost."""
    from edgewise.fit.dispatch import quantize
    from edgewise.fit.methods import METHODS

    if list_methods:
        return Report("Methods", tables=(Table("edgewise quantize --method", (
            "method", "kind", "needs", "format by default", "what it does", "paper"), tuple(
            (row.name, row.kind, row.needs, row.format, row.says, row.citation) for row in METHODS)),))
    if model is None:
        raise InvalidValueError("which MODEL? For example: edgewise quantize smollm2 --method gptq --format int4/g32")
    target = out or Path(f"{Path(model.rstrip('/')).name.split(':')[-1].removesuffix('.gguf')}-{method}")
    with current().progress("opening") as update:
        def progress(title: str, done: int, total: int) -> None:
            update(done, total=total, title=title)

        return quantize(model, method, format, out=target, calibrate=calibrate, windows=windows, embedding=embedding,
                        settings=dict(setting(each) for each in settings or ()), threads=threads, resume=resume,
                        overwrite=overwrite, check=check, offline=True if offline else None, progress=progress)


def setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise InvalidValueError(f"--set takes NAME=VALUE, such as damp=0.05; given {text!r}")
    return name.strip(), value.strip()
