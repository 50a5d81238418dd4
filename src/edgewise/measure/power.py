"""Energy from a power trace and an event log, as MELT's report scripts do it.

Laskaridis et al., "MELTing point: Mobile Evaluation of Language Transformers", MobiCom 2024, arXiv:2403.12844, and
its report scripts. Samples (t_k, I_k, V_k) with start < t_k < end; P_k = I_k V_k; dt_k = t_k - t_{k-1}, the first 0;
energy sum P_k dt_k, charge sum I_k dt_k: a right Riemann sum. Idle power is not subtracted.

Differs from the scripts: SI units (J and C instead of mWh and mAh); energy is also split by state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError
from edgewise.measure.events import Event, EventLog

__all__ = ["PowerTrace", "TurnEnergy", "energy_of_turns"]

Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PowerTrace:
    """Samples of a meter: times ascending, (n,) seconds; current, (n,) A; voltage, (n,) V."""

    times_s: Float64
    current_a: Float64
    voltage_v: Float64

    def __post_init__(self) -> None:
        shapes = {np.shape(a) for a in (self.times_s, self.current_a, self.voltage_v)}
        if len(shapes) != 1 or len(np.shape(self.times_s)) != 1:
            raise InvalidValueError(f"a trace is three arrays of one length; given shapes {sorted(map(str, shapes))}")
        if not all(np.isfinite(a).all() for a in (self.times_s, self.current_a, self.voltage_v)):
            raise InvalidValueError("a trace has finite samples; one is not")
        if (np.diff(self.times_s) < 0).any():
            raise InvalidValueError("times of a trace ascend; two are out of order")

    @property
    def power_w(self) -> Float64:
        product: Float64 = self.current_a * self.voltage_v
        return product

    def energy_j(self, start_s: float = -np.inf, end_s: float = np.inf) -> float:
        """Of the samples strictly between."""
        return self._integral(self.power_w, start_s, end_s)

    def charge_c(self, start_s: float = -np.inf, end_s: float = np.inf) -> float:
        """Coulombs; 3.6 of them are one mAh."""
        return self._integral(np.asarray(self.current_a, np.float64), start_s, end_s)

    def _integral(self, values: Float64, start_s: float, end_s: float) -> float:
        inside = (self.times_s > start_s) & (self.times_s < end_s)
        times = self.times_s[inside]
        return float((values[inside][1:] * np.diff(times)).sum())


@dataclass(frozen=True)
class TurnEnergy:
    """One turn of a talk. joules: prompt and answer together. tokens: of the answer."""

    turn: int
    joules: float
    prefill_j: float
    decode_j: float
    prompt_tokens: int
    tokens: int

    @property
    def joules_per_token(self) -> float:
        """The scripts' definition: everything, by tokens of the answer. Short answers to long prompts look costly."""
        return self.joules / self.tokens

    @property
    def split_j(self) -> tuple[float, float]:
        """Joules per prompt token of prefill and per answer token of decode."""
        return self.prefill_j / max(self.prompt_tokens, 1), self.decode_j / max(self.tokens, 1)


def energy_of_turns(trace: PowerTrace, log: EventLog, *, states: tuple[str, str] = ("prefill", "decode"),
                    also: Iterable[str] = ()) -> tuple[TurnEnergy, ...]:
    """Energy of each turn that made tokens. also: further states whose energy is put on the first turn after them.

    Loading a model is left out unless `also` names it: it belongs to no answer.
    """
    reads, makes = ({e.turn: e for e in log.of(state)} for state in states)
    extra = sorted(log.of(*also), key=lambda e: e.start_s)
    found = []
    for turn in sorted(makes):
        made, read = makes[turn], reads.get(turn)
        if not made.tokens:
            continue
        before = [e for e in extra if e.end_s <= (read or made).start_s]
        extra = [e for e in extra if e not in before]
        prefill = 0.0 if read is None else _energy(trace, read)
        decode = _energy(trace, made)
        found.append(TurnEnergy(turn, prefill + decode + sum(_energy(trace, e) for e in before), prefill, decode,
                                0 if read is None else read.tokens, made.tokens))
    return tuple(found)


def _energy(trace: PowerTrace, event: Event) -> float:
    return trace.energy_j(event.start_s, event.end_s)
