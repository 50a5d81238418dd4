"""Two of every four weights along the input dimension are kept, so that hardware can skip the others.

Scores of a weight W (out, in) with inputs X (tokens, in); of each four the two with the lowest score go:
    magnitude   |W_ij|
    Wanda       |W_ij| ||X_j||_2     Sun et al., ICLR 2024, arXiv:2306.11695, equation 1
    SparseGPT   W_ij^2 / [H^-1]_jj   Frantar and Alistarh, ICML 2023, arXiv:2301.00774, equation 3 and Algorithm 1

SparseGPT goes through the columns from left to right: at each fourth it chooses among the four as the errors before
them left them, and what a pruned weight leaves behind is made up for by the columns after it, as in GPTQ
(compress/quantize/gptq.py). H = X^T X + damp mean(diag) I, H^-1 = U^T U; at column j, [H^-1]_jj is U_jj^2.

Used by AccLLM (arXiv:2505.03745), whose own score is not public: SparseGPT is the default there, as small models gain
most from it. A mask is True where a weight is pruned, as in gptq.

Differs from the papers: nothing, but for H in place of 2 H and what gptq.inverse_factor says.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.quantize.gptq import inverse_factor
from edgewise.compress.quantize.rtn import check
from edgewise.core.errors import InvalidValueError

__all__ = ["magnitude", "places_of", "pruned_of", "sparsegpt", "sweep", "wanda"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Mask = NDArray[np.bool_]
FOUR, KEPT = 4, 2


def magnitude(weight: Float32) -> Float32:
    """Scores (out, in) of each weight by itself."""
    return np.abs(weight)


def wanda(weight: Float32, norms: NDArray[np.floating]) -> Float32:
    """Scores (out, in). norms: (in,), the 2-norm of each input, in any scale."""
    if norms.shape != weight.shape[1:]:
        raise InvalidValueError(f"one norm per input, {weight.shape[1:]}; given {norms.shape}")
    return np.asarray(np.abs(weight) * norms.astype(np.float32), np.float32)


def pruned_of(scores: NDArray[np.floating]) -> Mask:
    """The mask of scores (out, in): of each four along a row the two lowest; of equal ones the later."""
    _divides(scores.shape[1])
    fours = scores.reshape(len(scores), -1, FOUR)
    order = np.argsort(-fours, axis=2, kind="stable")
    mask = np.zeros(fours.shape, bool)
    np.put_along_axis(mask, order[:, :, KEPT:], True, axis=2)
    return mask.reshape(scores.shape)


def places_of(mask: Mask) -> NDArray[np.uint8]:
    """Where in its four each kept weight lies, (out, in / 2), as core.storage.Sparse holds it.

    Raises InvalidValueError where a four does not keep two.
    """
    _divides(mask.shape[1])
    fours = mask.reshape(len(mask), -1, FOUR)
    if (fours.sum(axis=2) != FOUR - KEPT).any():
        row, four = np.argwhere(fours.sum(axis=2) != FOUR - KEPT)[0]
        raise InvalidValueError(f"row {row} keeps {FOUR - int(fours[row, four].sum())} of its inputs {FOUR * four} to "
                                f"{FOUR * four + 3}; a mask of two of four keeps two")
    return np.argsort(fours, axis=2, kind="stable")[:, :, :KEPT].reshape(len(mask), -1).astype(np.uint8)


def sparsegpt(weight: Float32, hessian: NDArray[np.floating], *, damp: float = 0.01, block: int = 32,
              ) -> tuple[Float32, Mask]:
    """(the kept weights, made up for what went, zeros elsewhere; the mask). weight: (out, in); hessian: (in, in),
    X^T X in any scale. block: columns per lazy update, a multiple of four; it changes no result. Pure."""
    weight = np.asarray(weight, np.float32)
    check(weight)
    _divides(weight.shape[1])
    _fits(weight, hessian)
    factor = inverse_factor(hessian, damp)
    columns = np.ascontiguousarray(weight.T, np.float64)
    mask = np.zeros(columns.shape, bool)

    def decide(column: int) -> Float64:
        if column % FOUR == 0:
            stop = column + FOUR
            scores = (columns[column:stop] / np.diag(factor)[column:stop, None]) ** 2
            mask[column:stop] = pruned_of(np.ascontiguousarray(scores.T)).T
        return np.where(mask[column], 0.0, columns[column])

    sweep(columns, factor, decide, block)
    pruned = np.ascontiguousarray(mask.T)
    return np.where(pruned, np.float32(0), columns.T.astype(np.float32)), pruned


def sweep(columns: Float64, factor: Float64, decide: Callable[[int], NDArray[np.floating]], block: int) -> None:
    """Left to right: decide(column) says what stands for a column, and its error is made up for by those after it.

    columns: (in, out), changed in place: each is left as it was when decide saw it. factor: gptq.inverse_factor.
    block: decide sees every error before its block, and within its block, whatever its size.
    """
    size, rows = columns.shape
    for start in range(0, size, block):
        stop = min(start + block, size)
        errors = np.empty((stop - start, rows))
        for column in range(start, stop):
            error = (columns[column] - decide(column)) / factor[column, column]
            errors[column - start] = error
            if column + 1 < stop:
                columns[column + 1:stop] -= np.outer(factor[column, column + 1:stop], error)
        if stop < size:
            columns[stop:] -= factor[start:stop, stop:].T @ errors


def _divides(inputs: int) -> None:
    if inputs % FOUR:
        raise InvalidValueError(f"two of four weights are kept along the input dimension, which has {inputs}: not a "
                                "multiple of four; leave this weight dense")


def _fits(weight: Float32, hessian: NDArray[np.floating]) -> None:
    size = weight.shape[1]
    if hessian.shape != (size, size):
        raise InvalidValueError(f"the Hessian of {size} inputs is ({size}, {size}); given {hessian.shape}")
