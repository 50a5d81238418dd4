"""Folders of GPTQ tools (AutoGPTQ, GPTQModel, and what transformers writes with them).

A linear `m` of `in` inputs and `out` outputs, in groups of g inputs (-1: all), b = 2, 3, 4 or 8 bits:

    m.qweight  int32 (in * b / 32, out)       codes; each column is a stream of bits, the lowest first
    m.qzeros   int32 (groups, out * b / 32)   zero points, likewise along each row
    m.scales   (groups, out)
    m.g_idx    int32 (in,)                    the group of each input; absent in some files

value = (code - zero) * scale. The format "gptq" stores each zero point less one, modulo 2^b; "gptq_v2" as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgewise.core.errors import FormatError, UnsupportedError
from edgewise.core.storage import Stored
from edgewise.formats.foreign import Foreign, Home, from_words, ordered

__all__ = ["read"]

_SCALES = ("F16", "BF16", "F32")
_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def read(quantization: Mapping[str, Any], home: Home) -> Foreign:
    """Every linear that has a qweight."""
    bits, group = quantization.get("bits"), quantization.get("group_size", -1)
    if type(bits) is not int or bits not in (2, 3, 4, 8):
        raise FormatError(f"quantization_config.bits is {str(bits)[:40]!r}; GPTQ has 2, 3, 4 or 8", path=home.config)
    if type(group) is not int or group == 0 or group < -1:
        raise FormatError(f"quantization_config.group_size is {str(group)[:40]!r}; expected -1 or a positive number",
                          path=home.config)
    layout = quantization.get("checkpoint_format", "gptq")
    if layout not in _OFFSETS:
        raise UnsupportedError(f"{home.config}: GPTQ weights in the layout {str(layout)[:40]!r}; edgewise reads "
                               f"{' and '.join(_OFFSETS)}; save the model again in one of them")
    if quantization.get("dynamic"):
        raise UnsupportedError(f"{home.config}: GPTQ with settings per module ('dynamic') is not read; quantise with "
                               "one setting, or from the float model with `edgewise quantize`")
    found = Foreign()
    for module in home.modules("qweight"):
        found.makers[f"{module}.weight"] = _maker(home, module, bits, group, _OFFSETS[layout])
        found.parts |= {f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    return _without_empty_biases(home, found)


def _without_empty_biases(home: Home, found: Foreign) -> Foreign:
    """Older tools write a bias of zeros for each linear that has none; where every one is, none is read."""
    biases = [name for weight in found.makers if (name := f"{weight.removesuffix('weight')}bias") in home.files]
    if not any(home.files.dense(name).data.any() for name in biases):
        found.parts.update(biases)
    return found


def _maker(home: Home, module: str, bits: int, group: int, offset: int) -> Callable[[], Stored]:
    words, out = home.entry(f"{module}.qweight", ("I32",), 2)
    inputs = words * 32 // bits
    size = inputs if group == -1 else group
    groups = -(-inputs // size) if size else 0
    if not inputs or not out or words * 32 % bits:
        raise home.fail(f"{words} words of {bits}-bit codes are no whole number of inputs", f"{module}.qweight")
    home.shaped(f"{module}.scales", _SCALES, (groups, out))
    home.shaped(f"{module}.qzeros", ("I32",), (groups, -(-out * bits // 32)))
    if f"{module}.g_idx" in home.files:
        home.shaped(f"{module}.g_idx", ("I32",), (inputs,))

    def make() -> Stored:
        codes = from_words(home.files.array(f"{module}.qweight").T, inputs, bits)
        zeros = from_words(home.files.array(f"{module}.qzeros"), out, bits)
        zeros = (zeros + np.uint8(offset)) & np.uint8((1 << bits) - 1)
        scales, number = home.scales(f"{module}.scales")
        order = home.files.array(f"{module}.g_idx") if f"{module}.g_idx" in home.files else None
        if order is not None and not ((order >= 0) & (order < groups)).all():
            raise home.fail(f"a group index is outside 0..{groups - 1}", f"{module}.g_idx")
        return ordered(codes, np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T), bits, number, size, order,
                       f"{module}.weight")

    return make
