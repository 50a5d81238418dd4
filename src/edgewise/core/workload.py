"""What has to be computed and moved, one operation at a time. Derived from a model or graph, never edited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgewise.core.errors import InvalidValueError
from edgewise.core.plain import Plain

__all__ = ["Op", "Phase", "Workload"]

Phase = Literal["prefill", "decode", "forward", "backward"]


@dataclass(frozen=True)
class Op(Plain):
    """One operation. kind: "linear", "attention", "norm", "conv", ...; shapes: of its inputs, then its outputs.

    number_format: of the weights, by name, where there are weights.
    """

    name: str
    kind: str
    shapes: tuple[tuple[int, ...], ...] = ()
    macs: int = 0
    weight_bytes: int = 0
    in_bytes: int = 0
    out_bytes: int = 0
    number_format: str = ""

    def __post_init__(self) -> None:
        for field in ("macs", "weight_bytes", "in_bytes", "out_bytes"):
            if getattr(self, field) < 0:
                raise InvalidValueError(f"op {self.name!r}: {field} is not negative; given {getattr(self, field)}")


@dataclass(frozen=True, repr=False)
class Workload(Plain):
    """Operations in the order they run."""

    name: str
    phase: Phase
    ops: tuple[Op, ...] = ()

    @property
    def macs(self) -> int:
        return sum(op.macs for op in self.ops)

    @property
    def weight_bytes(self) -> int:
        return sum(op.weight_bytes for op in self.ops)

    @property
    def moved_bytes(self) -> int:
        """Weights, inputs and outputs, each read or written once."""
        return sum(op.weight_bytes + op.in_bytes + op.out_bytes for op in self.ops)

    def __repr__(self) -> str:
        return f"Workload({self.name} {self.phase}: {len(self.ops)} ops, {self.macs:.3g} MAC, {self.moved_bytes:.3g} B)"
