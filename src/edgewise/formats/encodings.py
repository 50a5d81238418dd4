"""Ranges of a quantised model as plain JSON, as toolchains of phones take them: encodings.json beside the weights.

    {"version": 1,
     "activation_encodings": {site: {"bitwidth", "is_symmetric", "min", "max"}},
     "param_encodings": {tensor: {"bitwidth", "is_symmetric", "min": [...], "max": [...]}}}   one or one per channel

min = -o s and max = (2^bits - 1 - o) s for codes 0 .. 2^bits - 1 with scale s and zero point o; signed codes without a
zero point are those with o = 2^(bits - 1). Sites are those of core/activation.py. A toolchain derives its integers from
min and max again; nine digits tell every float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgewise.core.activation import activations_of
from edgewise.core.checkpoint import Checkpoint
from edgewise.core.storage import QuantizedTensor

__all__ = ["encodings_of"]


def encodings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ranges of every static activation, and of every weight in integers per tensor or output channel."""
    parameters: dict[str, dict[str, Any]] = {}
    for name in checkpoint.tensors:
        stored = checkpoint.tensors[name]
        if not isinstance(stored, QuantizedTensor):
            continue
        fmt = stored.format
        if fmt.element.kind != "int" or fmt.zero == "min" or fmt.granularity.groups(stored.shape[1]) != 1:
            continue
        first, last = fmt.element.code_range
        scales = stored.scales.reshape(-1).astype(np.float64)
        zeros = np.zeros(len(scales)) if stored.zeros is None else stored.zeros.reshape(-1).astype(np.float64)
        parameters[name] = {
            "bitwidth": fmt.element.bits, "is_symmetric": stored.zeros is None,
            "min": [_digits(value) for value in (first - zeros) * scales],
            "max": [_digits(value) for value in (last - zeros) * scales]}
    return {"version": 1,
            "activation_encodings": {site: {
                "bitwidth": item.bits, "is_symmetric": item.zero == 2**(item.bits - 1), "min": _digits(item.low),
                "max": _digits(item.high)} for site, item in activations_of(checkpoint.config).items()},
            "param_encodings": parameters}


def _digits(value: float) -> float:
    return float(f"{value:.9g}")
