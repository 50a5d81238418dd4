"""Sustained speed under a thermal limit: a body of one heat capacity and a governor that cuts the clock.

C dT/dt = P - (T - T_ambient) / R. Power follows the clock: P = idle + dynamic * clock. Above `limit_c` the governor
multiplies the clock by `cut` each step, down to `least`; below the limit less `margin_c` it raises it again.
At a constant P the temperature is T_ambient + P R (1 - exp(-t / (R C))), which the tests hold the steps against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgewise.core.errors import InvalidValueError

__all__ = ["Body", "Sustained", "sustain"]


@dataclass(frozen=True)
class Body:
    """A phone-like body. Values are ours, of the order of MELT's phones (13.8 W sustained, 48 C at the surface)."""

    capacity_j_per_k: float = 60.0
    resistance_k_per_w: float = 4.0
    ambient_c: float = 25.0
    limit_c: float = 45.0
    margin_c: float = 2.0
    idle_w: float = 1.0
    dynamic_w: float = 9.0
    cut: float = 0.9
    least: float = 0.3

    def __post_init__(self) -> None:
        if not (self.capacity_j_per_k > 0 and self.resistance_k_per_w > 0 and 0 < self.cut < 1
                and 0 < self.least <= 1):
            raise InvalidValueError(f"capacity and resistance are positive, cut and least within 0 to 1; given {self}")


@dataclass(frozen=True)
class Sustained:
    """Of each run: its mean clock (1 is full speed) and the temperature at its end."""

    clocks: tuple[float, ...]
    celsius: tuple[float, ...]

    @property
    def knee(self) -> int | None:
        """The first run that is slower than 95 % of the first; None where none is."""
        return next((i for i, clock in enumerate(self.clocks) if clock < 0.95 * self.clocks[0]), None)


def sustain(work: Sequence[float], body: Body | None = None, *, cool_s: float = 0.0, step_s: float = 0.1) -> Sustained:
    """Runs one after another. work: seconds each takes at full clock; cool_s: idle between them."""
    body = body or Body()
    celsius, clock = body.ambient_c, 1.0
    clocks, ends = [], []

    def step(power_w: float, seconds: float) -> None:
        nonlocal celsius
        if math.isinf(body.capacity_j_per_k):
            return
        rest = body.ambient_c + power_w * body.resistance_k_per_w  # where it would end up
        celsius = rest + (celsius - rest) * math.exp(-seconds / (body.resistance_k_per_w * body.capacity_j_per_k))

    for seconds in work:
        left, spent = seconds, 0.0
        while left > 1e-9:
            time = min(step_s, left / clock)
            step(body.idle_w + body.dynamic_w * clock, time)
            left, spent = left - time * clock, spent + time
            if celsius > body.limit_c:
                clock = max(body.least, clock * body.cut)
            elif celsius < body.limit_c - body.margin_c:
                clock = min(1.0, clock / body.cut)
        clocks.append(seconds / spent)
        ends.append(celsius)
        if cool_s:
            step(body.idle_w, cool_s)
            if celsius < body.limit_c - body.margin_c:
                clock = 1.0
    return Sustained(tuple(clocks), tuple(ends))
