"""What a family's config.json says in another way than its GGUF keys: Gemma 3's two kinds of layers, Phi-3's factors.

`complete` goes from a file's keys to config.json, `flattened` from config.json to what keys can say. What a file cannot
say is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import FormatError, UnsupportedError, notice
from edgewise.core.storage import Stored
from edgewise.formats.gguf_file import GgufMetadata
from edgewise.formats.gguf_names import GgufArch

__all__ = ["LONG_FACTORS", "complete", "feed_forward_of_t5", "flattened", "long_factors", "with_factors"]

LONG_FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
"""LongRoPE's keys in config.json -> the tensors that hold them."""

_LAYERS_OF_27B = 62


def complete(config: dict[str, Any], metadata: GgufMetadata, arch: GgufArch, path: Path) -> None:
    """Add to a config.json what only this family has."""
    prefix = f"{arch.gguf}."
    if arch.hf == "gemma3_text":
        given = metadata.get(f"{prefix}attention.scale")
        if isinstance(given, float) and math.isfinite(given) and given > 0:
            scalar = given**-2
            whole = round(scalar)  # transformers takes whole numbers; the key is a float32
            config["query_pre_attn_scalar"] = whole if math.isclose(scalar, whole, rel_tol=1e-6) else scalar
        else:
            config["query_pre_attn_scalar"] = _usual_scalar(config)
    if arch.hf == "t5":
        config["decoder_start_token_id"] = metadata.integer(f"{prefix}decoder_start_token_id", 0)
    if arch.hf == "phi3":
        size, dims = config["head_dim"], metadata.integer(f"{prefix}rope.dimension_count", config["head_dim"])
        if not 0 < dims <= size:
            raise FormatError(f"key {prefix}rope.dimension_count is {dims}; heads have {size} dimensions", path=path,
                              offset=metadata.offset(f"{prefix}rope.dimension_count"))
        if dims != size:  # transformers takes int(size * factor)
            factor = dims / size
            config["partial_rotary_factor"] = factor if int(size * factor) == dims else math.nextafter(factor, 1.0)


def feed_forward_of_t5(config: dict[str, Any], makers: dict[str, Callable[[], Stored]]) -> None:
    """Files say by a gate whether they are of T5 1.1; without one, what they call ffn_up is T5's only wi."""
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in makers
    config["feed_forward_proj"] = "gated-gelu" if gated else "relu"
    if not gated:
        for name in [name for name in makers if name.endswith(".wi_1.weight")]:
            makers[name.replace(".wi_1.", ".wi.")] = makers.pop(name)


def with_factors(config: dict[str, Any], factors: Mapping[str, NDArray[np.float32]], metadata: GgufMetadata,
                 path: Path) -> None:
    """LongRoPE as config.json has it, from the tensors that hold its factors. factors: by LONG_FACTORS' keys."""
    dims = int(config["head_dim"] * config.get("partial_rotary_factor", 1.0))
    for name, values in factors.items():
        if values.shape != (dims // 2,) or not np.isfinite(values).all() or values.min() <= 0:
            raise FormatError(f"expected {dims // 2} positive factors; found shape {values.shape}", path=path,
                              tensor=LONG_FACTORS[name])
    if factors.keys() != LONG_FACTORS.keys():
        raise FormatError(f"the file has one of {', '.join(LONG_FACTORS.values())} without the other", path=path)
    attention = metadata.get("phi3.rope.scaling.attn_factor", 1.0)  # llama.cpp takes 1 where it is missing
    if not isinstance(attention, float) or not math.isfinite(attention) or attention <= 0:
        raise FormatError(f"key phi3.rope.scaling.attn_factor is {str(attention)[:40]}; expected a positive number",
                          path=path)
    config["rope_scaling"] = {"rope_type": "longrope", "attention_factor": attention,
                              **{name: [float(value) for value in values] for name, values in factors.items()}}


def long_factors(config: Mapping[str, Any], rope: Mapping[str, Any], where: str) -> dict[str, NDArray[np.float32]]:
    """GGUF name -> the factors of a LongRoPE section, (rotary_dim / 2,) float32."""
    dims = int(_head_dim(config) * rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0))
    made = {}
    for name, tensor in LONG_FACTORS.items():
        values = np.asarray(rope.get(name) or (), np.float32)
        if values.shape != (dims // 2,):
            raise FormatError(f"the rotary scaling's {name} is not a list of {dims // 2} numbers", path=where or None)
        made[tensor] = values
    return made


def flattened(config: Mapping[str, Any], arch: GgufArch, *, where: str) -> dict[str, Any]:
    """The configuration in the form that keys are made of. Raises UnsupportedError for what no key can say."""
    flat = dict(config)
    if arch.experts and flat.get(arch.experts) is None:  # two names are in use for one number
        flat[arch.experts] = flat.get("num_local_experts", flat.get("num_experts"))
    if arch.hf in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe") and flat.get("use_sliding_window"):
        raise UnsupportedError(f"{where}: use_sliding_window is true; GGUF's {arch.gguf} has no window")
    if arch.experts and (flat.get("mlp_only_layers") or flat.get("decoder_sparse_step", 1) != 1):
        raise UnsupportedError(f"{where}: some layers have no experts; GGUF's {arch.gguf} implies that all have")
    if arch.hf == "gemma3_text":
        _flatten_gemma3(flat, where)
    if arch.hf == "phi3":
        _flatten_phi3(flat)
    return flat


def _flatten_gemma3(flat: dict[str, Any], where: str) -> None:
    sections = flat.get("rope_parameters") or {}
    if isinstance(sections.get("full_attention"), Mapping):
        flat.pop("rope_parameters")
        full, local = dict(sections["full_attention"]), dict(sections.get("sliding_attention") or {})
        flat["rope_theta"] = full.pop("rope_theta", 1_000_000.0)
        flat["rope_local_base_freq"] = local.get("rope_theta", 10_000.0)
        flat["rope_scaling"] = full if full.get("rope_type", "default") != "default" else None
        if local.get("rope_type", "default") != "default":
            raise UnsupportedError(f"{where}: the local layers scale their rotary embedding; GGUF's gemma3 cannot")
    kinds = flat.get("layer_types")
    if kinds is not None:
        slides = [kind == "sliding_attention" for kind in kinds]
        period = next((p for p in range(2, len(kinds) + 2)
                       if slides == [(i + 1) % p != 0 for i in range(len(kinds))]), None)
        if period is None:
            raise UnsupportedError(f"{where}: layer_types have no period; GGUF's gemma3 has one global layer in every "
                                   "sliding_window_pattern")
        flat["sliding_window_pattern"] = period
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if flat.get(key) is not None:
            raise UnsupportedError(f"{where}: {key} is set; GGUF's gemma3 has no key for it")
    scalar = float(flat.get("query_pre_attn_scalar") or 256)
    if scalar != _usual_scalar(flat):
        flat["attention.scale"] = scalar**-0.5
        notice("degraded", f"query_pre_attn_scalar is {scalar:g}, not {_usual_scalar(flat)}: written as the key "
               "gemma3.attention.scale, which other readers may not know", where=where)


def _flatten_phi3(flat: dict[str, Any]) -> None:
    rope = dict(flat.get("rope_scaling") or flat.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    flat["partial_rotary_factor"] = rope.get("partial_rotary_factor", flat.get("partial_rotary_factor") or 1.0)
    if kind not in ("longrope", "su", "yarn"):
        flat.pop("original_max_position_embeddings", None)
        return
    original = flat.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    longest = flat.get("max_position_embeddings", 4096)
    flat["original_max_position_embeddings"] = original = original or longest
    factor = rope.get("factor") or longest / original
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    given = rope.get("attention_factor")
    flat["rope_scaling"] = {**rope, "rope_type": "longrope", "attention_factor": usual if given is None else given}


def _usual_scalar(config: Mapping[str, Any]) -> int:
    """What GGUF's gemma3 implies: the size of a head, for the model of 27 billion hidden / heads."""
    if config["num_hidden_layers"] == _LAYERS_OF_27B:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config.get("head_dim") or 256)


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
