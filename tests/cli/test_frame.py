"""The frame of the command line: lazy verbs, common flags, errors as one line and an exit code, sizes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import types
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from edgewise.cli import VERBS, app, frame
from edgewise.core.errors import BudgetError, InvalidValueError, SourceError, notice
from edgewise.core.report import Quantity, Report, Table


def report_of_three(count: Annotated[int, typer.Option(help="How many.")] = 3) -> Report:
    """Count things."""
    notice("clamp", "the count was clamped", where="test")
    return Report("counting", (Quantity("count", count),))


def invoke(command, *args):
    """Run one function as a verb of a small program."""
    module = types.ModuleType("verb")
    module.command = command
    module.EXAMPLES = ("tool verb --count 4",)
    return CliRunner().invoke(frame.verb_app(module, "verb"), args)


def test_a_verb_prints_its_report_with_its_notices():
    result = invoke(report_of_three, "--count", "4")
    assert result.exit_code == 0
    assert "counting" in result.stdout
    assert "4" in result.stdout
    assert "clamp: test: the count was clamped" in result.stdout


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option(help="How wide.", min=1)] = 2
    names: Annotated[list[str] | None, typer.Option("--name", help="What to call it.")] = None


def test_a_dataclass_stands_for_its_fields():
    def sized(kind: str = "box", *, size: Size) -> Report:
        return Report(kind, (Quantity("width", size.width), Quantity("names", " ".join(size.names or ["none"]))))

    assert Report.from_json(json.loads(invoke(sized, "--json").stdout))["width"] == 2
    said = Report.from_json(json.loads(invoke(sized, "--width", "5", "--name", "a", "--name", "b", "--json").stdout))
    assert (said["width"], said["names"]) == (5, "a b")
    assert invoke(sized, "--width", "0").exit_code == 2


def test_a_pipe_gets_whole_lines():
    def wide() -> Report:
        return Report("wide", tables=(Table("t", ("a", "b"), (("feed-forward " * 20, "x" * 200),)),))

    result = invoke(wide)
    assert ("feed-forward " * 20).strip() in result.stdout
    assert "x" * 200 in result.stdout
    assert all(line == line.rstrip() for line in result.stdout.splitlines())


def test_json_is_one_document_with_the_notices():
    result = invoke(report_of_three, "--json")
    data = json.loads(result.stdout)
    assert Report.from_json(data)["count"] == 3
    assert data["notices"] == [{"kind": "clamp", "message": "the count was clamped", "where": "test"}]


def test_strict_turns_a_notice_into_an_error():
    result = invoke(report_of_three, "--strict")
    assert result.exit_code == 9
    assert result.stdout == ""
    assert "strict mode" in result.stderr


@pytest.mark.parametrize(("error", "code"), [
    (SourceError("no such model 'x';\n expected a path"), 3),
    (BudgetError("too small"), 6),
    (InvalidValueError("bad"), 2),
    (KeyError("ours"), 70),
    (FileNotFoundError(2, "No such file or directory", "/nowhere"), 1),
    (MemoryError(), 1),
    (KeyboardInterrupt(), 130),
])
def test_an_error_is_one_line_and_an_exit_code(error, code):
    def fails() -> None:
        raise error

    result = invoke(fails)
    assert result.exit_code == code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 1
    if code != 130:
        assert result.stderr.startswith("edgewise: error: ")


def test_debug_shows_the_traceback():
    def fails() -> None:
        raise SourceError("gone")

    result = invoke(fails, "--debug")
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert result.stderr.rstrip().endswith("edgewise: error: gone")


def test_notices_before_an_error_are_shown():
    def fails() -> None:
        notice("fallback", "took the slow way")
        raise SourceError("gone")

    assert "took the slow way" in invoke(fails).stderr


def test_a_verb_that_streams_still_shows_notices():
    def streams() -> None:
        frame.current().write("piece")
        notice("truncation", "the answer was cut")

    result = invoke(streams)
    assert result.stdout == "piece"
    assert "the answer was cut" in result.stderr


def test_streaming_is_silent_under_json():
    def streams() -> Report:
        frame.current().write("piece")
        return Report("answer")

    assert json.loads(invoke(streams, "--json").stdout)["title"] == "answer"


def test_progress_is_silent_without_a_terminal():
    def works() -> None:
        with frame.current().progress("fetching", 10, "B") as update:
            update(5)

    result = invoke(works)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_help_has_examples_and_the_common_flags():
    text = invoke(report_of_three, "--help").stdout
    for expected in ("Count things", "--count", "--json", "--strict", "--debug", "tool verb --count 4"):
        assert expected in text


def test_verbs_without_a_module_are_not_listed():
    class Group(frame.LazyGroup):
        package = "edgewise.cli"
        verbs: ClassVar = {"frame": "exists", "no_such_verb": "does not"}

    group = Group(name="tool", commands={})
    assert group.list_commands(None) == ["frame"]
    assert group.get_command(None, "no_such_verb") is None


def test_every_listed_verb_has_help_and_examples():
    group = typer.main.get_command(app)
    listed = group.list_commands(None)
    assert set(listed) <= set(VERBS)
    for verb in listed:
        result = CliRunner().invoke(app, [verb, "--help"])
        assert result.exit_code == 0, verb
        assert "--json" in result.stdout, verb
        assert f"edgewise {verb}" in result.stdout.split("Examples:")[1], verb


def test_unknown_verb_is_wrong_usage():
    result = CliRunner().invoke(app, ["fitt"])
    assert result.exit_code == 2
    assert "fitt" in result.stderr


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, **environment})


def test_help_imports_no_other_room():
    done = python("import sys\nfrom edgewise.cli import main\nsys.argv = ['edgewise', '--help']\n"
                  "try: main()\nexcept SystemExit: pass\n"
                  "print(sorted({m.split('.')[1] for m in sys.modules if m.startswith('edgewise.')}), file=sys.stderr)")
    assert done.stderr.strip() == "['cli', 'core']"


def test_version():
    from edgewise import __version__

    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"edgewise {__version__}\n")


def test_a_closed_pipe_is_quiet():
    code = ("import sys, types\nfrom edgewise.cli import frame\nm = types.ModuleType('v')\n"
            "def command() -> None:\n    for _ in range(100000): print('x' * 100)\n"
            "m.command = command\nsys.argv = ['v']\nframe.verb_app(m, 'v')()")
    done = subprocess.run(f"{sys.executable} -c {shlex.quote(code)} | head -1; exit ${{PIPESTATUS[0]}}",
                          shell=True, executable="/bin/bash", capture_output=True, text=True, check=False)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.parametrize(("text", "size"), [
    ("90MB", 90_000_000), ("300mb", 300_000_000), ("1GB", 10**9), ("1.5GiB", 3 * 2**29), ("4096", 4096),
    ("4 KiB", 4096), ("2T", 2 * 10**12), (" 1B ", 1), (".5k", 500),
])
def test_parse_bytes(text, size):
    assert frame.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1XB", "1e6", "1 2MB", "0", "0.1B", "nan"])
def test_parse_bytes_says_what_it_expects(text):
    with pytest.raises(InvalidValueError, match="size"):
        frame.parse_bytes(text)


@pytest.mark.parametrize(("text", "seconds"),
                         [("20ms", 0.02), ("1.5", 1.5), ("2min", 120.0), ("1h", 3600), ("5us", 5e-6)])
def test_parse_seconds(text, seconds):
    assert frame.parse_seconds(text) == pytest.approx(seconds, rel=1e-12)


def test_parse_seconds_says_what_it_expects():
    with pytest.raises(InvalidValueError, match="such as 20ms"):
        frame.parse_seconds("soon")


def test_a_wrong_size_is_wrong_usage():
    def sized(memory: Annotated[int | None, frame.bytes_option("--memory", help="Cap.")] = None) -> Report:
        return Report("sized", (Quantity("memory", memory, "B"),))

    assert json.loads(invoke(sized, "--memory", "90MB", "--json").stdout)["quantities"][0]["value"] == 90_000_000
    assert json.loads(invoke(sized, "--json").stdout)["quantities"][0]["value"] is None
    wrong = invoke(sized, "--memory", "ninety")
    assert wrong.exit_code == 2
    assert "ninety" in wrong.stderr
