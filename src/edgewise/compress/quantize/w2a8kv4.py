"""AccLLM's compression: two of four weights kept, these in few bits, activations in eight, keys and values in four.

Liang et al., "AccLLM: Accelerating Long-Context LLM Inference Via Algorithm-Hardware Co-Design", 2025,
arXiv:2505.03745 (abstract: 2:4 pruning, Lambda-shaped attention, W2A8KV4).

The mask comes first (compress/prune/semi_structured.py) and stays. The kept weights of each `group` of inputs share a
scale and a minimum, w = s c + m with c in 0 .. 3; columns are rounded from left to right, and the error of each, of the
pruned weights too, is made up for by those after it (GPTQ with the mask frozen, same H). Kept values and their places
are stored, nothing for the others: a format needs no exact zero.

What is not of weights runs in the engine: inputs of linears in int8 (activations "int8"), keys and values in groups
of four bits (kv "int4"), Lambda-shaped attention (attention "sink=4,window=..."). The order is the paper's: prune,
quantise with the mask, then activations and cache, then recovery (train/sparse_recovery.py).

A group's grid is chosen when its first column is reached, from the weights as the removal of the pruned ones within the
group will leave them: rows of few inputs lose much to that.

Differs from the paper: its score, grids and recovery are not public; SparseGPT, GPTQ with searched grids and
distillation stand for them. Eight bits are per 32 inputs of a token, not per token: what the engine's kernels read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.prune.semi_structured import (
    KEPT,
    magnitude,
    places_of,
    pruned_of,
    sparsegpt,
    sweep,
    wanda,
)
from edgewise.compress.quantize.changes import KEPT as STAYS
from edgewise.compress.quantize.gptq import inverse_factor
from edgewise.compress.quantize.ranges import Grid, assembled, codes_of, grid_of, values_of
from edgewise.compress.quantize.rtn import check
from edgewise.compress.walk import Change, Group
from edgewise.core.errors import InvalidValueError, notice
from edgewise.core.numbers import QuantFormat
from edgewise.core.stats import InputStats
from edgewise.core.storage import QuantizedTensor, Sparse, Stored, rows_of

__all__ = ["AccLlm", "accllm", "mask_of", "quantize_kept"]

Float32 = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class AccLlm:
    """score: which two of four stay. compensate: errors go on to later columns. search: for the grid of each group."""

    score: Literal["sparsegpt", "wanda", "magnitude"] = "sparsegpt"
    compensate: bool = True
    search: bool = True
    damp: float = 0.01  # fraction of mean(diag H); the card
    block: int = 32     # columns per lazy update; changes no result

    def __post_init__(self) -> None:
        if self.score not in ("sparsegpt", "wanda", "magnitude"):
            raise InvalidValueError(f"score is sparsegpt, wanda or magnitude; given {self.score!r}")
        if not self.damp >= 0 or self.block < 4 or self.block % 4:
            raise InvalidValueError(f"damp is at least 0 and a block a multiple of four columns; given {self.damp} and "
                                    f"{self.block}")


def mask_of(weight: Float32, hessian: NDArray[np.floating] | None, config: AccLlm) -> tuple[Float32, Mask]:
    """(the weight with zeros where it is pruned, the mask), by the score of the settings."""
    if config.score == "magnitude":
        mask = pruned_of(magnitude(weight))
    elif hessian is None:
        raise InvalidValueError(f"{config.score} needs the inputs' statistics; calibrate, or take magnitude")
    elif config.score == "sparsegpt":
        return sparsegpt(weight, hessian, damp=config.damp, block=config.block)
    else:
        mask = pruned_of(wanda(weight, np.sqrt(np.diag(hessian))))
    return np.where(mask, np.float32(0), weight), mask


def quantize_kept(weight: Float32, mask: Mask, fmt: QuantFormat, hessian: NDArray[np.floating] | None = None,
                  config: AccLlm = AccLlm()) -> Sparse:
    """weight: (out, in) as it was, or as pruned; mask: (out, in), True where pruned; fmt: its groups count inputs of
    the dense weight. hessian: (in, in); None: each column by itself. Pure.

    Raises InvalidValueError for a mask that is not two of four, or a format whose groups do not fit.
    """
    weight = np.asarray(weight, np.float32)
    check(weight)
    if mask.shape != weight.shape or mask.dtype != np.bool_:
        raise InvalidValueError(f"a mask is {weight.shape} of bool; given {mask.shape} of {mask.dtype}")
    places = places_of(mask)
    rows, size = weight.shape
    group, kept_fmt = _group_of(fmt, size)
    pruned = np.ascontiguousarray(mask.T)
    columns = np.ascontiguousarray(np.where(mask, 0, weight).T if hessian is None else weight.T, np.float64)
    factor = np.eye(size) if hessian is None else inverse_factor(hessian, config.damp)
    cost = 1 / np.diag(factor) ** 2
    codes: NDArray[np.generic] | None = None
    grids: list[Grid] = []

    def decide(column: int) -> NDArray[np.floating]:
        nonlocal codes
        if column % group == 0:  # block divides group: all errors before have arrived
            stop = min(column + group, size)
            kept = np.argsort(pruned[column:stop], axis=0, kind="stable")[:(stop - column) // 4 * KEPT]
            ahead = columns[column:stop]
            if hessian is not None:
                ahead = _compensated(ahead, factor[column:stop, column:stop], pruned[column:stop])
            values = np.take_along_axis(ahead, kept, axis=0)
            weights = (cost[column:stop] / cost[column:stop].mean())[kept] if config.search else None
            grids.append(grid_of(values.astype(np.float32), kept_fmt,
                                 None if weights is None else weights.astype(np.float32), search=config.search))
        code = codes_of(columns[column].astype(np.float32)[None], grids[-1], kept_fmt)[0]
        if codes is None:
            codes = np.empty((size, rows), code.dtype)
        codes[column] = code
        return np.where(pruned[column], 0.0, values_of(code[None], grids[-1], kept_fmt)[0])

    block = min(config.block, group)
    sweep(columns, factor, decide, block if group % block == 0 else 4)
    assert codes is not None
    at = (np.arange(places.shape[1]) // KEPT * 4)[None] + places
    kept_codes = np.take_along_axis(np.ascontiguousarray(codes.T), at.astype(np.int64), axis=1)
    grid = Grid(np.stack([each.scale for each in grids], axis=1).reshape(-1),
                None if grids[0].offset is None else np.stack([each.shift for each in grids], axis=1).reshape(-1))
    values: QuantizedTensor = assembled(kept_codes, grid, kept_fmt)
    return Sparse("n_m", places, values, (rows, size), (KEPT, 4))


def _compensated(columns: NDArray[np.float64], factor: NDArray[np.float64], pruned: Mask) -> NDArray[np.float64]:
    """A group's columns (inputs, out) once what is pruned of it is made up for: what its grid will meet."""
    ahead = columns.copy()

    def decide(column: int) -> NDArray[np.floating]:
        return np.where(pruned[column], 0.0, ahead[column])

    sweep(ahead, factor, decide, len(ahead))
    return ahead


def _group_of(fmt: QuantFormat, size: int) -> tuple[int, QuantFormat]:
    """Inputs to a group, and the format of the kept values alone, half as many to a group."""
    if fmt.n_m is not None or fmt.prefixes or isinstance(fmt.scale, QuantFormat) or fmt.element.kind != "int":
        raise InvalidValueError(f"kept weights take a format of plain integers such as int2/g64/fp16/min; given {fmt}")
    if fmt.granularity.kind == "axis":
        return size, fmt
    if fmt.granularity.kind != "group" or fmt.granularity.group % 4 or size % fmt.granularity.group:
        raise InvalidValueError(f"groups are a multiple of four inputs and divide {size}, or a row; given {fmt}")
    group = fmt.granularity.group
    return group, replace(fmt, granularity=replace(fmt.granularity, group=group // 2))


def accllm(fmt: QuantFormat, config: AccLlm) -> Change:
    """Prune and quantise. The linears of a group share the Hessian and are worked on as one matrix."""
    def change(group: Group, tensors: Mapping[str, Stored], stats: InputStats | None) -> dict[str, Stored]:
        names = [name for name in group.names if not STAYS.search(name)]
        if stats is None or stats.gram is None:
            notice("fallback", f"nothing is known about the inputs of {group.names[0]}; the largest weights of each "
                   "four stay, rounded to nearest", where="quantize")
            plain = replace(config, score="magnitude", compensate=False)
            return {name: _both(np.asarray(tensors[name].dense(), np.float32), None, fmt, plain) for name in names}
        weights = [np.asarray(tensors[name].dense(), np.float32) for name in names]
        made = _both(np.concatenate(weights), stats.gram, fmt, config)
        ends = np.cumsum([0, *map(len, weights)])
        return {name: rows_of(made, slice(int(start), int(stop)))
                for name, start, stop in zip(names, ends[:-1], ends[1:], strict=True)}

    return change


def _both(weight: Float32, gram: NDArray[np.float64] | None, fmt: QuantFormat, config: AccLlm) -> Sparse:
    pruned, mask = mask_of(weight, gram, config)
    if config.compensate and gram is not None:
        return quantize_kept(weight, mask, fmt, gram, config)
    return quantize_kept(pruned, mask, fmt, None, config)
