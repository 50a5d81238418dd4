"""edgewise device: measure this machine, tune it, or list the devices that ship with edgewise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgewise.cli.frame import current, seconds_option
from edgewise.core.device import Device
from edgewise.core.errors import InvalidValueError
from edgewise.core.report import Quantity, Report, Table

EXAMPLES = (
    "edgewise device",
    "edgewise device --out laptop.toml",
    "edgewise device --list",
    "edgewise device pi5 --json",
    "edgewise device --tune",
)


def command(
    name: Annotated[str | None, typer.Argument(help="Show a shipped device, or a table at a path, instead of this "
                                                    "machine.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the table to a .toml or .json file.",
                                             show_default=False)] = None,
    listing: Annotated[bool, typer.Option("--list", help="Show every shipped device and the source of each number."),
                       ] = False,
    directory: Annotated[Path | None, typer.Option("--storage", help="Measure the storage of this directory; by "
                                                   "default the current one.", show_default=False)] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Find the settings that make models run fastest here, and keep "
                                       "them for every later start. No answer changes.")] = False,
    budget: Annotated[float, seconds_option("--budget", help="Most time that --tune takes.")] = 30.0,
) -> Report:
    """Measure what this machine reaches: cores, instruction tier, memory, arithmetic, storage, energy counters."""
    from edgewise.cost import devices

    if tune:
        if name is not None or out is not None or listing:
            raise InvalidValueError("--tune is of this machine; give it without a name, --out and --list")
        return _tune(budget)
    if listing:
        if name is not None or out is not None:
            raise InvalidValueError("--list shows every shipped device; give it without a name and without --out")
        tables = [_table(shipped, devices.load(shipped)) for shipped in devices.list_devices()]
        return Report("Shipped devices", tables=tuple(tables))
    if name is not None:
        device = devices.load(name)
        report = Report(device.name, (Quantity("description", device.description, origin="quoted"),),
                        (_table(name, device),))
    else:
        device, report = _probe(directory)
    if out is not None:
        devices.save(device, out)
        report = Report(report.title, (*report.quantities, Quantity("written to", str(out))), report.tables,
                        environment=report.environment)
    return report


def _tune(budget: float) -> Report:
    from edgewise.engine.tune import tune

    with current().progress("tuning", budget, "s") as update:
        return tune(budget_s=budget, progress=lambda what, spent: update(spent, title=what))


def _probe(directory: Path | None) -> tuple[Device, Report]:
    from edgewise.measure import probe

    with current().progress("measuring") as update:
        done = iter(range(100))
        found = probe(directory=directory, progress=lambda step: update(next(done), title=step))
    return found.device, found.report


def _table(name: str, device: Device) -> Table:
    rows = [(path, value, device.source(path) or "unknown") for path, value in device.numbers().items()]
    title = name if name == device.name else f"{name}: {device.name}"
    return Table(title, ("number", "value", "source"), tuple(rows))
