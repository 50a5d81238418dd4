"""MoDeGPT: pairs of matrices around a hidden dimension, which shrinks with the least error of what the pair gives.

Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression", ICLR 2025, arXiv:2408.09632.

Torch's layout, y = x W^T; G = X^T X of a linear's inputs; of layer l a share phi_l is removed, k of d dimensions stay.
    phi    maximises  sum_l s_l (1 - phi_l) + eps H(phi)  with mean phi = sparsity (section 3.3):
           phi_l = L sparsity softmax(-s / eps)_l,   s_l = 1 - mean cos(x_l, x_l+1), the influence of a layer
    I      feed-forward (algorithm 1, Nystroem): of h = act(gate x) up x the k neurons with the largest ridge leverage
           scores [C (C + lambda I)^-1]_ii stay, C = H^T H, and down reads the others' part out of them:
           down <- down (C_JJ^+ C_J:)^T
    II     query and key (algorithm 2, CR): dimensions with the largest ||C_q^1/2 e_i|| ||C_k^1/2 e_i||. The norms are
           the roots of the diagonals of C_q = W_q G W_q^T and C_k, so no root of a matrix is needed. A rotary embedding
           turns pairs (i, i + d/2): pairs stay together, with their frequencies; under grouped queries squared scores
           are summed over the queries of a key head. Scores are still divided by the root of the head's first size
    III    value and output (algorithm 3): the best rank-k product of W_o W_v on the inputs, of all output blocks that
           share a value head at once (stacked): see `decompose.whitened`

Differs from the paper: ridges count in mean eigenvalues, so that neither tokens nor units matter; type III needs no
ridge, since no inverse is taken; biases are inputs that are always one; sizes are multiples of what kernels like, with
what rounding left carried on to the next layer. Statistics come from the dense model, once, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.lowrank.decompose import leverage, nystroem, root_of, top
from edgewise.core.errors import InvalidValueError

__all__ = ["FeedForward", "Heads", "ModeGpt", "Sizes", "feed_forward", "influence_of", "query_key", "removed_shares",
           "sizes_of", "value_output", "with_ones"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class ModeGpt:
    """The method's settings. sparsity, smoothing and most are of the paper's section 3.3; the last ones are switches.

    sparsity: share of the weights of the layers' linears that goes. most: of one layer. smoothing: eps. ridge: lambda
    over the mean eigenvalue. multiple, head_multiple: of the feed-forward's width; of the sizes of heads.
    """

    sparsity: float = 0.2
    smoothing: float = 0.1
    most: float = 0.8
    ridge: float = 1e-2
    multiple: int = 32
    head_multiple: int = 4
    allocation: Literal["entropic", "uniform"] = "entropic"
    neurons: Literal["leverage", "magnitude", "random"] = "leverage"
    reconstruct: bool = True     # what the neurons that go said, out of those that stay
    dimensions: Literal["norms", "first", "random"] = "norms"
    pairs: bool = True           # a rotary pair stays together
    whiten: bool = True          # values and outputs by their inputs, and not by weights alone
    parts: str = "mlp,qk,vo"     # the module types that shrink
    seed: int = 0                # of random choices

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= self.most < 1 or not self.smoothing > 0 or not self.ridge > 0:
            raise InvalidValueError("sparsity and most are in [0, 1), most at least sparsity, smoothing and ridge "
                                    f"positive; given {self}")
        if self.multiple < 1 or self.head_multiple < 2 or self.head_multiple % 2:
            raise InvalidValueError("multiple is at least 1 and head_multiple even, as rotary pairs are; given "
                                    f"{self.multiple} and {self.head_multiple}")
        if not self.modules <= {"mlp", "qk", "vo"}:
            raise InvalidValueError(f"parts are some of mlp, qk, vo; given {self.parts!r}")

    @property
    def modules(self) -> set[str]:
        return {part.strip() for part in self.parts.split(",") if part.strip()}


# ---- how much of which layer ----------------------------------------------------------------------------------------

def influence_of(before: Array, after: Array) -> float:
    """1 - mean cos of the states before and after a layer, (tokens, hidden) each: how much the layer turns them."""
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    return float(1 - (np.einsum("ij,ij->i", before, after) / np.maximum(norms, 1e-30)).mean())


def removed_shares(influence: Array, config: ModeGpt) -> Float64:
    """phi, (layers,): the share of each layer that is removed, of mean config.sparsity and at most config.most."""
    influence = np.asarray(influence, np.float64)
    if influence.ndim != 1 or not len(influence) or not np.isfinite(influence).all():
        raise InvalidValueError(f"one finite influence for each layer; given {influence}")
    if config.allocation == "uniform":
        return np.full(len(influence), config.sparsity)
    weight = np.exp(-(influence - influence.min()) / config.smoothing)
    total = len(influence) * config.sparsity
    phi = np.zeros(len(influence))
    capped = np.zeros(len(influence), bool)
    while True:  # each turn caps one layer at least
        free = ~capped
        phi[free] = (total - config.most * capped.sum()) * weight[free] / max(float(weight[free].sum()), 1e-300)
        over = free & (phi > config.most)
        if not over.any():
            return phi
        phi[over] = config.most
        capped |= over


@dataclass(frozen=True)
class Sizes:
    """Of a layer: the width of the feed-forward, the sizes of query and key heads and of value heads."""

    width: int
    head_dim: int
    value_dim: int


def sizes_of(dense: Sizes, phi: Array, config: ModeGpt) -> list[Sizes]:
    """Of every layer. Rounded to multiples; what that leaves or takes is carried to the next layer."""
    def rounded(full: int, multiple: int, module: str) -> list[int]:
        if module not in config.modules:
            return [full] * len(phi)
        made, carried = [], 0.0
        for share in phi:
            wanted = full * (1 - float(share)) + carried
            size = full if wanted >= full else max(multiple, min(full, round(wanted / multiple) * multiple))
            made.append(size)
            carried = wanted - size
        return made

    return [Sizes(*sizes) for sizes in zip(
        rounded(dense.width, min(config.multiple, dense.width), "mlp"),
        rounded(dense.head_dim, min(config.head_multiple, dense.head_dim), "qk"),
        rounded(dense.value_dim, min(config.head_multiple, dense.value_dim), "vo"), strict=True)]


# ---- I: feed-forward ------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class FeedForward:
    """neurons: those kept, ascending, rows of gate and up; down: (hidden, kept). error: the relative error of what the
    feed-forward gives, root of the share of energy."""

    neurons: Int64
    down: Float64
    error: float


def feed_forward(down: Array, gram: Array, keep: int, config: ModeGpt = ModeGpt(), *,
                 layer: int = 0) -> FeedForward:
    """down: (hidden, width). gram: (width, width) of its inputs. layer: tells random choices apart."""
    down, gram = np.asarray(down, np.float64), np.asarray(gram, np.float64)
    width = down.shape[1]
    if not 1 <= keep <= width:
        raise InvalidValueError(f"of {width} neurons 1 to {width} are kept; given {keep}")
    if keep == width:
        return FeedForward(np.arange(width), down, 0.0)
    if config.neurons == "leverage":
        kept = top(leverage(gram, config.ridge * float(np.trace(gram)) / width + 1e-300), keep)
    elif config.neurons == "magnitude":
        kept = top(np.linalg.norm(down, axis=0) * np.sqrt(np.diag(gram)), keep)
    else:
        kept = np.sort(np.random.default_rng([config.seed, layer]).permutation(width)[:keep])
    made = down @ nystroem(gram, kept).T if config.reconstruct else down[:, kept]
    rest = down.copy()  # what the kept neurons do not say of the others
    rest[:, kept] -= made
    whole = float(np.einsum("ij,ij->", down @ gram, down))
    lost = float(np.einsum("ij,ij->", rest @ gram, rest))
    return FeedForward(kept, made, float(np.sqrt(max(lost, 0.0) / max(whole, 1e-300))))


# ---- II: query and key ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Heads:
    """How attention is grouped: each of kv_heads is shared by heads / kv_heads queries in order."""

    heads: int
    kv_heads: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


def query_key(query: Array, key: Array, gram: Array, heads: Heads, keep: int, config: ModeGpt = ModeGpt(), *,
              rotary: bool = True, layer: int = 0) -> Int64:
    """The dimensions kept of every key head and of its queries, (kv_heads, keep).

    query: (heads d, in), key: (kv_heads d, in), gram: (in, in); with a bias as a last column and `with_ones`.
    rotary: dimension i turns with i + d / 2; the kept ones are such pairs too, i and i + keep / 2, ascending.
    """
    size = len(key) // heads.kv_heads
    if not 1 <= keep <= size or (rotary and keep % 2):
        raise InvalidValueError(f"of {size} dimensions of a head 1 to {size} are kept, whole pairs where these are "
                                f"rotary; given {keep}")

    def energies(weight: Array, count: int) -> Float64:
        weight = np.asarray(weight, np.float64)
        return np.asarray(np.maximum(np.einsum("ij,ij->i", weight @ gram, weight), 0).reshape(count, size))

    queries = energies(query, heads.heads).reshape(heads.kv_heads, heads.group, size)
    squares = (queries * energies(key, heads.kv_heads)[:, None]).sum(axis=1)
    if config.dimensions == "random":
        squares = np.random.default_rng([config.seed, layer]).random(squares.shape)
    elif config.dimensions == "first":
        place = np.arange(size) % (size // 2) if rotary and config.pairs else np.arange(size)
        squares = np.broadcast_to(-place.astype(np.float64), squares.shape)
    if not rotary or not config.pairs:
        return np.stack([top(each, keep) for each in squares])
    half = size // 2
    chosen = [top(each[:half] + each[half:], keep // 2) for each in squares]
    return np.stack([np.concatenate([pairs, pairs + half]) for pairs in chosen])


# ---- III: value and output ------------------------------------------------------------------------------------------

def value_output(value: Array, output: Array, gram: Array, heads: Heads, keep: int, config: ModeGpt = ModeGpt()
                 ) -> tuple[Float64, Float64, float]:
    """(value, output, relative error of what the heads give token by token) with heads of `keep` dimensions.

    value: (kv_heads d, in); output: (hidden, heads d); gram: (in, in); with a bias as for `query_key`.
    """
    value, output, gram = (np.asarray(each, np.float64) for each in (value, output, gram))
    size, hidden = len(value) // heads.kv_heads, len(output)
    if not 1 <= keep <= size:
        raise InvalidValueError(f"of {size} dimensions of a value 1 to {size} are kept; given {keep}")
    if keep == size:
        return value, output, 0.0
    root = root_of(gram) if config.whiten else np.eye(len(gram))
    blocks = output.reshape(hidden, heads.kv_heads, heads.group, size)
    values, outputs = [], np.empty((hidden, heads.kv_heads, heads.group, keep))
    lost = whole = 0.0
    for index in range(heads.kv_heads):
        own = value[index * size:(index + 1) * size]
        stacked = blocks[:, index].transpose(1, 0, 2).reshape(heads.group * hidden, size)
        inner, scale, _ = np.linalg.svd(own @ root, full_matrices=False)
        left = np.linalg.svd(stacked @ (inner * scale), full_matrices=False)[0][:, :keep]
        mixing = left.T @ stacked
        values.append(mixing @ own)
        outputs[:, index] = left.reshape(heads.group, hidden, keep).transpose(1, 0, 2)
        rest = stacked - left @ mixing
        seen = own @ gram @ own.T
        lost += float(np.einsum("ij,ij->", rest @ seen, rest))
        whole += float(np.einsum("ij,ij->", stacked @ seen, stacked))
    return (np.concatenate(values), outputs.reshape(hidden, heads.heads * keep),
            float(np.sqrt(max(lost, 0.0) / max(whole, 1e-300))))


def with_ones(gram: Array, total: Array, count: int) -> Float64:
    """The Gram matrix of inputs beside an input that is always one, (in + 1, in + 1). total: (in,), their sum."""
    total = np.asarray(total, np.float64)
    return np.block([[np.asarray(gram, np.float64), total[:, None]], [total[None, :], np.array([[float(count)]])]])
