"""Single weights set to zero, at any share or as n of every m: by magnitude, Wanda, or SparseGPT.

Scores of a weight W (out, in) with inputs X (tokens, in), and what they are compared with:
    magnitude   |W_ij|               the whole matrix (Han et al., NeurIPS 2015, arXiv:1506.02626)
    Wanda       |W_ij| ||X_j||_2     its row (Sun et al., ICLR 2024, arXiv:2306.11695, equation 1 and section 3)
    SparseGPT   W_ij^2 / [H^-1]_jj   all rows of its block of columns (Frantar and Alistarh, ICML 2023,
                                     arXiv:2301.00774, equation 3 and Algorithm 1), as errors before it left them
As n of every m, each run of m weights of a row keeps n, whatever the score.

SparseGPT goes from left to right, decides for `block` columns at a time (B_s of Algorithm 1), and makes up for what a
pruned weight leaves by the columns after it; see compress/quantize/gptq.py for H and its factor.

Differs from the papers: block is also the lazy update's width B, as in the authors' code; an input that was never seen
keeps its weights where the authors drop them. Runs of m that a row does not divide into are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.prune.semi_structured import magnitude, sweep, wanda
from edgewise.compress.quantize.changes import KEPT
from edgewise.compress.quantize.gptq import inverse_factor
from edgewise.compress.quantize.rtn import check
from edgewise.compress.walk import Change, Group
from edgewise.core.errors import InvalidValueError, notice
from edgewise.core.numbers import BF16, FP16, FP32, NumberFormat, float32_to_bf16
from edgewise.core.stats import InputStats
from edgewise.core.storage import Dense, Sparse, Stored

__all__ = ["Prune", "SparseGpt", "by_magnitude", "by_sparsegpt", "by_wanda", "lowest", "magnitude_change",
           "pattern_of", "sparsegpt_change", "stored_of", "wanda_change"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Mask = NDArray[np.bool_]
Scores = NDArray[np.floating]
_PATTERN = re.compile(r"(\d{1,3}):(\d{1,3})")


@dataclass(frozen=True)
class Prune:
    """sparsity: share of the weights that go. pattern: "2:4" keeps two of every four instead; "" none."""

    sparsity: float = 0.5
    pattern: str = ""

    def __post_init__(self) -> None:
        _check(self.sparsity, self.pattern)


@dataclass(frozen=True)
class SparseGpt:
    """As Prune; damp and block of the paper, section 4 and Algorithm 1."""

    sparsity: float = 0.5
    pattern: str = ""
    damp: float = 0.01  # fraction of mean(diag H)
    block: int = 128    # columns that are decided together

    def __post_init__(self) -> None:
        _check(self.sparsity, self.pattern)
        if not self.damp >= 0 or self.block < 1:
            raise InvalidValueError(f"damp is at least 0 and block at least 1; given {self.damp} and {self.block}")


def _check(sparsity: float, pattern: str) -> None:
    if not 0 <= sparsity < 1:
        raise InvalidValueError(f"sparsity is the share of weights that go, from 0 to below 1; given {sparsity}")
    pattern_of(pattern)


def pattern_of(text: str) -> tuple[int, int] | None:
    """(kept, of every) of "2:4"; None of "". Raises InvalidValueError."""
    if not text:
        return None
    found = _PATTERN.fullmatch(text.strip())
    kept, every = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < kept < every:
        raise InvalidValueError(f"a pattern is N:M, N of every M kept, such as 2:4; given {text!r}")
    return kept, every


def lowest(scores: Scores, count: int) -> Mask:
    """True at the `count` lowest of each row of scores (rows, n); of equal ones the later go first."""
    rows, size = scores.shape
    mask = np.zeros((rows, size), bool)
    if count:
        order = np.argsort(scores[:, ::-1], axis=1, kind="stable")[:, :count]
        np.put_along_axis(mask, size - 1 - order, True, axis=1)
    return mask


def _mask(scores: Scores, sparsity: float, pattern: tuple[int, int] | None, *, together: bool) -> Mask:
    """True where a weight goes. together: the whole matrix is compared, not each row."""
    if pattern is not None:
        kept, every = pattern
        return lowest(scores.reshape(-1, every), every - kept).reshape(scores.shape)
    if together:
        return lowest(scores.reshape(1, -1), int(sparsity * scores.size)).reshape(scores.shape)
    return lowest(scores, int(sparsity * scores.shape[1]))


def by_magnitude(weight: Float32, config: Prune = Prune()) -> tuple[Float32, Mask]:
    """(the weight with zeros; the mask, True where they are). weight: (out, in). Pure."""
    pattern = _fitting(weight, config.pattern)
    mask = _mask(magnitude(weight), config.sparsity, pattern, together=True)
    return np.where(mask, np.float32(0), weight), mask


def by_wanda(weight: Float32, norms: Scores, config: Prune = Prune()) -> tuple[Float32, Mask]:
    """As by_magnitude. norms: (in,), the 2-norm of each input, in any scale."""
    pattern = _fitting(weight, config.pattern)
    mask = _mask(wanda(weight, norms), config.sparsity, pattern, together=False)
    return np.where(mask, np.float32(0), weight), mask


def by_sparsegpt(weight: Float32, hessian: Scores, config: SparseGpt = SparseGpt()) -> tuple[Float32, Mask]:
    """As by_magnitude, the kept weights made up for what went. hessian: (in, in), X^T X in any scale."""
    pattern = _fitting(weight, config.pattern)
    size = weight.shape[1]
    if hessian.shape != (size, size):
        raise InvalidValueError(f"the Hessian of {size} inputs is ({size}, {size}); given {hessian.shape}")
    factor = inverse_factor(hessian, config.damp)
    columns = np.ascontiguousarray(weight.T, np.float64)
    mask = np.zeros(columns.shape, bool)
    step = config.block if pattern is None else pattern[1]

    def decide(column: int) -> Float64:
        if column % step == 0:
            stop = min(column + step, size)
            scores = (columns[column:stop] / np.diag(factor)[column:stop, None]) ** 2
            mask[column:stop] = _mask(np.ascontiguousarray(scores.T), config.sparsity, pattern, together=True).T
        return np.where(mask[column], 0.0, columns[column])

    sweep(columns, factor, decide, config.block if pattern is None else -(-config.block // step) * step)
    pruned = np.ascontiguousarray(mask.T)
    return np.where(pruned, np.float32(0), columns.T.astype(np.float32)), pruned


def _fitting(weight: Float32, text: str) -> tuple[int, int] | None:
    check(weight)
    pattern = pattern_of(text)
    if pattern is not None and weight.shape[1] % pattern[1]:
        raise InvalidValueError(f"{text} keeps {pattern[0]} of every {pattern[1]} inputs, and there are "
                                f"{weight.shape[1]}; take a share instead (sparsity)")
    return pattern


def stored_of(weight: Float32, mask: Mask, pattern: str, number: NumberFormat) -> Stored:
    """A pruned weight: the kept values and their places for n of every m, else as dense as it was."""
    found = pattern_of(pattern)
    if found is None or found[1] > 256:
        return _dense(weight, number)
    kept, every = found
    runs = mask.reshape(len(mask), -1, every)
    index = np.argsort(runs, axis=2, kind="stable")[:, :, :kept]
    values = np.take_along_axis(weight.reshape(runs.shape), index, axis=2).reshape(len(mask), -1)
    return Sparse("n_m", index.reshape(len(mask), -1).astype(np.uint8), _dense(values, number), weight.shape, found)


def _dense(values: Float32, number: NumberFormat) -> Dense:
    if number == FP16:
        return Dense(values.astype(np.float16), FP16)
    return Dense(float32_to_bf16(values), BF16) if number == BF16 else Dense(np.ascontiguousarray(values))


# ---- as changes of a walk -------------------------------------------------------------------------------------------

def magnitude_change(config: Prune) -> Change:
    """Each linear of a walk by magnitude."""
    return _change("magnitude", config.pattern, lambda weight, stats: by_magnitude(weight, config), wants=None,
                   without=config)


def wanda_change(config: Prune) -> Change:
    """Each linear of a walk by Wanda."""
    def prune(weight: Float32, stats: InputStats) -> tuple[Float32, Mask]:
        return by_wanda(weight, np.sqrt(stats.total_square), config)

    return _change("Wanda", config.pattern, prune, wants="total_square", without=config)


def sparsegpt_change(config: SparseGpt) -> Change:
    """Each linear of a walk by SparseGPT."""
    def prune(weight: Float32, stats: InputStats) -> tuple[Float32, Mask]:
        assert stats.gram is not None
        return by_sparsegpt(weight, stats.gram, config)

    return _change("SparseGPT", config.pattern, prune, wants="gram",
                   without=Prune(config.sparsity, config.pattern))


def _change(title: str, pattern: str, prune: Callable[[Float32, InputStats], tuple[Float32, Mask]], *,
            wants: str | None, without: Prune) -> Change:
    def change(group: Group, tensors: Mapping[str, Stored], stats: InputStats | None) -> dict[str, Stored]:
        made: dict[str, Stored] = {}
        for name in group.names:
            if KEPT.search(name):
                continue
            stored = tensors[name]
            weight = np.asarray(stored.dense(), np.float32)
            known = wants is None or (stats is not None and getattr(stats, wants) is not None)
            if not known:
                notice("fallback", f"{name}: nothing is known of its inputs, which {title} needs; pruned by magnitude")
            try:
                found = prune(weight, stats) if known else by_magnitude(weight, without)  # type: ignore[arg-type]
            except InvalidValueError as error:
                raise InvalidValueError(f"{name}: {error}") from None
            made[name] = stored_of(*found, pattern, stored.number if isinstance(stored, Dense) else FP32)
        return made

    return change
