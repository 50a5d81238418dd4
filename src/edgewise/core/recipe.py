"""A published system as a thin recipe: what it claims, at which scales we try it, and where each choice comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgewise.core.errors import InvalidValueError
from edgewise.core.plain import Plain
from edgewise.core.report import Report

__all__ = ["Choice", "Claim", "Recipe", "Run", "Scale"]

Scale = Literal["smoke", "small", "paper"]
Choice = Literal["paper", "code", "abstract", "inferred"]
Run = Callable[[Mapping[str, Any], int, bool], Report]


@dataclass(frozen=True)
class Claim(Plain):
    """What a paper says, where it says it, and what would agree with it.

    kind equal: within `tolerance` of `value`; at-least, at-most: `value` less or plus `tolerance` is the bound;
    order: `metric` of a comparison, true when the first is the better one by `tolerance`;
    trend: the sign of `value` is the direction, a change beyond `tolerance` agrees.
    ablation: about what happens with the mechanism switched off; only a run with ablation measures it.
    why_not: what we take to be the cause where it does not hold here, and how we know; stands beside such a verdict.
    """

    text: str
    where: str
    metric: str
    value: float
    kind: Literal["equal", "at-least", "at-most", "order", "trend"] = "equal"
    tolerance: float = 0.0
    ablation: bool = False
    why_not: str = ""

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise InvalidValueError(f"claim {self.text!r}: tolerance is not negative; given {self.tolerance}")
        if self.kind == "trend" and self.value == 0:
            raise InvalidValueError(f"claim {self.text!r}: a trend needs a direction; given value 0")

    def agrees(self, measured: float) -> bool:
        """Whether a measured value agrees. For order: by how much the first is better. For trend: the change."""
        if self.kind == "equal":
            return abs(measured - self.value) <= self.tolerance
        if self.kind == "at-least":
            return measured >= self.value - self.tolerance
        if self.kind == "at-most":
            return measured <= self.value + self.tolerance
        if self.kind == "order":
            return measured > self.tolerance
        return measured * (1 if self.value > 0 else -1) > self.tolerance


@dataclass(frozen=True, repr=False)
class Recipe(Plain):
    """sources: for each choice by name, whether the paper, its code or its abstract says so, or we inferred it.

    scales: the settings of each scale; "seeds" among them is how many seeds it takes, 1 if not said.
    run: (settings of the scale, seed, ablate) -> Report whose quantities are the claims' metrics; one that cannot be
    measured here is None, and a notice says why. ablate: measure with the mechanism switched off too.
    """

    paper: str
    claims: tuple[Claim, ...]
    scales: Mapping[str, Mapping[str, Any]]
    sources: Mapping[str, Choice] = field(default_factory=dict)
    seed: int = 0
    run: Run | None = field(default=None, metadata={"plain": False}, compare=False)
    title: str = ""

    def __repr__(self) -> str:
        return f"Recipe({self.paper}: {len(self.claims)} claims, {', '.join(self.scales)})"
