"""What a result may cost at most and must reach at least."""

from __future__ import annotations

from dataclasses import dataclass

from edgewise.core.errors import InvalidValueError
from edgewise.core.plain import Plain
from edgewise.core.report import Report

__all__ = ["Budget", "Violation"]

_AT_LEAST = ("tokens_per_s", "quality")


@dataclass(frozen=True)
class Violation(Plain):
    """A limit that is not kept. value is None when the report does not say."""

    name: str
    limit: float
    value: float | None = None

    def __str__(self) -> str:
        relation = "at least" if self.name in _AT_LEAST else "at most"
        given = "not known" if self.value is None else f"{self.value:,g}"
        return f"{self.name} is {given}; the budget asks for {relation} {self.limit:,g}"


@dataclass(frozen=True, repr=False)
class Budget(Plain):
    """None means no limit. memory_bytes covers weights + KV cache + scratch at the chosen context.

    tokens_per_s and quality (exp(-mean KL), 0 to 1) are floors; the others are ceilings.
    """

    memory_bytes: int | None = None
    storage_bytes: int | None = None
    latency_s: float | None = None
    tokens_per_s: float | None = None
    joules: float | None = None
    link_bytes: int | None = None
    quality: float | None = None

    def __post_init__(self) -> None:
        for name, limit in self.limits().items():
            if not limit > 0:
                raise InvalidValueError(f"budget: {name} is a positive number; given {limit}")
        if self.quality is not None and self.quality > 1:
            raise InvalidValueError(f"budget: quality is exp(-mean KL), at most 1; given {self.quality}")

    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def check(self, report: Report) -> tuple[Violation, ...]:
        """The limits that the report's quantities of the same names do not keep. What is not reported is not kept."""
        quantities = {q.name: q.value for q in report.quantities}
        violations = []
        for name, limit in self.limits().items():
            value = quantities.get(name)
            if not isinstance(value, int | float):
                violations.append(Violation(name, limit))
            elif not (value >= limit if name in _AT_LEAST else value <= limit):  # NaN keeps no limit
                violations.append(Violation(name, limit, float(value)))
        return tuple(violations)

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={value:g}' for name, value in self.limits().items())})"
