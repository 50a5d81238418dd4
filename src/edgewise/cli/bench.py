"""edgewise bench: speed of a model, against what the machine can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgewise.cli import options as shared
from edgewise.cli.frame import current
from edgewise.core.errors import InvalidValueError
from edgewise.core.report import Report

EXAMPLES = (
    "edgewise bench smollm2",
    "edgewise bench model.gguf -p 512,2048 -n 128 -d 0,4096 -t 1,2",
    "edgewise bench smollm2 --format int8/g32 --repeats 15 --out speed.json",
    "edgewise bench smollm2 -t 1 --profile",
    "edgewise bench smollm2 --energy-model board.toml --json",
)


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [-1]
    if any(n < 0 for n in found):
        raise InvalidValueError(f"{option} takes whole numbers with commas between, such as 128,512; given {text!r}")
    return found


def command(
    model: shared.Model,
    prompts: Annotated[str, typer.Option("-p", "--prompt-tokens", help="Tokens of the prefill tests; 0 for none."),
                       ] = "512",
    generated: Annotated[str, typer.Option("-n", "--new-tokens", help="Tokens of the decode tests; 0 for none."),
                         ] = "128",
    depths: Annotated[str, typer.Option("-d", "--depth", help="Tokens of context before each test.")] = "0",
    threads: Annotated[str, typer.Option("-t", "--threads", help="Thread counts; by default the physical cores that "
                                         "this process may use.", show_default=False)] = "",
    kv: shared.Kv = None,
    attention: shared.Attention = None,
    format: shared.Format = None,
    repeats: Annotated[int, typer.Option("--repeats", "-r", min=1, help="Rounds that count; six or more give a 95 % "
                                         "interval, fewer the range.")] = 7,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Rounds before those that count.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Of the tokens and of the order of tests.")] = 0,
    energy_model: Annotated[str | None, typer.Option("--energy-model", help="A device table that gives joules where "
                                                     "this machine counts none.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the report to this JSON file.",
                                             show_default=False)] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time of each test goes, operator by "
                                          "operator, as the first thread sees it.")] = False,
    cache: shared.Cache = True,
) -> Report:
    """Tokens per second in prefill (pp) and decode (tg), the share of what the machine can do, memory and energy."""
    from edgewise.cost import devices
    from edgewise.engine.bench import bench
    from edgewise.formats.cache import write_aside

    counts = _numbers("-t", threads)
    if 0 in counts:
        raise InvalidValueError("-t takes thread counts of at least 1")
    device = None if energy_model is None else devices.load(energy_model)
    with current().progress("benchmark") as update:
        report: Report = bench(
            model, prompts=_numbers("-p", prompts), generated=_numbers("-n", generated),
            depths=_numbers("-d", depths), threads=counts, kv=kv, attention=attention, format=format, repeats=repeats,
            warmup=warmup, seed=seed, device=device, cache=cache, operators=profile,
            progress=lambda what, done, total: update(done, total, what))
    if out is not None:
        with write_aside(out) as file:
            file.write((json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n").encode())
    return report
