"""Time per operator of a decode step: each linear by its own kernel, beside the step as a whole.

The linears of every layer are run one after another with one thread, as a decode step does: a weight is read from
memory, not from a cache that the run before filled, as long as the model is larger than the cache. What a call costs
without work is taken off.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgewise.core.errors import InvalidValueError
from edgewise.core.storage import Dense
from edgewise.engine.model import LanguageModel, native_errors
from edgewise.engine.packing import pack_one, recipe_of
from edgewise.engine.plan import Experts, Layer, Linear, Plan
from edgewise.native import _core  # type: ignore[attr-defined]

__all__ = ["OperatorTime", "Profile", "profile"]


@dataclass(frozen=True)
class OperatorTime:
    """name: q, k, v, o, gate, up, down or head; of every layer together."""

    name: str
    runs: int
    seconds: float
    weight_bytes: int


@dataclass(frozen=True)
class Profile:
    """linears: each by itself. step_s: a whole step, measured in between."""

    linears: tuple[OperatorTime, ...]
    step_s: float

    @property
    def linear_share(self) -> float:
        """Of the step. Above 1 where linears one by one take longer than inside a pass, which hides their start."""
        return sum(one.seconds for one in self.linears) / self.step_s


def profile(model: LanguageModel, plan: Plan, *, depth: int = 64, repeats: int = 5, int8: bool | None = None,
            ) -> Profile:
    """Medians over `repeats` steps after `depth` tokens of context. plan: of the model's checkpoint.

    int8: whether the linears of the layers multiply integers; by default as the plan says.
    """
    if model.kind != "decoder" or any(isinstance(layer.feed_forward, Experts) for layer in plan.layers):
        raise InvalidValueError("a profile is of a decoder with dense feed-forwards")
    if repeats < 1 or not 1 <= depth <= model.context - repeats - 1:
        raise InvalidValueError(f"a profile takes at least one repeat, within a context of {model.context}; given "
                                f"{repeats} after {depth} tokens")
    native = _core.Session(model.native, model.kv, model.context, 1, 1, int(model.session.batch))
    parts = [(name, linear) for layer in plan.layers for name, linear in _linears(layer)]
    calls = [(name, _call(model, linear, int8), model.packed.matrices[linear.key].nbytes) for name, linear in parts]
    if plan.head is not None:
        key = plan.embedding.key if plan.head.weight is plan.embedding.weight else plan.head.key
        calls.append(("head", _call(model, plan.head, None, key), model.packed.matrices[key].nbytes))
    tokens = np.zeros(depth, np.int32)
    overhead = _overhead(model.tier)
    steps: list[float] = []
    times: dict[str, list[float]] = {name: [] for name, _, _ in calls}
    with native_errors():
        native.prefill(0, tokens)
        for _ in range(repeats):
            steps.append(_seconds(lambda: native.prefill(0, tokens[:1])))
            round_s: dict[str, float] = dict.fromkeys(times, 0.0)
            for name, call, _ in calls:
                round_s[name] += max(_seconds(call) - overhead, 0.0)
            for name, seconds in round_s.items():
                times[name].append(seconds)
    return Profile(tuple(
        OperatorTime(name, sum(n == name for n, _, _ in calls), statistics.median(values),
                     sum(size for n, _, size in calls if n == name)) for name, values in times.items()),
        statistics.median(steps))


def _overhead(tier: str) -> float:
    """Seconds that a call takes when there is next to nothing to multiply."""
    matrix = pack_one(recipe_of("nothing", Dense(np.zeros((16, 32), np.float32))))
    x, y = np.ones((1, 32), np.float32), np.empty((1, 16), np.float32)
    return statistics.median(_seconds(lambda: _core.matmul(matrix, x, y, tier, False)) for _ in range(101))


def _linears(layer: Layer) -> list[tuple[str, Linear]]:
    attention, (ffn,) = layer.attention, layer.feed_forwards
    named = [("q", attention.q), ("k", attention.k), ("v", attention.v), ("o", attention.o), ("gate", ffn.gate),
             ("up", ffn.up), ("down", ffn.down)]
    return [(name, linear) for name, linear in named if linear is not None]


def _call(model: LanguageModel, linear: Linear, int8: bool | None, key: str | None = None) -> Callable[[], Any]:
    matrix = model.packed.matrices[key or linear.key]
    x, y = np.ones((1, matrix.cols), np.float32), np.empty((1, matrix.rows), np.float32)
    rounded = linear.activation == "int8" if int8 is None else int8
    return lambda: _core.matmul(matrix, x, y, model.tier, rounded)


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
