"""BitNet b1.58: linear layers that train with weights -1, 0 and 1 and inputs of 8 bits.

Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", 2024, arXiv:2402.17764, section 2.

    gamma = mean|W|;   W~ = RoundClip(W / gamma, -1, 1);   inputs per token: x~ = round(x 127 / max|x|)
    y = (gamma max|x| / 127) x~ W~^T, differentiated as if nothing had been rounded or clipped

Differs from the paper: no epsilon in the divisions, zeros stay zero instead. The norm before the layer is left to the
network.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewise.core.elements import FP32, TERNARY
from edgewise.core.numbers import Granularity, QuantFormat
from edgewise.core.storage import QuantizedTensor
from edgewise.train.fake_quant import per_token, straight_through

__all__ = ["BitLinear", "ternary", "ternary_weight"]

FORMAT = QuantFormat(TERNARY, Granularity("tensor"), FP32)


def ternary(weight: NDArray[np.float32]) -> QuantizedTensor:
    """W~ as codes and gamma as their scale. weight: (out, in)."""
    gamma = np.abs(weight).mean(dtype=np.float32) or np.float32(1)
    return QuantizedTensor(TERNARY.encode(weight / gamma), np.full((1, 1), gamma, np.float32), FORMAT)


def ternary_weight(weight: Tensor) -> Tensor:
    """gamma W~, (out, in); the gradient is that of the identity."""
    gamma = weight.detach().abs().mean()
    rounded = (weight.detach() / gamma).round().clamp(-1, 1) * gamma if bool(gamma > 0) else weight.detach()
    return straight_through(weight, rounded)


class BitLinear(nn.Linear):
    """nn.Linear by W~ and x~. x: (..., in)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(per_token(x, 8, symmetric=True), ternary_weight(self.weight), self.bias)
