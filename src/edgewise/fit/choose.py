"""One configuration under a budget: formats, KV format and context.

Context: as asked for, else at least 1024 positions (or the model's own, where it has fewer) and then as many as the
memory left over holds. Only where no formats fit beside 1024 positions is the floor lowered, to 512 and to 256.
Among what fits, the least predicted divergence wins; with a quality alone, the least memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgewise.core.budget import Budget
from edgewise.core.errors import BudgetError, notice
from edgewise.engine.memory import kv_bytes, scratch_bytes
from edgewise.engine.plan import Plan
from edgewise.fit.allocate import Allocation, Points

__all__ = ["BATCH", "Choice", "Space", "choose", "context_limit", "front_with_kv", "smallest"]

FLOORS = (1024, 512, 256)
"""Positions that a context keeps before weights are given more memory."""
BATCH = 64
"""Tokens per pass that scratch memory is planned for: at half this, reading a prompt is markedly slower."""
_SMALLEST_BATCH = 16
_SHOWN = 400


@dataclass(frozen=True)
class Choice:
    """A configuration. memory_bytes: weights + KV cache + scratch at `context`. kl: predicted, in nats."""

    allocation: Allocation
    kv: str
    context: int
    memory_bytes: int
    kl: float


@dataclass(frozen=True, eq=False)
class Space:
    """What may be chosen. kvs: KV formats with their divergence. other_bytes: of a folder besides the weights.

    measured: divergences are; else they are all zero, to see whether anything fits at all.
    """

    plan: Plan
    fronts: Sequence[Points]
    kvs: Mapping[str, float]
    threads: int
    other_bytes: int
    measured: bool = True

    def overhead(self, kv: str, context: int, batch: int = BATCH) -> int:
        """KV cache and scratch, in bytes."""
        return (kv_bytes(self.plan, kv, context, batch=batch)
                + scratch_bytes(self.plan, context, batch, self.threads, kv=kv))



def context_limit(plan: Plan) -> int:
    """Positions that the model has."""
    if plan.position_embedding is None:
        return plan.context
    return min(plan.context, len(plan.position_embedding) - plan.position_offset)


def choose(space: Space, budget: Budget, context: int | None, *, kl_limit: float | None = None) -> Choice:
    """The best configuration. kl_limit: of the predicted divergence, when quality leads. Raises BudgetError."""
    limit = context_limit(space.plan)
    if context is not None and context > limit:
        notice("clamp", f"the model has {limit} positions; the context is {limit}, not {context}", where="context")
    if context is not None:
        floors: tuple[int, ...] = (min(context, limit),)
    elif budget.memory_bytes is None:
        floors = (limit,)
    else:
        floors = tuple(dict.fromkeys(min(floor, limit) for floor in FLOORS))
    for floor in floors:
        for batch in (BATCH, _SMALLEST_BATCH):
            found = _best(space, budget, floor, batch, kl_limit)
            if found is not None:
                if floor < floors[0]:
                    notice("clamp", f"the context is {floor} positions: no formats fit beside {floors[0]}",
                           where="fit")
                return found if context is not None else _widened(space, budget, found, limit, batch)
    raise _impossible(space, budget, floors[-1], kl_limit)


def _best(space: Space, budget: Budget, context: int, batch: int, kl_limit: float | None) -> Choice | None:
    """By divergence; with a divergence allowed, by memory."""
    found: Choice | None = None
    for kv, kv_kl in space.kvs.items():
        overhead = space.overhead(kv, context, batch)
        for front in space.fronts:
            total, kl = front.packed + overhead, front.kl + kv_kl
            fits = np.ones(len(front), bool)
            if budget.memory_bytes is not None:
                fits &= total <= budget.memory_bytes
            if budget.storage_bytes is not None:
                fits &= front.stored + space.other_bytes <= budget.storage_bytes
            if kl_limit is not None:
                fits &= kl <= kl_limit
            places = np.flatnonzero(fits)
            if not len(places):
                continue
            order = (kl, total) if kl_limit is not None else (total, kl)  # lexsort: the last counts most
            best = int(places[np.lexsort(tuple(each[places] for each in order))[0]])
            value = (int(total[best]), float(kl[best]))
            if found is None or ((value < (found.memory_bytes, found.kl)) if kl_limit is not None else
                                 (value[::-1] < (found.kl, found.memory_bytes))):
                found = Choice(front[best], kv, context, *value)
    return found


def _widened(space: Space, budget: Budget, choice: Choice, limit: int, batch: int) -> Choice:
    """The same with as much context as the memory that is left over holds."""
    if budget.memory_bytes is None:
        return choice
    low, high = choice.context, limit
    while low < high:
        middle = (low + high + 1) // 2
        fits = choice.allocation.packed_bytes + space.overhead(choice.kv, middle, batch) <= budget.memory_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    if low < limit:
        notice("info", f"the context is {low} of the model's {limit} positions, to stay within "
               f"{budget.memory_bytes / 1e6:.1f} MB; --context chooses another", where="fit")
    return Choice(choice.allocation, choice.kv, low,
                  choice.allocation.packed_bytes + space.overhead(choice.kv, low, batch), choice.kl)


def smallest(space: Space, context: int) -> Choice:
    """The least memory of all, at a context."""
    kv = min(space.kvs, key=lambda kv: kv_bytes(space.plan, kv, context))
    point = min((front[int(front.packed.argmin())] for front in space.fronts), key=lambda point: point.packed_bytes)
    return Choice(point, kv, context, point.packed_bytes + space.overhead(kv, context, _SMALLEST_BATCH),
                  point.kl + space.kvs[kv])


def _impossible(space: Space, budget: Budget, context: int, kl_limit: float | None) -> BudgetError:
    least = smallest(space, context)
    parts = [(f"the least memory is {least.memory_bytes / 1e6:.1f} MB (weights "
              f"{least.allocation.packed_bytes / 1e6:.1f} MB, a context of {context} positions with KV {least.kv}"
              f"{f'; predicted quality {np.exp(-least.kl):.3f}' if space.measured else ''})")]
    disk = min(int(front.stored.min()) for front in space.fronts) + space.other_bytes
    if budget.storage_bytes is not None:
        parts.append(f"the least storage is {disk / 1e6:.1f} MB")
    if kl_limit is not None:
        parts.append("a quality that high needs more of either")
    return BudgetError(f"{budget!r} cannot be met: {'; '.join(parts)}. Give more, a shorter --context, or start from a "
                       "smaller model")


def front_with_kv(space: Space, context: int) -> list[Choice]:
    """Memory at a context against predicted divergence, from the largest to the smallest, nothing beaten by another.

    At most so many points as a plot can show, both ends among them.
    """
    front, kvs = space.fronts[0], list(space.kvs.items())
    memory = np.concatenate([front.packed + space.overhead(kv, context) for kv, _ in kvs])
    kl = np.concatenate([front.kl + kv_kl for _, kv_kl in kvs])
    order = np.lexsort((kl, memory))
    best = np.minimum.accumulate(kl[order])
    kept = order[np.concatenate([[True], best[1:] < best[:-1]])][::-1]
    if len(kept) > _SHOWN:
        kept = kept[np.unique(np.rint(np.linspace(0, len(kept) - 1, _SHOWN)).astype(np.int64))]
    return [Choice(front[int(place % len(front))], kvs[place // len(front)][0], context, int(memory[place]),
                   float(kl[place])) for place in kept]
