"""The chosen formats once more by GPTQ, for as long as that is closer to the source than rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.quantize import changes
from edgewise.compress.quantize.gptq import Gptq
from edgewise.compress.walk import blocks_of, walk
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import UnsupportedError, notice
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import Stored
from edgewise.engine.calibrate import EngineStats

__all__ = ["by_gptq"]

_FEW_BITS = 6
"""Above, what rounding costs is not worth a walk."""


def by_gptq(checkpoint: Checkpoint, formats: Mapping[str, QuantFormat], windows: NDArray[np.int32], threads: int,
            progress: Callable[[str, int, int], None] | None = None) -> dict[str, Stored]:
    """The weights that GPTQ makes, by name: of a layer, of few bits, and with inputs that statistics are known of.

    checkpoint: with what lies outside of the layers already as it will be. windows: (n, tokens) to calibrate on.
    """
    try:
        blocks = blocks_of(checkpoint)
    except UnsupportedError as error:
        notice("info", f"GPTQ was not tried: {error}", where="fit")
        return {}
    wanted = {name: formats[name] for block in blocks for group in block.groups if group.site for name in group.names
              if name in formats and formats[name].element.bits <= _FEW_BITS}
    touched = [block.index for block in blocks if wanted.keys() & {n for group in block.groups for n in group.names}]
    if not touched:
        return {}
    source = EngineStats(checkpoint, list(windows), gram=True, sequential=True, threads=threads)
    made = walk(checkpoint, changes.gptq(wanted, Gptq()), source, step=Step("gptq"), blocks=touched, progress=progress)
    return {name: made.tensors[name] for name in wanted}
