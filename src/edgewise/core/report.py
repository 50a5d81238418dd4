"""What came out: quantities with their unit and origin, tables, verdicts, and the environment that produced them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from edgewise.core.checkpoint import Step
from edgewise.core.errors import InvalidValueError, Notice

__all__ = ["Origin", "Quantity", "Report", "Table", "Verdict"]

Origin = Literal["measured", "simulated", "quoted"]


@dataclass(frozen=True)
class Quantity:
    """One number with its unit. spread is (low, high), by default of a 95 % interval or the range of repeats."""

    name: str
    value: float | int | str | None
    unit: str = ""
    spread: tuple[float, float] | None = None
    origin: Origin = "measured"

    def __post_init__(self) -> None:
        if self.origin not in ("measured", "simulated", "quoted"):
            raise InvalidValueError(f"{self.name}: origin is measured, simulated or quoted; given {self.origin!r}")


@dataclass(frozen=True)
class Table:
    """Rows under named columns. Cells are numbers, strings or None; units: one per column, "" for none."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    units: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise InvalidValueError(f"table {self.title!r} has {len(self.columns)} columns; a row has {len(row)}")


@dataclass(frozen=True)
class Verdict:
    """What became of a claim."""

    claim: str
    outcome: Literal["reproduced", "partly", "not-reproduced", "not-checkable"]
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """The result of a verb. Rendered by the room `report`; plain data here."""

    title: str
    quantities: tuple[Quantity, ...] = ()
    tables: tuple[Table, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    lineage: tuple[Step, ...] = ()
    notices: tuple[Notice, ...] = ()

    def __getitem__(self, name: str) -> float | int | str | None:
        """The value of the quantity of that name."""
        for quantity in self.quantities:
            if quantity.name == name:
                return quantity.value
        raise InvalidValueError(f"report {self.title!r} has no quantity {name!r}; it has "
                                f"{', '.join(q.name for q in self.quantities) or 'none'}")

    def with_notices(self, notices: Sequence[Notice]) -> Report:
        """The same report with more notices."""
        return replace(self, notices=(*self.notices, *notices))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `from_json` is its inverse."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        return cls(
            title=data["title"],
            quantities=tuple(
                Quantity(**{**q, "spread": tuple(q["spread"]) if q.get("spread") else None})
                for q in data.get("quantities", ())),
            tables=tuple(
                Table(t["title"], tuple(t["columns"]), tuple(tuple(r) for r in t["rows"]), tuple(t.get("units", ())))
                for t in data.get("tables", ())),
            verdicts=tuple(Verdict(**v) for v in data.get("verdicts", ())),
            environment=dict(data.get("environment", {})),
            lineage=tuple(Step.from_json(s) for s in data.get("lineage", ())),
            notices=tuple(Notice.from_json(n) for n in data.get("notices", ())),
        )
