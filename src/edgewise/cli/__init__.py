"""One file per verb; each parses, calls one public function and prints its Report.

A verb is a module `cli/<verb>.py` with a function `command(...)` whose parameters are Typer options and whose result
is a Report, or None when it has already written its answer. It may hold `EXAMPLES`, lines shown under its help.
The module is imported when the verb is called, its help shown or its options completed, and not before.
`cli/frame.py` adds --json, --strict and --debug, turns errors into exit codes and prints the Report.
"""

from __future__ import annotations

import typer

from edgewise.cli.frame import LazyGroup

__all__ = ["VERBS", "app", "main"]

VERBS: dict[str, str] = {
    "run": "Answer a prompt with a language model.",
    "chat": "Talk with a language model.",
    "fit": "Choose number formats so that a model fits a memory or storage budget.",
    "quantize": "Quantise a model by a published method, calibrated on a text.",
    "prune": "Set weights to zero, or cut heads, neurons or layers out, by a published method.",
    "convert": "Rewrite a model in another number format or file format.",
    "inspect": "Show what is in a model file: tensors, formats, sizes, template, licence.",
    "perplexity": "Measure how well a model predicts a text.",
    "bench": "Measure the speed of a model against what the machine can do.",
    "reproduce": "Run a published system's recipe and judge its claims.",
    "coverage": "Show which techniques of the field are here, each with its test.",
    "device": "Measure or tune this machine, or list the devices that ship with edgewise.",
}
"""Every verb with its one-line help. A row whose module is not part of the installation is not listed."""


class _Verbs(LazyGroup):
    package = "edgewise.cli"
    verbs = VERBS


app = typer.Typer(
    name="edgewise",
    cls=_Verbs,
    help="Make a model fit a device, run it there, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from edgewise import __version__

        typer.echo(f"edgewise {__version__}")
        raise typer.Exit


@app.callback(epilog="Every verb takes --json, and --help with examples.")
def _root(
    version: bool = typer.Option(False, "--version", is_eager=True, callback=_print_version,
                                 help="Print the version and exit."),
) -> None:
    del version  # answered by the callback, before any verb


def main() -> None:
    """The entry point `edgewise`."""
    app()
