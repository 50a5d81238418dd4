"""The chosen formats once more by GPTQ, for as long as that is closer to the source than rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.quantize import changes, gptq
from edgewise.compress.quantize.gptq import Gptq
from edgewise.compress.quantize.w2a8kv4 import quantize_kept
from edgewise.compress.walk import Change, Group, blocks_of, walk
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import UnsupportedError, notice
from edgewise.core.numbers import QuantFormat
from edgewise.core.stats import InputStats
from edgewise.core.storage import Factored, Stored
from edgewise.engine.calibrate import EngineStats
from edgewise.fit.rounding import is_sparse

__all__ = ["by_gptq", "gptq_of_parts"]

_DEFAULTS = Gptq()
_FEW_BITS = 6
"""Above, what rounding costs is not worth a walk."""


def by_gptq(checkpoint: Checkpoint, formats: Mapping[str, QuantFormat], windows: NDArray[np.int32], threads: int,
            progress: Callable[[str, int, int], None] | None = None) -> dict[str, Stored]:
    """The weights that GPTQ makes, by name: of a layer, of few bits, and with inputs that statistics are known of.

    checkpoint: with what lies outside of the layers already as it will be. windows: (n, tokens) to calibrate on.
    A factored weight is named by its factors, NAME.left and NAME.right, and so are these in the result.
    """
    try:
        blocks = blocks_of(checkpoint)
    except UnsupportedError as error:
        notice("info", f"GPTQ was not tried: {error}", where="fit")
        return {}
    names = {name for block in blocks for group in block.groups if group.site for name in group.names}
    wanted = {part: fmt for part, fmt in formats.items() if fmt.element.bits <= _FEW_BITS
              and (part in names or part.rpartition(".")[0] in names)}
    owners = {part if part in names else part.rpartition(".")[0] for part in wanted}
    touched = [block.index for block in blocks if owners & {n for group in block.groups for n in group.names}]
    if not touched:
        return {}
    source = EngineStats(checkpoint, list(windows), gram=True, sequential=True, threads=threads)
    made = walk(checkpoint, gptq_of_parts(wanted), source, step=Step("gptq"), blocks=touched, progress=progress)
    found: dict[str, Stored] = {}
    for name in owners:
        stored = made.tensors[name]
        if isinstance(stored, Factored) and name not in wanted:
            found |= {f"{name}.{side}": part for side, part in (("left", stored.left), ("right", stored.right))
                      if f"{name}.{side}" in wanted}
        else:
            found[name] = stored
    return found


def gptq_of_parts(formats: Mapping[str, QuantFormat], config: Gptq = _DEFAULTS) -> Change:
    """GPTQ of weights in any storage form, each part in its own format; a part that is not named stays as it is.

    Of W = L R with inputs of Gram matrix G, R meets G and L meets R G R^T, with R as already rounded. Of a weight that
    keeps n of every m inputs, these stay, and what it lacks is not made up for again.
    """
    def change(group: Group, tensors: Mapping[str, Stored], stats: InputStats | None) -> dict[str, Stored]:
        gram = None if stats is None else stats.gram
        apart = {} if gram is None else {name: tensors[name] for name in group.names
                                         if isinstance(tensors[name], Factored) or is_sparse(tensors[name])}
        plain = {name: fmt for name, fmt in formats.items() if name not in apart}
        made = dict(changes.gptq(plain, config)(group, tensors, stats))
        for name, stored in apart.items():
            assert gram is not None
            if isinstance(stored, Factored) and name not in formats:
                right = _part(stored.right, gram, formats.get(f"{name}.right"), config)
                values = right.dense().astype(np.float64)
                left = _part(stored.left, values @ gram @ values.T, formats.get(f"{name}.left"), config)
                made[name] = Factored(left, right)
            elif name in formats:
                made[name] = _part(stored, gram, formats[name], config)
        return made

    return change


def _part(stored: Stored, gram: NDArray[np.float64], fmt: QuantFormat | None, config: Gptq) -> Stored:
    if fmt is None:
        return stored
    if is_sparse(stored) and stored.n_m == (2, 4):
        mask = np.ones((*stored.index.shape[:1], stored.shape[1] // 4, 4), bool)
        np.put_along_axis(mask, stored.index.reshape(*mask.shape[:2], 2).astype(np.int64), False, axis=2)
        return quantize_kept(stored.dense(), mask.reshape(stored.shape), fmt, gram)
    return gptq.quantize_layer(stored.dense(), gram, fmt, config)
