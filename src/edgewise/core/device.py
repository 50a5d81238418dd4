"""A machine as numbers: where bytes live and how fast they come, what computes, what connects, what idles.

Operations count two per multiply-add. An unknown number is None, never a guess; every number may name its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from edgewise.core.errors import InvalidValueError
from edgewise.core.plain import Plain

__all__ = ["Device", "Link", "Tier", "Unit"]

P = TypeVar("P", "Tier", "Unit", "Link")


@dataclass(frozen=True)
class Tier(Plain):
    """A place for bytes: SRAM, DRAM, flash, disk. capacity_bytes is what a program can have of it."""

    name: str
    capacity_bytes: int | None = None
    read_bytes_per_s: float | None = None
    write_bytes_per_s: float | None = None
    latency_s: float | None = None
    j_per_byte: float | None = None

    def __post_init__(self) -> None:
        _positive(f"tier {self.name!r}", self, "capacity_bytes", "read_bytes_per_s", "write_bytes_per_s")
        _not_negative(f"tier {self.name!r}", self, "latency_s", "j_per_byte")


@dataclass(frozen=True)
class Unit(Plain):
    """Something that computes. ops_per_s, j_per_op: by the name of a number format ("int8", "fp16", "fp32")."""

    name: str
    ops_per_s: Mapping[str, float] = field(default_factory=dict)
    j_per_op: Mapping[str, float] = field(default_factory=dict)
    cores: int | None = None
    instructions: str = ""

    def __post_init__(self) -> None:
        for format_name, value in {**self.ops_per_s, **self.j_per_op}.items():
            if not value > 0:
                raise InvalidValueError(f"unit {self.name!r}: {format_name} is a positive number; given {value}")
        _positive(f"unit {self.name!r}", self, "cores")


@dataclass(frozen=True)
class Link(Plain):
    """A connection to another machine."""

    name: str
    bytes_per_s: float | None = None
    latency_s: float | None = None
    j_per_byte: float | None = None

    def __post_init__(self) -> None:
        _positive(f"link {self.name!r}", self, "bytes_per_s")
        _not_negative(f"link {self.name!r}", self, "latency_s", "j_per_byte")


@dataclass(frozen=True, repr=False)
class Device(Plain):
    """tiers go from the fastest to the slowest. sources: where each number comes from, by its dotted path, such as
    "tiers.ram.capacity_bytes"; a shorter path ("tiers.ram") covers everything below it."""

    name: str
    tiers: tuple[Tier, ...] = ()
    units: tuple[Unit, ...] = ()
    links: tuple[Link, ...] = ()
    idle_w: float | None = None
    description: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _not_negative(f"device {self.name!r}", self, "idle_w")
        for kind, parts in (("tier", self.tiers), ("unit", self.units), ("link", self.links)):
            names = [part.name for part in parts]
            if len(set(names)) != len(names):
                raise InvalidValueError(f"device {self.name!r} has two {kind}s of one name: {', '.join(names)}")

    def tier(self, name: str) -> Tier:
        return _named(self.tiers, name, f"device {self.name!r} has no tier")

    def unit(self, name: str) -> Unit:
        return _named(self.units, name, f"device {self.name!r} has no unit")

    def link(self, name: str) -> Link:
        return _named(self.links, name, f"device {self.name!r} has no link")

    def numbers(self) -> dict[str, float]:
        """Every known number by its dotted path."""
        found: dict[str, float] = {}
        for kind, parts in (("tiers", self.tiers), ("units", self.units), ("links", self.links)):
            for part in parts:
                for key, value in part.to_json().items():
                    if isinstance(value, Mapping):
                        found.update({f"{kind}.{part.name}.{key}.{name}": number for name, number in value.items()})
                    elif isinstance(value, int | float):
                        found[f"{kind}.{part.name}.{key}"] = value
        if self.idle_w is not None:
            found["idle_w"] = self.idle_w
        return found

    def source(self, path: str) -> str | None:
        """The source of the number at a dotted path, the most specific one given; None if there is none."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            text = self.sources.get(".".join(parts[:end]))
            if text is not None:
                return text
        return None

    def __repr__(self) -> str:
        tiers = ", ".join(f"{t.name} {t.capacity_bytes or 0:.3g} B" for t in self.tiers)
        return f"Device({self.name}: {tiers}; {', '.join(u.name for u in self.units)})"


def _named(parts: tuple[P, ...], name: str, message: str) -> P:
    for part in parts:
        if part.name == name:
            return part
    raise InvalidValueError(f"{message} {name!r}; it has {', '.join(p.name for p in parts) or 'none'}")


def _positive(what: str, part: object, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        if value is not None and not value > 0:
            raise InvalidValueError(f"{what}: {name} is a positive number; given {value}")


def _not_negative(what: str, part: object, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        if value is not None and not value >= 0:
            raise InvalidValueError(f"{what}: {name} is not negative; given {value}")
