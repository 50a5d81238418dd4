"""A weight as the product of two thin ones, and a set of inputs as a mixture of some of them.

Throughout, W (out, in) is a weight, X (tokens, in) its inputs, G = X^T X their Gram matrix, y = x W^T.

    svd         W' = U_r S_r V_r^T, of which none of rank r is closer to W (Eckart and Young, 1936)
    whitened    W' = U_r U_r^T W, U from W G^1/2 = U S V^T: the least ||X (W - W')^T||_F of rank r, the singular values
                dropped. Equal to U_r S_r V_r^T G^-1/2 where G has an inverse (SVD-LLM, Wang et al., arXiv:2403.07378,
                section 3.1), but without that inverse: what no input ever showed of W is kept as far as U_r spans it
    randomised  the svd by products with a few random vectors (Halko, Martinsson and Tropp, SIAM Review 53, 2011,
                algorithms 4.4 and 5.1)
    nystroem    x ~ x_J T, T = G_JJ^+ G_J:, the least ||X - X_J T||_F of all T (Williams and Seeger, NIPS 2000)
    cr          A B^T ~ A_J B_J^T, J the columns with the largest ||a_j|| ||b_j|| (Drineas, Kannan and Mahoney, SIAM
                J. Comput. 36, 2006, section 3, taken without chance): no J of its size has a smaller bound
                sum over dropped j of ||a_j|| ||b_j|| >= ||A B^T - A_J B_J^T||_F

All in float64; sums over tokens come as Gram matrices, `core.stats.InputStats.gram`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError

__all__ = ["Factors", "Split", "cr_columns", "leverage", "nystroem", "randomised", "root_of", "svd", "top", "whitened",
           "whitened_spectrum"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Split = Literal["left", "right", "even"]
"""Which factor is orthonormal: the other one holds the singular values, or each their root."""


@dataclass(frozen=True, eq=False)
class Factors:
    """W' = left @ right. left: (out, rank), right: (rank, in) float64. error: the Frobenius norm of what is dropped, of
    W or, where inputs are known, of what it makes of them; None where a full decomposition would be needed to know."""

    left: Float64
    right: Float64
    error: float | None = None

    @property
    def rank(self) -> int:
        return int(self.left.shape[1])

    def dense(self) -> Float64:
        return self.left @ self.right

    def __repr__(self) -> str:
        return f"Factors({self.left.shape[0]}x{self.right.shape[1]} of rank {self.rank})"


def svd(weight: Array, rank: int, *, split: Split = "even") -> Factors:
    """The best approximation of a rank. weight: (out, in), finite."""
    weight = _matrix(weight)
    _check_rank(rank, weight)
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    left, right = _split(u[:, :rank], s[:rank], vt[:rank], split)
    return Factors(left, right, float(np.sqrt(np.square(s[rank:]).sum())))


def root_of(gram: Array) -> Float64:
    """R (in, in) with R R^T = gram, positive semi-definite; directions below rounding are none. Not symmetric."""
    gram = _gram(gram)
    values, vectors = np.linalg.eigh(gram)
    values[values < values[-1] * len(values) * np.finfo(np.float64).eps] = 0
    root: Float64 = vectors * np.sqrt(values)
    return root


def whitened_spectrum(weight: Array, gram: Array) -> Float64:
    """Singular values of X W^T, falling: the error of rank r on the inputs is the root of the sum of squares from r."""
    weight = _matrix(weight)
    _check_gram(gram, weight.shape[1])
    return np.asarray(np.linalg.svd(weight @ root_of(gram), compute_uv=False), np.float64)


def whitened(weight: Array, gram: Array, rank: int) -> Factors:
    """The best approximation of a rank on inputs of this Gram matrix, (in, in). left is orthonormal."""
    weight = _matrix(weight)
    _check_rank(rank, weight)
    _check_gram(gram, weight.shape[1])
    u, s, _ = np.linalg.svd(weight @ root_of(gram), full_matrices=False)
    left = np.ascontiguousarray(u[:, :rank])
    return Factors(left, left.T @ weight, float(np.sqrt(np.square(s[rank:]).sum())))


def randomised(weight: Array, rank: int, *, oversample: int = 10, iterations: int = 2, seed: int = 0,
               split: Split = "even") -> Factors:
    """Nearly the best approximation of a rank, in a time that grows with the rank and not with the smaller side.

    oversample: vectors beyond the rank. iterations: passes of the power method, each of which squares how far singular
    values lie apart. The expected error of none is (1 + rank / (oversample - 1))^1/2 times the least (theorem 10.5).
    """
    weight = _matrix(weight)
    _check_rank(rank, weight)
    if oversample < 0 or iterations < 0:
        raise InvalidValueError(f"oversample and iterations are at least 0; given {oversample} and {iterations}")
    width = min(rank + oversample, *weight.shape)
    basis = np.linalg.qr(weight @ np.random.default_rng(seed).standard_normal((weight.shape[1], width)))[0]
    for _ in range(iterations):
        basis = np.linalg.qr(weight @ np.linalg.qr(weight.T @ basis)[0])[0]
    u, s, vt = np.linalg.svd(basis.T @ weight, full_matrices=False)
    left, right = _split(basis @ u[:, :rank], s[:rank], vt[:rank], split)
    return Factors(left, right)


def leverage(gram: Array, ridge: float) -> Float64:
    """Ridge leverage scores [G (G + ridge I)^-1]_ii = 1 - ridge [(G + ridge I)^-1]_ii in [0, 1), (in,): how little the
    others say about an input."""
    gram = _gram(gram)
    if not ridge > 0:
        raise InvalidValueError(f"a ridge is positive; given {ridge}")
    inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
    return np.asarray(np.clip(1 - ridge * np.diag(inverse), 0.0, 1.0))


def nystroem(gram: Array, columns: Array) -> Float64:
    """T (kept, in) with x ~ x_J T; a weight that reads x becomes W T^T, (out, kept). Column j of T is e_j for j in J.

    columns: J, distinct. A W that reads x loses ||(X - X_J T) W^T||_F; of all T none loses less for any W.
    """
    gram = _gram(gram)
    columns = np.asarray(columns, np.int64)
    if len(columns) == 0 or len(np.unique(columns)) != len(columns) or columns.min() < 0 or columns.max() >= len(gram):
        raise InvalidValueError(f"columns are distinct and 0 to {len(gram) - 1}, at least one; given {columns}")
    inner = gram[np.ix_(columns, columns)]
    if _well_conditioned(inner):
        solved: Float64 = np.linalg.solve(inner, gram[columns])
        solved[:, columns] = np.eye(len(columns))  # exactly, and not up to rounding
        return solved
    values, vectors = np.linalg.eigh(inner)
    safe = values > values[-1] * len(values) * np.finfo(np.float64).eps
    inverse = np.where(safe, 1 / np.where(safe, values, 1), 0)
    mixture: Float64 = (vectors * inverse) @ (vectors.T @ gram[columns])
    return mixture


def _well_conditioned(inner: Float64) -> bool:
    """Whether a solution is good to some digits: pivots of the Cholesky factor bound the condition from below."""
    scale = np.sqrt(np.maximum(np.diag(inner), 1e-300))
    try:
        pivots = np.diag(np.linalg.cholesky(inner / np.outer(scale, scale)))
    except np.linalg.LinAlgError:
        return False
    return bool(pivots.min() > 1e-5)


def cr_columns(left: Array, right: Array, keep: int) -> tuple[Int64, float]:
    """The columns kept, ascending, and the bound on the error that the others leave.

    left, right: (columns,), the norms ||a_j|| and ||b_j||, or the roots of the diagonals of A^T A and B^T B.
    """
    scores = np.asarray(left, np.float64) * np.asarray(right, np.float64)
    if scores.ndim != 1 or not np.isfinite(scores).all() or not 1 <= keep <= len(scores):
        raise InvalidValueError(f"finite norms of columns, and 1 to {scores.size} of them to keep; given "
                                f"{scores.shape} and {keep}")
    kept = top(scores, keep)
    return kept, float(np.delete(scores, kept).sum())


def top(scores: Array, count: int) -> Int64:
    """Indices of the largest, ascending; of equal ones the first."""
    return np.sort(np.argsort(-np.asarray(scores, np.float64), kind="stable")[:count]).astype(np.int64)


# ---- shared -------------------------------------------------------------------------------------------------------

def _split(u: Float64, s: Float64, vt: Float64, split: Split) -> tuple[Float64, Float64]:
    if split == "left":
        return np.ascontiguousarray(u), s[:, None] * vt
    if split == "right":
        return u * s, np.ascontiguousarray(vt)
    if split == "even":
        return u * np.sqrt(s), np.sqrt(s)[:, None] * vt
    raise InvalidValueError(f"singular values go to the left, to the right or evenly; given {split!r}")


def _matrix(weight: Array) -> Float64:
    weight = np.asarray(weight, np.float64)
    if weight.ndim != 2 or weight.size == 0 or not np.isfinite(weight).all():
        raise InvalidValueError(f"a weight is a finite matrix (out, in); given {weight.shape}")
    return weight


def _check_rank(rank: int, weight: Float64) -> None:
    if not 1 <= rank <= min(weight.shape):
        raise InvalidValueError(f"a weight {weight.shape} has ranks 1 to {min(weight.shape)}; given {rank}")


def _gram(gram: Array) -> Float64:
    gram = np.asarray(gram, np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.size == 0 or not np.isfinite(gram).all():
        raise InvalidValueError(f"a Gram matrix is finite, (in, in); given {gram.shape}")
    return gram


def _check_gram(gram: Array, inputs: int) -> None:
    if np.shape(gram) != (inputs, inputs):
        raise InvalidValueError(f"the Gram matrix of {inputs} inputs is ({inputs}, {inputs}); given {np.shape(gram)}")
