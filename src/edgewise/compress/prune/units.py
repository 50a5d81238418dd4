"""Whole units cut from a decoder: how many of each layer, and which, by scores that are given.

LLM-Pruner (Ma et al., NeurIPS 2023, arXiv:2305.11627): the coupled structures of surgery/groups.py, each scored
by its importance, the same share cut from every layer but the first and the last ones (section 3 and appendix C). Its
scores, first-order Taylor terms, come from train/taylor.py; the norms of surgery.norms_of make the plain baseline.

ShortGPT (Men et al., 2024, arXiv:2403.03853): whole layers, those that turn the states least (equation 1).

Differs from LLM-Pruner: where a model has few key heads, the share of attention is rounded down to whole heads, and
neurons make up the rest; they stay in whole multiples of `multiple`, and what one layer loses too much or too little by
that the next makes up for, so that the share asked for is reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.surgery.groups import Decoder
from edgewise.core.errors import InvalidValueError

__all__ = ["Units", "blocks_kept", "units_kept"]

Scores = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Units:
    """sparsity: share of the weights of all layers that go. first, last: layers left whole, of each end, as a share of
    all; the paper leaves 4 and 2 of 32. multiple: neurons that stay together, as groups of
    quantised weights and kernels want them."""

    sparsity: float = 0.2
    first: float = 4 / 32
    last: float = 2 / 32
    multiple: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InvalidValueError(f"sparsity is the share of weights that go, from 0 to below 1; given "
                                    f"{self.sparsity}")
        if not (self.first >= 0 and self.last >= 0 and self.first + self.last < 1) or self.multiple < 1:
            raise InvalidValueError(f"first and last are shares of the layers that leave some between; given "
                                    f"{self.first} and {self.last}, multiple {self.multiple}")


def units_kept(decoder: Decoder, scores: Mapping[str, Scores], config: Units = Units()) -> dict[str, NDArray[np.int64]]:
    """What surgery.cut keeps. scores: (units,) of the groups N.heads and N.width, higher for what matters more.

    Raises InvalidValueError where the layers between cannot lose so much.
    """
    shapes, hidden = decoder.shapes, decoder.hidden
    before = round(config.first * len(shapes))
    between = range(before, len(shapes) - round(config.last * len(shapes)))
    head = [(shape.key_dim + shape.value_dim) * (shape.heads // max(shape.kv_heads, 1) + 1) * hidden
            for shape in shapes]
    whole = [head[i] * shape.kv_heads + 3 * hidden * shape.width for i, shape in enumerate(shapes)]
    share = config.sparsity * sum(whole) / sum(whole[layer] for layer in between)
    keep: dict[str, NDArray[np.int64]] = {}
    owed = 0.0
    for layer in between:
        shape, target = shapes[layer], share * whole[layer] + owed
        heads = min(int(share * shape.kv_heads), max(shape.kv_heads - 1, 0))
        neurons = (target - heads * head[layer]) / (3 * hidden)
        left = int(np.rint((shape.width - neurons) / config.multiple)) * config.multiple
        if left < 1 or share >= 1:
            raise InvalidValueError(f"{config.sparsity:g} of all weights are more than layer {layer} can lose, with "
                                    f"{before} layers before and {len(shapes) - between.stop} after left whole; take "
                                    "a lower sparsity, or fewer whole layers (first, last)")
        left = min(left, shape.width)
        owed = target - heads * head[layer] - 3 * hidden * (shape.width - left)
        for name, count in ((f"{layer}.heads", shape.kv_heads - heads), (f"{layer}.width", left)):
            if name in scores:
                keep[name] = np.sort(np.argsort(-np.asarray(scores[name]), kind="stable")[:count])
    return keep


def blocks_kept(influence: Scores, sparsity: float) -> dict[str, NDArray[np.int64]]:
    """What surgery.cut keeps. influence: (layers,), of each; the lowest go, round(sparsity layers) of them."""
    influence = np.asarray(influence)
    count = round(sparsity * len(influence))
    if not 0 <= count < len(influence):
        raise InvalidValueError(f"a model keeps at least one layer; sparsity {sparsity:g} leaves none of "
                                f"{len(influence)}")
    return {str(layer): np.zeros(0, np.int64) for layer in sorted(np.argsort(influence, kind="stable")[:count])}
