"""GPTQ: layer-wise quantisation with second-order error feedback.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023,
arXiv:2210.17323, Algorithm 1.

W (out, in) is the weight, X (tokens, in) its inputs.  H = X^T X;  H += damp * mean(diag H) * I;  H^-1 = U^T U, U upper.
For j = 0, 1, ...:   q_j = quantize(w_j);   e_j = (w_j - q_j) / U_jj;   w_k -= e_j U_jk  for all k > j.
All rows take the same steps, so that a column is worked on as a whole; updates beyond a block of columns are gathered
and done as one product (section 3.3, "Step 2"). A group's grid is chosen when its first column is reached, from the
weights as the errors before it left them (section 5, "grouping").

Indices: `start` and `stop` count columns of the whole matrix, everywhere. Only slices are cut from it, and nothing is
indexed by a place within a block.

Differs from the paper:
- H is X^T X and not 2 X^T X: the factor cancels.
- An input that was never seen keeps its weight, rounded; the authors' code sets it to zero.
- The grid of a group is searched for (`ranges`), each column's error weighed by 1 / U_jj^2, which is what it costs in
  the objective once the later columns have made up for it; `search=False` takes the span, as the paper.
- `order` (columns by falling diag H, "act-order" of the authors' code) takes every group's grid from the weights as
  they were, since the columns of one group are then no longer neighbours; `static_groups` does so without `order`.
- mask: pruned weights are zero in the result, and their removal is an error like any other (Frantar and Alistarh,
  "SparseGPT", ICML 2023, arXiv:2301.00774, equation 7, with the mask given).
- H that is not positive definite after damping is damped ten times as much, and so on, with a notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.quantize.ranges import Grid, assembled, codes_of, grid_of, values_of
from edgewise.compress.quantize.rtn import Rtn, check
from edgewise.compress.quantize.rtn import quantize_layer as rounded_layer
from edgewise.core.errors import InvalidValueError, notice
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import QuantizedTensor

__all__ = ["Gptq", "inverse_factor", "quantize_layer"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
_DAMPINGS = 6
"""Times that damping may grow tenfold before it is an error."""


@dataclass(frozen=True)
class Gptq:
    """The method's settings; defaults of the paper but for search."""

    damp: float = 0.01           # fraction of mean(diag H); "Step 3"
    block: int = 128             # columns per lazy update; "Step 2"
    order: bool = False          # columns by falling diag H; the authors' code
    static_groups: bool = False  # grids from the original weights; always so with order
    search: bool = True          # for the grid of each group; see above

    def __post_init__(self) -> None:
        if not self.damp >= 0:
            raise InvalidValueError(f"damp is a fraction of mean(diag H), at least 0; given {self.damp}")
        if self.block < 1:
            raise InvalidValueError(f"a block has at least one column; given {self.block}")


def quantize_layer(weight: Float32, hessian: NDArray[np.floating], fmt: QuantFormat, config: Gptq = Gptq(), *,
                   mask: NDArray[np.bool_] | None = None) -> QuantizedTensor:
    """weight: (out, in) float32. hessian: (in, in), X^T X of its inputs, in any scale. mask: (out, in), True where a
    weight is pruned: it is zero in the result. Pure: inputs are not modified.

    Raises InvalidValueError for shapes that do not fit, values that are not finite, or a mask with a format that has no
    exact zero.
    """
    weight = np.asarray(weight, np.float32)
    check(weight)
    _check_mask(mask, weight, fmt)
    size = weight.shape[1]
    if hessian.shape != (size, size):
        raise InvalidValueError(f"the Hessian of {size} inputs is ({size}, {size}); given {hessian.shape}")
    diagonal = np.diag(hessian).astype(np.float64)
    order = np.argsort(-diagonal, kind="stable") if config.order else np.arange(size)
    factor = inverse_factor(hessian if not config.order else hessian[np.ix_(order, order)], config.damp)
    groups = _Groups(weight, fmt, config, diagonal)
    codes = _feedback(np.ascontiguousarray(weight.T[order], np.float64), factor, groups, order, config.block,
                      None if mask is None else np.ascontiguousarray(mask.T[order]))
    result = np.empty(weight.shape, codes.dtype)
    result[:, order] = codes.T
    return assembled(result, groups.grid(), fmt)


def inverse_factor(hessian: NDArray[np.floating], damp: float) -> Float64:
    """U, upper triangular, with U^T U = (H + damp mean(diag H) I)^-1; (in, in) float64. H: symmetric, (in, in)."""
    matrix = np.array(hessian, np.float64)
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise InvalidValueError(f"the Hessian has finite values; element ({row}, {column}) is {matrix[row, column]}; "
                                "calibrate on a text that the model can read")
    diagonal = np.diag(matrix).copy()
    if (diagonal < 0).any():
        raise InvalidValueError("the Hessian is X^T X, whose diagonal is not negative")
    unseen = diagonal == 0
    mean = float(diagonal.mean()) or 1.0
    diagonal[unseen] = mean  # rows of zeros: nothing flows to or from them
    for attempt in range(_DAMPINGS):
        np.fill_diagonal(matrix, diagonal + damp * mean)
        try:
            # With J the reversal, J H J = L L^T gives H = R R^T with R = J L J upper, and U = R^-1.
            reverse = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            damp = max(10 * damp, 1e-6)
            continue
        if attempt:
            notice("fallback", f"the Hessian is not positive definite; it is damped by {damp:g} of its mean diagonal",
                   where="gptq")
        return np.triu(np.linalg.inv(reverse))
    raise InvalidValueError(f"the Hessian of {len(matrix)} inputs is not positive definite even when damped by "
                            f"{damp / 10:g} of its mean diagonal; calibrate on a longer text")


def _check_mask(mask: NDArray[np.bool_] | None, weight: Float32, fmt: QuantFormat) -> None:
    if mask is None:
        return
    if mask.shape != weight.shape or mask.dtype != np.bool_:
        raise InvalidValueError(f"a mask is {weight.shape} of bool; given {mask.shape} of {mask.dtype}")
    if fmt.zero == "min":
        raise InvalidValueError(f"{fmt} has no exact zero for pruned weights; take a symmetric format, such as "
                                "int4/g32/fp16, or integer zero points")
    if fmt.element.kind == "codebook" and 0.0 not in fmt.element.codebook:
        raise InvalidValueError(f"{fmt.element} has no code for zero, which pruned weights need")


class _Groups:
    """The grid of every group, chosen when asked for; a group is counted by its place in a row."""

    def __init__(self, weight: Float32, fmt: QuantFormat, config: Gptq, diagonal: Float64) -> None:
        rows, inputs = weight.shape
        self.format, self._search = fmt, config.search
        self.size = fmt.granularity.group if fmt.granularity.kind == "group" else inputs
        count = fmt.granularity.groups(inputs)
        self._grids: list[Grid | None] = [None] * count
        whole = fmt.granularity.kind == "tensor"
        self.static = config.order or config.static_groups or whole
        if self.static:  # one matrix, one grid: it cannot wait for the first errors
            made = rounded_layer(weight, fmt, Rtn(config.search), importance=diagonal / max(diagonal.mean(), 1e-300))
            second = made.zeros if made.zeros is not None else made.minima
            for group in range(count):
                offset = None if second is None else np.broadcast_to(second[:, group], rows)
                self._grids[group] = Grid(np.broadcast_to(made.scales[:, group], rows), offset)

    def choose(self, group: int, values: Float64, importance: Float64) -> None:
        """values: (columns of the group, out) as they are now. importance: of each column's squared error."""
        importance = importance / max(float(importance.mean()), 1e-300)
        self._grids[group] = grid_of(values.astype(np.float32), self.format,
                                     importance.astype(np.float32)[:, None] if self._search else None,
                                     search=self._search)

    def of(self, group: int) -> Grid:
        grid = self._grids[group]
        assert grid is not None
        return grid

    def grid(self) -> Grid:
        """Of all groups, row by row; of a tensor, the one it has."""
        grids = [self.of(group) for group in range(len(self._grids))]
        if self.format.granularity.kind == "tensor":
            return Grid(grids[0].scale[:1], None if grids[0].offset is None else grids[0].offset[:1])
        offsets = [grid.offset for grid in grids if grid.offset is not None]
        return Grid(np.stack([grid.scale for grid in grids], axis=1).reshape(-1),
                    np.stack(offsets, axis=1).reshape(-1) if offsets else None)


def _feedback(columns: Float64, factor: Float64, groups: _Groups, order: NDArray[np.int64], block: int,
              mask: NDArray[np.bool_] | None) -> NDArray[np.generic]:
    """Algorithm 1. columns: (in, out), the weight's columns in the order they are worked on; overwritten.

    Returns codes (in, out) in that order.
    """
    size, rows = columns.shape
    fmt = groups.format
    nothing = np.zeros((1, rows), np.float32)
    codes: NDArray[np.generic] | None = None
    for start, stop in _spans(size, block, groups.size, groups.static):
        errors = np.empty((stop - start, rows))
        for column in range(start, stop):
            group = int(order[column]) // groups.size
            if not groups.static and column % groups.size == 0:
                end = min(column + groups.size, size)
                groups.choose(group, columns[column:end], 1 / np.diag(factor)[column:end]**2)
            grid = groups.of(group)
            now = columns[column]
            code = codes_of(now.astype(np.float32)[None], grid, fmt)[0]
            if mask is not None:
                code = np.where(mask[column], codes_of(nothing, grid, fmt)[0], code)
            if codes is None:
                codes = np.empty((size, rows), code.dtype)
            codes[column] = code
            error = (now - values_of(code[None], grid, fmt)[0]) / factor[column, column]
            errors[column - start] = error
            if column + 1 < stop:
                columns[column + 1:stop] -= np.outer(factor[column, column + 1:stop], error)
        if stop < size:
            columns[stop:] -= factor[start:stop, stop:].T @ errors
    assert codes is not None
    return codes


def _spans(size: int, block: int, group: int, static: bool) -> Iterator[tuple[int, int]]:
    """Blocks of columns. Unless grids are static, a group begins and ends with a block or lies within one: when its
    grid is chosen, all its columns have had every error before them."""
    whole = size if static else group
    step = block if static or group >= block else block // group * group
    for outer in range(0, size, max(whole, step)):
        end = min(outer + max(whole, step), size)
        for start in range(outer, end, step):
            yield start, min(start + step, end)
