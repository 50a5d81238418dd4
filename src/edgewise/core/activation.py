"""Static rounding of activations: one scale and one zero point for a whole tensor, fixed before the model runs.

A model says where in `config["quantization_config"]["activations"]`: {site: {"bits": 8, "scale": 0.01, "zero": 131}}. A
site is a module's path (as tensors are named, without ".weight") and a port. A site that is not named is not rounded.

    <linear>.input        codes that the linear multiplies; q, k and v (gate and up) read one tensor, share the values
    <linear>.output       its result, bias included
    <norm>.input          the residual stream as the norm reads it; the stream itself is not rounded
    <layer>.self_attn.query, .key   after the rotary embedding and the heads' norms, as scores are made of them
    <layer>.self_attn.softmax_in    scores, scaled; positions that are not visible do not count
    <layer>.self_attn.softmax_out   probabilities
    <layer>.mlp.sigmoid   of the gate, where the function is silu(x) = x sigmoid(x): sigmoid first, then the product
    <layer>.mlp.act       the function of the gate

The value that attention adds up is `v_proj.output`; what it gives is `o_proj.input`; the gated product is
`down_proj.input`. MobileQuant (EMNLP Findings 2024) rounds all of them: 8 bits, and 16 for norms' inputs, scores,
probabilities and the outputs of o_proj and down_proj; SmoothQuant and its like name the inputs of linears alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import InvalidValueError
from edgewise.core.values import dataclass

__all__ = ["StaticActivation", "activations_of", "activations_to_config"]

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class StaticActivation:
    """q = clamp(rint(x / scale) + zero, 0, 2^bits - 1);  x' = (q - zero) scale.  bits: 2 to 16.

    A symmetric range is the one with zero = 2^(bits - 1).
    """

    bits: int
    scale: float
    zero: int

    def __post_init__(self) -> None:
        whole = all(type(value) is int for value in (self.bits, self.zero))
        if not (whole and 2 <= self.bits <= 16 and 0 <= self.zero < 2**self.bits
                and math.isfinite(self.scale) and np.float32(self.scale) > 0):
            raise InvalidValueError("an activation has 2 to 16 bits, a positive finite scale and a whole zero point "
                                    f"from 0 to 2^bits - 1; given {self}")

    @classmethod
    def from_range(cls, low: float, high: float, bits: int, *, symmetric: bool = False) -> StaticActivation:
        """The quantiser whose codes span low to high; zero is always among its values.

        symmetric: codes -2^(bits-1) .. 2^(bits-1) - 1 with the scale max(|low|, |high|) / (2^(bits-1) - 1).
        """
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise InvalidValueError(f"a range has a finite low and high end; given {low} to {high}")
        low, high = min(low, 0.0), max(high, 0.0)
        if symmetric:
            return cls(bits, _scale(max(-low, high) / (2**(bits - 1) - 1)), 2**(bits - 1))
        scale = _scale((high - low) / (2**bits - 1))
        return cls(bits, scale, int(np.clip(np.rint(-low / scale), 0, 2**bits - 1)))

    @property
    def low(self) -> float:
        """The lowest value."""
        return -self.zero * self.scale

    @property
    def high(self) -> float:
        """The highest value."""
        return float(2**self.bits - 1 - self.zero) * self.scale

    def codes(self, x: NDArray[Any]) -> NDArray[np.int32]:
        """Codes of float32 values, any shape. Divides by the scale in float32, ties to even."""
        whole = np.rint(np.asarray(x, np.float32) / np.float32(self.scale))
        return np.asarray(np.clip(whole + np.float32(self.zero), 0, 2**self.bits - 1), np.int32)

    def values(self, codes: NDArray[Any]) -> Float32:
        """What codes stand for."""
        return (np.asarray(codes, np.float32) - np.float32(self.zero)) * np.float32(self.scale)

    def round(self, x: NDArray[Any]) -> Float32:
        """Values rounded to the nearest that has a code."""
        return self.values(self.codes(x))

    def to_json(self) -> dict[str, Any]:
        return {"bits": self.bits, "scale": self.scale, "zero": self.zero}

    @classmethod
    def from_json(cls, data: Any) -> StaticActivation:
        if not isinstance(data, Mapping) or set(data) != {"bits", "scale", "zero"} or not isinstance(
                data["scale"], int | float):
            raise InvalidValueError(f"an activation is {{bits, scale, zero}}; given {str(data)[:80]}")
        return cls(data["bits"], float(data["scale"]), data["zero"])


def _scale(raw: float) -> float:
    """A float32 that is neither zero nor too small to divide by."""
    return float(np.float32(max(raw, 1e-12)).item())


def activations_of(config: Mapping[str, Any]) -> dict[str, StaticActivation]:
    """Static activations by site, from a checkpoint's configuration; empty where it names none."""
    quantization = config.get("quantization_config")
    named = quantization.get("activations") if isinstance(quantization, Mapping) else None
    if named is None:
        return {}
    if not isinstance(named, Mapping):
        raise InvalidValueError(f"quantization_config.activations is an object by site; given {str(named)[:80]}")
    made = {}
    for site, data in named.items():
        try:
            made[str(site)] = StaticActivation.from_json(data)
        except (InvalidValueError, TypeError) as error:
            raise InvalidValueError(f"quantization_config.activations[{site!r}]: {error}") from None
    return made


def activations_to_config(config: Mapping[str, Any], sites: Mapping[str, StaticActivation]) -> dict[str, Any]:
    """What `Checkpoint.with_tensors(..., quantization_config=...)` takes: the present entry with these sites."""
    present = config.get("quantization_config") or {}
    return {**present, "activations": {site: item.to_json() for site, item in sites.items()}}
