"""R-Sparse: a linear layer reads the few inputs that matter, and what is left of the input goes through a low rank.

Zhang et al., "R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference", ICLR 2025, arXiv:2504.19449,
sections 3.4 and 4.1, and the public code (VITA-Group/R-Sparse).

    y = W (m x) + U_r S_r V_r^T ((1 - m) x),   m_i = 1 where |x_i| c_i > t,   c_i = ||W e_i||_2 = ||row i of V S||_2

Of m n weights a token touches (1 - s) m n:  (1 - s) alpha n inputs of m weights each, and a rank of
r = floor(((1 - s) m n - k m) / (m + n)), k = (1 - s) alpha n.  t is the quantile 1 - (1 - s) alpha of |x_i| c_i over
all inputs of the linear in a calibration text, one number: how many inputs are read differs from token to token.

Differs from the paper: alpha = 1 has no low rank (the code keeps a rank of one); budgets are by a matrix's own shape
(the code counts key and value projections as square); thresholds are kept per input, t / c_i; c is of the weight as it
is stored, quantised or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.lowrank.decompose import randomised
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import FP16
from edgewise.core.storage import Dense, Factored, InputSparse, Stored

__all__ = ["Budget", "Decomposed", "RSparse", "budget_of", "decomposed", "quantile_of", "sparse_layer"]

Float32 = NDArray[np.float32]
_EXACT = 1024
"""The smaller side up to which a decomposition is exact; beyond, of ranks that are few, by random vectors."""


@dataclass(frozen=True)
class RSparse:
    """sparsity: share of a linear's weights that a token does not touch ("50 %", abstract). alpha: share of the budget
    that goes to inputs (0.95 everywhere, from a grid search in the code's README). weighted: |x_i| c_i decides, else
    |x_i|. low_rank: off, the inputs that are not read are dropped, and nothing takes their part of the budget.
    tokens: of the calibration text (512 in the code). generations: of the search for an alpha of each linear (section
    4.3), 0 for none; population and the search's tokens are smaller than the paper's (16 texts, an hour on a GPU).
    """

    sparsity: float = 0.5
    alpha: float = 0.95
    weighted: bool = True
    low_rank: bool = True
    tokens: int = 512
    generations: int = 0
    population: int = 32
    search_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1 or not 0 <= self.alpha <= 1:
            raise InvalidValueError(f"sparsity is from 0 to below 1, alpha from 0 to 1; given {self.sparsity} and "
                                    f"{self.alpha}")
        if self.tokens < 16 or self.generations < 0 or self.population < 4 or self.search_tokens < 16:
            raise InvalidValueError("tokens and search_tokens are at least 16, population at least 4, generations at "
                                    f"least 0; given {self.tokens}, {self.search_tokens}, {self.population}, "
                                    f"{self.generations}")


@dataclass(frozen=True)
class Budget:
    """What a token touches of a matrix. kept: share of the inputs that are read. rank: of the rest's product."""

    kept: float
    rank: int


def budget_of(shape: tuple[int, int], sparsity: float, alpha: float) -> Budget:
    """shape: (m, n) of the weight."""
    rows, cols = shape
    kept = (1 - sparsity) * alpha
    if sparsity == 0 or alpha == 1:
        return Budget(kept, 0)
    rank = math.floor((rows * cols * (1 - sparsity) - kept * cols * rows) / (rows + cols))
    return Budget(kept, min(max(rank, 1), rows, cols))


@dataclass(frozen=True, eq=False)
class Decomposed:
    """A weight (m, n) ready for any budget. norms: (n,) c. left (m, r), right (r, n): along the first singular
    directions, in order, so that the first of both are a smaller rank's; one of them holds the values."""

    norms: Float32
    left: Float32
    right: Float32


def decomposed(weight: NDArray[np.floating], rank: int) -> Decomposed:
    """rank: the largest that will be asked for; 0 is one."""
    weight = np.asarray(weight, np.float64)
    norms = np.sqrt(np.square(weight).sum(axis=0)).astype(np.float32)
    if rank == 0:
        return Decomposed(norms, np.zeros((len(weight), 0), np.float32), np.zeros((0, weight.shape[1]), np.float32))
    if min(weight.shape) > _EXACT and 4 * rank <= min(weight.shape):
        factors = randomised(weight, rank, split="right")
        return Decomposed(norms, factors.left.astype(np.float32), factors.right.astype(np.float32))
    # The directions of the shorter side, from its Gram matrix: with these W V V^T and U U^T W are as good as any.
    wide = weight.shape[1] > weight.shape[0]
    vectors = np.linalg.eigh(weight @ weight.T if wide else weight.T @ weight)[1][:, ::-1][:, :rank]
    left, right = (vectors, vectors.T @ weight) if wide else (weight @ vectors, vectors.T)
    return Decomposed(norms, left.astype(np.float32), right.astype(np.float32))


def quantile_of(inputs: Float32, norms: Float32 | None, kept: float) -> float:
    """t: the quantile 1 - kept of |x_i| c_i, inputs (tokens, n), or of |x_i| without norms."""
    size = np.abs(inputs) if norms is None else np.abs(inputs) * norms
    if kept >= 1:
        return 0.0
    return float(np.quantile(size.astype(np.float32), 1 - kept)) if kept > 0 else math.inf


def sparse_layer(weight: Stored, parts: Decomposed, inputs: Float32, config: RSparse = RSparse(), *,
                 alpha: float | None = None) -> InputSparse:
    """weight: (m, n) in any form, kept as it is. parts: of it. inputs: (tokens, n) of a calibration text. alpha: this
    linear's, by default the config's. Factors are float16. Pure: inputs are not modified."""
    rows, cols = weight.shape
    if inputs.ndim != 2 or inputs.shape[1] != cols or not len(inputs):
        raise InvalidValueError(f"a weight {weight.shape} needs inputs (tokens, {cols}); given {inputs.shape}")
    budget = budget_of((rows, cols), config.sparsity, config.alpha if alpha is None else alpha)
    limit = quantile_of(inputs, parts.norms if config.weighted else None, budget.kept)
    thresholds = np.full(cols, limit)
    if config.weighted:
        with np.errstate(divide="ignore", invalid="ignore"):
            thresholds = np.where(parts.norms > 0, limit / parts.norms, np.inf)
    if limit == 0:
        thresholds = np.zeros(cols)
    low = None
    if config.low_rank and budget.rank:
        if budget.rank > parts.left.shape[1]:
            raise InvalidValueError(f"a rank of {budget.rank} is asked for, and {parts.left.shape[1]} were decomposed")
        low = Factored(_half(parts.left[:, :budget.rank]), _half(parts.right[:budget.rank]))
    return InputSparse(weight, thresholds.astype(np.float32), low)


def _half(values: Float32) -> Dense:
    return Dense(np.ascontiguousarray(values, np.float16), FP16)
