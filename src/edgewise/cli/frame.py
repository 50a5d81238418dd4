"""What every verb shares: lazy loading, common options, sizes and durations, progress, errors as exit codes.

Exit codes: 0 done; the `exit_code` of an EdgewiseError (core/errors.py); 1 the operating system refused something;
2 wrong usage; 70 a mistake of ours; 130 interrupted; 141 the reader of our output went away.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import ModuleType
from typing import Any, ClassVar, get_type_hints

import typer
import typer.core
import typer.main

from edgewise.core.errors import EdgewiseError, InvalidValueError, Notice, collect_notices
from edgewise.core.report import Report

__all__ = ["LazyGroup", "Output", "bytes_option", "current", "parse_bytes", "parse_seconds", "seconds_option",
           "verb_app", "wrap"]

INTERNAL_ERROR, INTERRUPTED, BROKEN_PIPE = 70, 130, 141


# ---- output -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Output:
    """How the running verb may speak: `json` asks for one JSON document on stdout and nothing else."""

    json: bool = False
    strict: bool = False
    debug: bool = False

    @property
    def terminal(self) -> bool:
        """True when a person watches: progress and colour are welcome."""
        return not self.json and sys.stdout.isatty() and sys.stderr.isatty()

    def write(self, text: str) -> None:
        """Stream a piece of the answer to stdout. Says nothing under --json, where the Report carries the answer."""
        if not self.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    @contextmanager
    def progress(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Callable[..., None]]:
        """A bar on stderr while a person watches. Yields update(done, total=None, title=None); `done` is absolute.

        unit "B" shows bytes and their rate.
        """
        if not self.terminal:
            yield lambda done, total=None, title=None: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        amount = DownloadColumn() if unit == "B" else TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit)
        columns = (TextColumn("{task.description}"), BarColumn(), amount if total or unit == "B" else TextColumn(""),
                   TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total)

            def update(done: float, total: float | None = None, title: str | None = None) -> None:
                bar.update(task, completed=done, total=total, description=title)

            yield update


_output: ContextVar[Output | None] = ContextVar("edgewise_output", default=None)


def current() -> Output:
    """The Output of the verb that is running."""
    return _output.get() or Output()


def _print_report(report: Report, output: Output) -> None:
    from edgewise.report import render

    if output.json:
        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
        return
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    # What goes into a file or a pipe is not folded to a screen that nobody looks at.
    sys.stdout.write(render(report, "terminal", colour=colour, width=None if sys.stdout.isatty() else 1000))


def _print_notices(notices: Sequence[Notice]) -> None:
    for item in notices:
        print(f"edgewise: {item}", file=sys.stderr)


# ---- running a verb -----------------------------------------------------------------------------------------------

@contextmanager
def _exit_codes(debug: bool) -> Iterator[None]:
    """Errors become one line on stderr and an exit code; with `debug` the traceback comes first."""
    try:
        yield
        sys.stdout.flush()
    except EdgewiseError as error:
        _fail(error, str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # The interpreter flushes stdout once more at its end; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        _fail(error, f"{where}{error.strerror or error}", 1, debug)
    except MemoryError as error:
        _fail(error, "out of memory; give a smaller --memory, --context or model", 1, debug)
    except (typer.Exit, typer.Abort, SystemExit):
        raise
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("click", "typer"):
            raise  # a usage error, which Typer words itself
        _fail(error, f"internal error: {type(error).__name__}: {error} (run again with --debug for the traceback)",
              INTERNAL_ERROR, debug)


def _fail(error: BaseException, message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    print(f"edgewise: error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code) from None


def wrap(command: Callable[..., Report | None]) -> Callable[..., None]:
    """A verb with --json, --strict and --debug, its notices collected and its Report printed.

    A parameter whose type is a dataclass stands for the options that are the dataclass's fields.
    """
    signature = inspect.signature(command, eval_str=True)
    groups = {p.name: p.annotation for p in signature.parameters.values() if is_dataclass(p.annotation)}

    @functools.wraps(command)
    def run(*, json: bool, strict: bool, debug: bool, **options: Any) -> None:
        output = Output(json, strict, debug)
        token = _output.set(output)
        for name, group in groups.items():
            options[name] = group(**{field.name: options.pop(field.name) for field in fields(group)})
        try:
            with _exit_codes(debug):
                with collect_notices(strict=strict) as notices:
                    try:
                        report = command(**options)
                    except BaseException:
                        _print_notices(notices)  # what was done differently may be why it failed
                        raise
                if report is None:
                    _print_notices(notices)
                else:
                    fresh = [item for item in notices if item not in report.notices]
                    _print_report(report.with_notices(fresh), output)
        finally:
            _output.reset(token)

    flags = {
        "json": ("--json", "Print one JSON document instead of tables."),
        "strict": ("--strict", "Make every fallback, truncation, clamp or ignored field an error."),
        "debug": ("--debug", "Show the traceback of an error."),
    }
    taken = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for given in signature.parameters.values()
             for p in (_options_of(groups[given.name]) if given.name in groups else [given])]
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=bool,
                          default=typer.Option(False, flag, help=text, rich_help_panel="Common options"))
        for name, (flag, text) in flags.items()
    ]
    run.__signature__ = signature.replace(parameters=[*taken, *common], return_annotation=None)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*taken, *common]}
    return run


def _options_of(group: type[Any]) -> list[inspect.Parameter]:
    """The fields of a dataclass as parameters, their types and defaults as declared."""
    hints = get_type_hints(group, include_extras=True)
    return [inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[field.name],
                              default=inspect.Parameter.empty if field.default is MISSING else field.default)
            for field in fields(group)]


class LazyGroup(typer.core.TyperGroup):
    """Commands whose modules are imported when they are called. Subclasses name the package and the table of verbs."""

    package: ClassVar[str]
    verbs: ClassVar[Mapping[str, str]]

    def list_commands(self, ctx: Any) -> list[str]:
        return [verb for verb in self.verbs if importlib.util.find_spec(f"{self.package}.{verb}") is not None]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in with the one-line help; `resolve_command` imports the real one."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return typer.core.TyperCommand(cmd_name, help=self.verbs[cmd_name])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, stand_in, rest = super().resolve_command(ctx, args)
        if name is None or stand_in is None:
            return name, stand_in, rest
        app = verb_app(importlib.import_module(f"{self.package}.{name}"), name)
        return name, typer.main.get_command(app), rest

    def invoke(self, ctx: Any) -> Any:
        with _exit_codes(debug=False):  # what goes wrong before a verb runs: a missing extra, an interrupt
            return super().invoke(ctx)


def verb_app(module: ModuleType, name: str) -> typer.Typer:
    """The module of a verb as a Typer application of its own."""
    examples = getattr(module, "EXAMPLES", ())
    epilog = "\n\n".join(["Examples:", *examples]) if examples else None
    settings = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name, epilog=epilog, context_settings=settings)(wrap(module.command))
    return app


# ---- sizes and durations ------------------------------------------------------------------------------------------

_SIZES = {"": 1, "B": 1, **{f"{p}B": 10 ** (3 * i) for i, p in enumerate("KMGT", 1)},
          **{f"{p}IB": 2 ** (10 * i) for i, p in enumerate("KMGT", 1)},
          **{p: 10 ** (3 * i) for i, p in enumerate("KMGT", 1)}}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "h": 3600.0}


def _number_and_unit(text: str) -> tuple[float, str] | None:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    return None if match is None else (float(match[1]), match[2])


def parse_bytes(text: str) -> int:
    """ "90MB" -> 90_000_000, "1.5GiB" -> 1_610_612_736, "4096" -> 4096. K, M, G, T are powers of 1000."""
    parsed = _number_and_unit(text)
    if parsed is None or parsed[1].upper() not in _SIZES:
        raise InvalidValueError(f"size {text!r} is not a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB, "
                                "such as 90MB")
    size = round(parsed[0] * _SIZES[parsed[1].upper()])
    if size < 1:
        raise InvalidValueError(f"size {text!r} is less than one byte")
    return size


def parse_seconds(text: str) -> float:
    """ "20ms" -> 0.02, "1.5" -> 1.5, "2min" -> 120.0. Units: us, ms, s, min, h."""
    parsed = _number_and_unit(text)
    if parsed is None or parsed[1].lower() not in _SECONDS:
        raise InvalidValueError(f"duration {text!r} is not a number with us, ms, s, min or h, such as 20ms")
    return parsed[0] * _SECONDS[parsed[1].lower()]


def _option(parse: Callable[[str], Any], metavar: str) -> Callable[..., Any]:
    def option(*names: str, help: str, **more: Any) -> Any:
        def parser(text: str) -> Any:
            try:
                return parse(str(text))
            except InvalidValueError as error:
                raise typer.BadParameter(str(error)) from None

        return typer.Option(*names, help=help, parser=parser, metavar=metavar, **more)

    return option


bytes_option = _option(parse_bytes, "SIZE")
"""Annotated[int | None, bytes_option("--memory", help="...")]: a size in bytes, given as 90MB or 1.5GiB."""
seconds_option = _option(parse_seconds, "TIME")
"""Annotated[float | None, seconds_option("--latency", help="...")]: seconds, given as 20ms or 2min."""
