"""Folders of AWQ tools (AutoAWQ and what transformers writes with it), in the layout called "gemm".

A linear `m` of `in` inputs and `out` outputs, in groups of g inputs, 4 bits:

    m.qweight  int32 (in, out / 8)        eight outputs in a word
    m.qzeros   int32 (groups, out / 8)    likewise
    m.scales   (groups, out)

From the lowest four bits up, a word holds outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight. value = (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import FormatError, UnsupportedError
from edgewise.core.storage import Stored
from edgewise.formats.foreign import Foreign, Home, from_words, ordered

__all__ = ["read"]

_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in its word, counted from the lowest bits, of each of eight outputs."""


def read(quantization: Mapping[str, Any], home: Home) -> Foreign:
    """Every linear that has a qweight."""
    bits, group = quantization.get("bits"), quantization.get("group_size", 128)
    layout = str(quantization.get("version", "gemm")).lower()
    if bits != 4 or layout != "gemm":
        raise UnsupportedError(f"{home.config}: AWQ with {str(bits)[:20]} bits in the layout {layout[:40]!r}; edgewise "
                               "reads 4 bits in the layout 'gemm'; save the model again in it")
    if type(group) is not int or group == 0 or group < -1:
        raise FormatError(f"quantization_config.group_size is {str(group)[:40]!r}; expected -1 or a positive number",
                          path=home.config)
    found = Foreign()
    for module in home.modules("qweight"):
        found.makers[f"{module}.weight"] = _maker(home, module, group)
        found.parts |= {f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
    return found


def _unpacked(words: NDArray[Any], out: int) -> NDArray[np.uint8]:
    """(rows, out / 8) int32 -> (rows, out) codes in the order of the outputs."""
    codes = from_words(words, out, 4).reshape(len(words), -1, 8)
    return codes[:, :, _PLACE].reshape(len(words), out)


def _maker(home: Home, module: str, group: int) -> Callable[[], Stored]:
    inputs, words = home.entry(f"{module}.qweight", ("I32",), 2)
    out = words * 8
    size = inputs if group == -1 else group
    if not inputs or not out or inputs % size:
        raise home.fail(f"{inputs} inputs are not whole groups of {size}", f"{module}.qweight")
    home.shaped(f"{module}.scales", ("F16", "BF16", "F32"), (inputs // size, out))
    home.shaped(f"{module}.qzeros", ("I32",), (inputs // size, words))

    def make() -> Stored:
        codes = _unpacked(home.files.array(f"{module}.qweight"), out)
        zeros = _unpacked(home.files.array(f"{module}.qzeros"), out)
        scales, number = home.scales(f"{module}.scales")
        return ordered(np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T), 4,
                       number, size, None, f"{module}.weight")

    return make
