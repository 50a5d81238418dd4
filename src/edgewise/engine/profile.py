"""Where the time of a decode step or of a prompt goes: each operator, beside what it reads and computes.

The session counts it itself while it runs (native/include/edgewise/profile.h): the seconds of the calling thread, each
moment belonging to one operator, so that the parts add up to the whole. Its results do not change by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgewise.core.errors import InvalidValueError
from edgewise.core.report import Table
from edgewise.core.workload import Op
from edgewise.engine.model import LanguageModel, native_errors
from edgewise.engine.plan import Experts, Plan
from edgewise.engine.workload import workload_of
from edgewise.native import _core  # type: ignore[attr-defined]

__all__ = ["LINEARS", "OperatorTime", "Profile", "profile", "profile_table"]

LINEARS = ("qkv", "out", "gate_up", "down", "experts", "head")
"""Operators that multiply weights. The others: embed; inputs (norms, and rounding what linears read); attention; cross
(cross-attention with its linears); sampling; wait (for other threads); other (what lies between)."""


@dataclass(frozen=True)
class OperatorTime:
    """runs: linears, or attentions, of every layer together. moved_bytes: weights, keys and values it reads.
    operations: two per multiply-add, of number_format."""

    name: str
    runs: int
    seconds: float
    moved_bytes: int = 0
    operations: int = 0
    number_format: str = ""


@dataclass(frozen=True)
class Profile:
    """Of one decode step, or of one prompt. step_s: the whole of it, which is the sum of its operators."""

    operators: tuple[OperatorTime, ...]
    step_s: float

    @property
    def linears(self) -> tuple[OperatorTime, ...]:
        """Those that multiply weights."""
        return tuple(one for one in self.operators if one.name in LINEARS)

    @property
    def linear_share(self) -> float:
        """Of the whole."""
        return sum(one.seconds for one in self.linears) / self.step_s


def profile(model: LanguageModel, plan: Plan, *, phase: Literal["decode", "prefill"] = "decode", tokens: int = 16,
            depth: int = 64, repeats: int = 5, threads: int = 1, int8: bool | None = None,
            session: Any = None) -> Profile:
    """The run of the median time among `repeats`, of `tokens` fed one by one or read at once after `depth` others.

    plan: of the model's checkpoint. session: one to run on; by default one of its own with so many threads.
    int8: whether the linears of the layers multiply integers; by default as the plan says.
    """
    if model.kind != "decoder":
        raise InvalidValueError(f"a profile is of a decoder; this model is an {model.kind}")
    if repeats < 1 or tokens < 1 or depth < 0 or depth + tokens + 2 > model.context:
        raise InvalidValueError(f"a profile takes at least one repeat and one token, within a context of "
                                f"{model.context}; given {repeats} repeats of {tokens} tokens after {depth}")
    with native_errors():
        session = session or _core.Session(model.native, model.kv, depth + tokens + 2, 1, threads,
                                           int(model.session.batch), tuning=model.tuning.native)
        runs = sorted((_run(session, phase, tokens, depth, model.vocab) for _ in range(repeats + 1)),
                      key=lambda parts: sum(parts.values()))
    steps = tokens if phase == "decode" else 1
    middle = depth + tokens // 2 if phase == "decode" else depth  # a step halfway stands for all of them
    load = workload_of(plan, model.packed.matrices, tokens=1 if phase == "decode" else tokens, depth=middle,
                       batch=int(session.batch), kv=model.kv, int8=int8)
    return _joined(runs[repeats // 2], steps, load.ops, _operators_of(plan))


def _run(session: Any, phase: str, tokens: int, depth: int, vocab: int) -> dict[str, float]:
    stream = np.random.default_rng(0).integers(0, vocab, depth + tokens + 1).astype(np.int32)
    session.set_profile(False)
    session.truncate(0, 0)
    if depth:
        session.prefill(0, stream[:depth])
    sampler = _core.Sampler()
    if phase == "decode":  # the token sampled last is fed when the next is asked for
        session.prefill(0, stream[depth:depth + 1])
        session.generate(0, sampler, 1, [])
    session.set_profile(True)
    if phase == "decode":
        session.generate(0, sampler, tokens, [])
    else:
        session.prefill(0, stream[depth:depth + tokens])
    parts: dict[str, float] = session.profile()
    session.set_profile(False)
    session.truncate(0, 0)
    return parts


def _operators_of(plan: Plan) -> dict[str, str]:
    """Name of a linear -> operator."""
    found: dict[str, str] = {}
    for layer in plan.layers:
        attention, ffn = layer.attention, layer.feed_forward
        if attention is not None:
            found |= dict.fromkeys((attention.q.name, attention.k.name, attention.v.name), "qkv")
            found[attention.o.name] = "out"
        if isinstance(ffn, Experts):
            found[ffn.router.name] = "experts"
        for part in layer.feed_forwards:
            routed = isinstance(ffn, Experts)
            found |= {one.name: "experts" if routed else "gate_up" for one in (part.gate, part.up) if one is not None}
            found[part.down.name] = "experts" if routed else "down"
    if plan.head is not None:
        found[plan.head.name] = "head"
    return found


def _joined(parts: Mapping[str, float], steps: int, ops: tuple[Op, ...], operators: Mapping[str, str]) -> Profile:
    """Seconds by operator with what the operator does. Waiting and the like do nothing."""
    loads: dict[str, list[Op]] = {}
    for op in ops:
        name = {"embedding": "embed", "attention": "attention"}.get(op.kind) or operators.get(op.name, "cross")
        loads.setdefault(name, []).append(op)
    times = tuple(
        OperatorTime(name, len(load), seconds / steps, sum(op.weight_bytes + op.in_bytes + op.out_bytes for op in load),
                     2 * sum(op.macs for op in load), next((op.number_format for op in load if op.macs), ""))
        for name, seconds in parts.items() if seconds > 0 for load in [loads.get(name, [])])
    return Profile(times, sum(one.seconds for one in times))


def profile_table(found: Profile, title: str, *, read_bytes_per_s: float | None = None,
                  int8_ops_per_s: float | None = None, fp32_ops_per_s: float | None = None) -> Table:
    """Operators with share, GB/s, Gop/s and the share of the nearer roof, of limits that are known."""
    rows = []
    for one in sorted(found.operators, key=lambda one: -one.seconds):
        peak = int8_ops_per_s if one.number_format == "int8" else fp32_ops_per_s
        shares = [amount / one.seconds / limit for amount, limit in ((one.moved_bytes, read_bytes_per_s),
                                                                     (one.operations, peak)) if amount and limit]
        rows.append((one.name, one.runs or None, one.seconds * 1e3, one.seconds / found.step_s,
                     one.moved_bytes / one.seconds / 1e9 if one.moved_bytes else None,
                     one.operations / one.seconds / 1e9 if one.operations else None, max(shares, default=None)))
    rows.append(("whole", None, found.step_s * 1e3, 1.0, sum(one.moved_bytes for one in found.operators)
                 / found.step_s / 1e9, sum(one.operations for one in found.operators) / found.step_s / 1e9, None))
    return Table(title, ("operator", "runs", "ms", "share", "GB/s", "Gop/s", "share of roof"), tuple(rows))
