"""Folders in the compressed-tensors layout (llm-compressor, vLLM, transformers): read, and written for other software.

quantization_config.config_groups says for groups of linears how their weights are quantised: num_bits, type int or
float, symmetric or not, strategy tensor, channel or group with group_size. A linear `m`, (out, in), is stored as

    pack-quantized   m.weight_packed  int32 (out, ceil(in * b / 32)): each row a stream of b-bit codes, lowest first,
                                      a signed code c as c + 2^(b-1)
                     m.weight_shape   int64 (2,): out, in
    int-quantized    m.weight         int8 (out, in)
    float-quantized  m.weight         float8_e4m3 (out, in)
    all of them      m.weight_scale   (out, groups), (out, 1) for channel, (1,) for tensor
                     m.weight_zero_point  when not symmetric: int8 of the scale's shape; packed along the outputs,
                                      int32 (ceil(out * b / 32), groups), in pack-quantized

value = (code - zero) * scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import FormatError, InvalidValueError, UnsupportedError, notice
from edgewise.core.numbers import BF16, E4M3, FP16, FP32, Granularity, QuantFormat, float32_to_bf16
from edgewise.core.storage import QuantizedTensor, Stored
from edgewise.formats.foreign import Foreign, Home, from_words, ordered, quantised, to_words
from edgewise.formats.quantized_folder import Part

__all__ = ["described", "parts_of", "read"]

_SCALES = ("F16", "BF16", "F32")
_DTYPE = {FP16: "F16", BF16: "BF16", FP32: "F32"}
_EXTRA = ("weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")
_RUNTIME = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale")
_LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")


# ---- reading ------------------------------------------------------------------------------------------------------

def read(quantization: Mapping[str, Any], home: Home) -> Foreign:
    """Every linear that has a weight_scale."""
    _refuse(quantization, home)
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(
            isinstance(group, dict) and isinstance(group.get("targets", []), list) for group in groups.values()):
        raise FormatError("quantization_config.config_groups must be an object of groups with a list of targets",
                          path=home.config)
    if any(group.get("input_activations") or group.get("output_activations") for group in groups.values()):
        notice("ignored", "the file's own rounding of activations is not applied; edgewise rounds inputs to 8 bits, "
               "with a scale per block of 32", where=str(home.config))
    found = Foreign()
    for module in home.modules("weight_scale"):
        found.makers[f"{module}.weight"] = _maker(home, module, _scheme_of(module, groups, home))
        found.parts |= {f"{module}.{part}" for part in ("weight_packed", "weight", *_EXTRA)}
    found.parts |= {name for name in home.files if name.rsplit(".", 1)[-1] in _RUNTIME}
    return found


def _refuse(quantization: Mapping[str, Any], home: Home) -> None:
    layout = quantization.get("format", "dense")
    if layout not in _LAYOUTS:
        raise UnsupportedError(f"{home.config}: compressed-tensors in the layout {str(layout)[:40]!r}; edgewise reads "
                               f"{', '.join(_LAYOUTS[:4])}")
    sparsity = quantization.get("sparsity_config") or {}
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise UnsupportedError(f"{home.config}: compressed-tensors with sparse storage "
                               f"{str(sparsity['format'])[:40]!r}, which edgewise does not read")
    if quantization.get("transform_config"):
        raise UnsupportedError(f"{home.config}: compressed-tensors with rotations (transform_config), which edgewise "
                               "does not apply")
    if quantization.get("kv_cache_scheme"):
        notice("ignored", "the file's own rounding of keys and values is not applied; --kv chooses ours",
               where=str(home.config))


def _scheme_of(module: str, groups: Mapping[str, Any], home: Home) -> Mapping[str, Any]:
    """How the weight of a linear is quantised: of its name, of a pattern, or of the class Linear, in that order."""
    ranked = sorted((_rank(target, module), name) for name, group in groups.items()
                    for target in group.get("targets", ["Linear"]) if _rank(target, module) < 3)
    if not ranked:
        raise FormatError("no group of quantization_config.config_groups names it", path=home.config,
                          tensor=module[:200])
    scheme = groups[ranked[0][1]].get("weights")
    bits = scheme.get("num_bits") if isinstance(scheme, dict) else None
    if not isinstance(scheme, dict) or type(bits) is not int or not 1 <= bits <= 8:
        raise FormatError(f"its group of quantization_config has no weights of 1 to 8 bits; given {str(scheme)[:80]}",
                          path=home.config, tensor=module[:200])
    return scheme


def _rank(target: Any, module: str) -> int:
    if not isinstance(target, str):
        return 3
    if target.startswith("re:"):
        try:
            return 1 if len(target) <= 500 and re.match(target[3:], module) else 3
        except re.error:
            return 3
    return 0 if target == module else 2 if target == "Linear" else 3


def _maker(home: Home, module: str, scheme: Mapping[str, Any]) -> Callable[[], Stored]:
    bits, strategy = int(scheme["num_bits"]), scheme.get("strategy") or ("group" if scheme.get("group_size") else
                                                                         "tensor")
    packed = f"{module}.weight_packed" in home.files
    if packed:
        home.shaped(f"{module}.weight_shape", ("I64", "I32"), (2,))
        out, inputs = (int(size) for size in home.files.array(f"{module}.weight_shape"))
        if out < 1 or inputs < 1:
            raise home.fail(f"a weight of shape ({out}, {inputs})", f"{module}.weight_shape")
        home.shaped(f"{module}.weight_packed", ("I32",), (out, -(-inputs * bits // 32)))
    else:
        out, inputs = home.entry(f"{module}.weight", ("I8", "F8_E4M3"), 2)
        if (home.files[f"{module}.weight"].dtype == "F8_E4M3") != (scheme.get("type", "int") == "float"):
            raise home.fail(f"its dtype does not fit the type {str(scheme.get('type'))[:20]!r} of its group",
                            f"{module}.weight")
    group = scheme.get("group_size") if strategy == "group" else inputs
    if strategy not in ("tensor", "channel", "group") or type(group) is not int or group < 1:
        raise UnsupportedError(f"{home.config}, {module}: scales per {str(strategy)[:20]} (group_size "
                               f"{str(scheme.get('group_size'))[:20]}); edgewise reads tensor, channel and group")
    groups = -(-inputs // group)
    rank = len(home.files[f"{module}.weight_scale"].shape)
    scale_shape = (1,) if strategy == "tensor" and rank == 1 else (1, 1) if strategy == "tensor" else (out, groups)
    home.shaped(f"{module}.weight_scale", _SCALES, scale_shape)
    symmetric = scheme.get("symmetric", True) is not False
    if not symmetric:
        zero_shape = (-(-out * bits // 32), groups) if packed and strategy != "tensor" else scale_shape
        home.shaped(f"{module}.weight_zero_point", ("I32",) if packed and strategy != "tensor" else ("I8",),
                    zero_shape)
    if f"{module}.weight_g_idx" in home.files:
        home.shaped(f"{module}.weight_g_idx", ("I32",), (inputs,))

    def make() -> Stored:
        scales, number = home.scales(f"{module}.weight_scale")
        granularity = (Granularity("tensor") if strategy == "tensor" else
                       Granularity("group", group) if group < inputs else Granularity("axis"))
        scales = scales.reshape(1, 1) if strategy == "tensor" else scales
        middle = 1 << (bits - 1)
        if packed:
            codes = from_words(home.files.array(f"{module}.weight_packed"), inputs, bits)
        elif home.files[f"{module}.weight"].dtype == "F8_E4M3":
            return QuantizedTensor(home.files.array(f"{module}.weight"), scales,
                                   QuantFormat(E4M3, granularity, number))
        else:
            codes = (home.files.array(f"{module}.weight").astype(np.int16) + middle).astype(np.uint8)
        zeros = np.full(scales.shape, middle, np.uint8)
        if not symmetric:
            given = home.files.array(f"{module}.weight_zero_point")
            zeros = (from_words(given.T, out, bits).T if given.dtype == np.int32 else
                     (given.astype(np.int16) + middle).astype(np.uint8).reshape(scales.shape))
        if f"{module}.weight_g_idx" in home.files and strategy == "group":
            order = home.files.array(f"{module}.weight_g_idx")
            if not (order < 0).any():  # -1 throughout says that there is no order
                if not (order < groups).all():
                    raise home.fail(f"a group index is outside 0..{groups - 1}", f"{module}.weight_g_idx")
                return ordered(codes, scales, zeros, bits, number, group, order, f"{module}.weight")
        return quantised(codes, scales, np.ascontiguousarray(zeros), bits, number, granularity)

    return make


# ---- writing ------------------------------------------------------------------------------------------------------

def parts_of(tensor: QuantizedTensor, name: str) -> tuple[str, dict[str, Part]] | None:
    """A quantised weight as its description ("int4/g32/fp16") and its entries; None where the layout cannot hold it.

    It holds integers of 1 to 8 bits, with or without integer zero points, and E4M3, with scales in fp16, bf16 or fp32.
    """
    fmt, module = tensor.format, name.removesuffix(".weight")
    group = fmt.granularity.group
    if (not name.endswith(".weight") or fmt.scale not in _DTYPE or fmt.n_m or fmt.prefixes or fmt.zero == "min"
            or (fmt.granularity.kind == "group" and tensor.shape[1] % group)):
        return None
    scales = tensor.scales.reshape(1) if fmt.granularity.kind == "tensor" else tensor.scales
    values = float32_to_bf16(scales) if fmt.scale == BF16 else scales.astype(np.float16 if fmt.scale == FP16 else
                                                                             np.float32)
    parts = {f"{module}.weight_scale": Part(_DTYPE[fmt.scale], values)}
    if fmt.element == E4M3:
        return str(fmt), {f"{module}.weight": Part("F8_E4M3", tensor.codes), **parts}
    bits = fmt.element.bits
    if fmt.element.kind != "int" or bits > 8 or (fmt.zero == "none") != fmt.element.signed:
        return None
    middle = 1 << (bits - 1) if fmt.zero == "none" else 0
    codes = (tensor.codes.astype(np.int16) + middle).astype(np.uint8)
    packed = {f"{module}.weight_packed": Part("I32", to_words(codes, bits)),
              f"{module}.weight_shape": Part("I64", np.array(tensor.shape, np.int64)), **parts}
    if fmt.zero == "int":
        if fmt.granularity.kind == "tensor":
            return None
        assert tensor.zeros is not None
        zeros = np.ascontiguousarray(tensor.zeros.T).astype(np.uint8)
        packed[f"{module}.weight_zero_point"] = Part("I32", np.ascontiguousarray(to_words(zeros, bits).T))
    return str(fmt), packed


def described(checkpoint: Checkpoint, formats: Mapping[str, str]) -> dict[str, Any]:
    """quantization_config of a folder whose weights `name` have the formats that parts_of gave them."""
    if not formats:
        raise InvalidValueError(f"{checkpoint.source}: no weight is in a format that compressed-tensors holds "
                                "(int1 to int8 without minima, or e4m3); quantise it first, for example with "
                                "`edgewise convert --format int4/g32/fp16`")
    groups: dict[str, Any] = {}
    for place, text in enumerate(dict.fromkeys(formats.values())):
        fmt = QuantFormat.parse(text)
        kind = fmt.granularity.kind
        weights = {"num_bits": fmt.element.bits, "type": "float" if fmt.element == E4M3 else "int",
                   "symmetric": fmt.zero == "none", "strategy": {"axis": "channel"}.get(kind, kind), "dynamic": False,
                   "group_size": fmt.granularity.group if kind == "group" else None}
        groups[f"group_{place}"] = {
            "targets": [name.removesuffix(".weight") for name, given in formats.items() if given == text],
            "weights": weights, "input_activations": None, "output_activations": None,
            "format": "float-quantized" if fmt.element == E4M3 else "pack-quantized"}
    layouts = {group["format"] for group in groups.values()}
    return {"quant_method": "compressed-tensors", "quantization_status": "compressed", "config_groups": groups,
            "format": layouts.pop() if len(layouts) == 1 else "mixed-precision", "ignore": [],
            "kv_cache_scheme": None, "global_compression_ratio": None}
