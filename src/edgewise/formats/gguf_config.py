"""GGUF's hyperparameter keys to config.json and back, rotary scaling included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import FormatError, InvalidValueError, UnsupportedError, notice
from edgewise.core.shapes import LayerShape, config_with_shapes, shapes_of
from edgewise.formats.gguf_families import complete, flattened
from edgewise.formats.gguf_file import GgufMetadata
from edgewise.formats.gguf_names import DECI, GgufArch

__all__ = ["ROPE_DIVISORS", "config_of_keys", "keys_of_config", "llama3_divisors",
           "rope_of_config", "said_in_arrays", "scaling_of_divisors"]

Float32 = NDArray[np.float32]

# Keys below "<arch>." that say nothing a config.json would say, or are handled by name below.
_SILENT = {"rope.dimension_count", "attention.value_length", "attention.causal", "pooling_type", "expert_count",
           "expert_used_count", "expert_weights_scale", "attention.scale", "decoder_start_token_id"}
_LARGEST = 1 << 31
_PER_LAYER = {"attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
              "feed_forward_length": "intermediate_size"}
ROPE_DIVISORS = "rope_freqs.weight"
"""The one tensor that stands for a configuration: what each rotary frequency is divided by."""


def config_of_keys(metadata: GgufMetadata, arch: GgufArch, path: Path) -> dict[str, Any]:
    """config.json of a file's keys. Numbers are checked to be of their kind; keys without a place are reported."""
    config: dict[str, Any] = {"model_type": arch.hf, **arch.constants}
    prefix = f"{arch.gguf}."
    for key in metadata.below(prefix):
        name = key.removeprefix(prefix)
        if name == "attention.sliding_window" and metadata[key] == 0:
            continue  # some converters write 0 for none
        if name in _PER_LAYER and arch is DECI and isinstance(metadata[key], np.ndarray):
            config[arch.keys[name]] = _largest_of_layers(metadata, key, path)
        elif name in arch.keys:
            config[arch.keys[name]] = _number(metadata, key, path)
        elif name not in _SILENT and not name.startswith("rope.scaling."):
            notice("ignored", f"key {key} has no place in the configuration of {arch.hf}", where=str(path))
    for key, name in ((k, n) for k, n in arch.keys.items() if n in arch.required and n not in config):
        raise FormatError(f"key {prefix}{key} is missing, which {arch.hf} needs as {name}", path=path)
    for name, value in arch.defaults.items():
        config.setdefault(name, value)
    if "num_attention_heads" in config and "rms_norm_eps" in config:
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
        if arch is DECI and isinstance(metadata.get("deci.attention.head_count"), np.ndarray):
            config["num_key_value_heads"] = math.gcd(config["num_attention_heads"], config["num_key_value_heads"])
        _check_heads(metadata, config, prefix, path, part_may_turn=arch.hf == "phi3")
    if arch is DECI:
        config = _with_layers(metadata, config, path)
    complete(config, metadata, arch, path)
    if "rope_theta" in config:
        config["rope_scaling"] = _scaling(metadata, prefix, config, path)
    return config


def _of_layers(metadata: GgufMetadata, key: str, path: Path) -> list[int]:
    value = metadata[key]
    whole = isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu" and value.size
    if not whole or value.min() < 0 or value.max() >= _LARGEST:
        raise FormatError(f"key {key} is a number, or an array of one for each layer, 0 for none; found "
                          f"{str(value)[:60]}", path=path, offset=metadata.offset(key))
    found: list[int] = value.tolist()
    return found


def _largest_of_layers(metadata: GgufMetadata, key: str, path: Path) -> int:
    return max(1, *_of_layers(metadata, key, path))


def _with_layers(metadata: GgufMetadata, config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration with the layers that arrays describe."""
    count, size = config["num_hidden_layers"], config["head_dim"]
    columns = []
    for name, theirs in _PER_LAYER.items():
        key = f"deci.{name}"
        several = key in metadata and isinstance(metadata[key], np.ndarray)
        columns.append(_of_layers(metadata, key, path) if several else [config[theirs]])
    if any(len(column) not in (1, count) for column in columns):
        raise FormatError(f"deci.{' and deci.'.join(_PER_LAYER)} have {[len(c) for c in columns]} elements for "
                          f"{count} layers", path=path)
    if all(len(column) == 1 for column in columns):
        return config
    shapes = []
    for index in range(count):
        heads, kv_heads, width = (column[index % len(column)] for column in columns)
        if heads and not kv_heads:
            raise UnsupportedError(f"{path}: layer {index} has a linear map in place of attention (head_count_kv 0), "
                                   "which edgewise does not run")
        try:
            shapes.append(LayerShape(heads, kv_heads if heads else 0, size, size, width) if heads
                          else LayerShape(0, 0, 0, 0, width))
        except InvalidValueError as error:
            raise FormatError(f"layer {index}: {error}", path=path) from None
    return config_with_shapes(config, shapes, size)


def said_in_arrays(config: Mapping[str, Any]) -> bool:
    """Whether GGUF's deci says what `layer_shapes` does: whole heads, attention in the first layer, a feed-forward in
    each, as llama.cpp reads it."""
    shapes, size = shapes_of(config), config.get("head_dim")
    return shapes is not None and shapes[0].heads > 0 and all(
        shape.width > 0 and shape.pairs is None and (not shape.heads or shape.key_dim == shape.value_dim == size)
        for shape in shapes)


def _number(metadata: GgufMetadata, key: str, path: Path) -> int | float:
    """A positive number; an array is taken when all its elements are equal."""
    value = metadata[key]
    offset = metadata.offset(key)
    if isinstance(value, np.ndarray) and value.size and bool((value == value[0]).all()):
        value = value[0].item()
    if isinstance(value, (np.ndarray, list)):
        raise UnsupportedError(f"{path}: {key} differs from layer to layer, which edgewise does not run")
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        raise FormatError(f"key {key} is not a number", path=path, offset=offset)
    if not math.isfinite(value) or not 0 < value < _LARGEST:
        raise FormatError(f"key {key} is {value}; expected a positive number below 2^31", path=path, offset=offset)
    if isinstance(value, float):
        return float(str(np.float32(value)))  # 1e-05 rather than 9.999999747378752e-06
    return value


def _check_heads(metadata: GgufMetadata, config: dict[str, Any], prefix: str, path: Path, *,
                 part_may_turn: bool) -> None:
    heads = config["num_attention_heads"]
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim"):
        if name in config and not isinstance(config[name], int):
            raise FormatError(f"the key of {name} holds {config[name]}, which is not an integer", path=path)
    if "head_dim" not in config:
        if config["hidden_size"] % heads:
            raise FormatError(f"{prefix}embedding_length {config['hidden_size']} is not a multiple of "
                              f"{prefix}attention.head_count {heads}", path=path)
        config["head_dim"] = config["hidden_size"] // heads
    if heads % config["num_key_value_heads"]:
        raise FormatError(f"{prefix}attention.head_count {heads} is not a multiple of head_count_kv "
                          f"{config['num_key_value_heads']}", path=path)
    for key in ("attention.value_length", *(() if part_may_turn else ("rope.dimension_count",))):
        size = metadata.integer(prefix + key, config["head_dim"])
        if size != config["head_dim"]:
            raise UnsupportedError(f"{path}: {prefix}{key} is {size} where heads have {config['head_dim']} dimensions; "
                                   "edgewise runs this architecture with both equal")


def _scaling(metadata: GgufMetadata, prefix: str, config: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    kind = metadata.get(f"{prefix}rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(f"{path}: {prefix}rope.scaling.type is {str(kind)[:40]!r}; "
                               "expected none, linear or yarn")
    factor = f"{prefix}rope.scaling.factor"
    scaling: dict[str, Any] = {
        "rope_type": kind, "factor": float(_number(metadata, factor, path)) if factor in metadata else 1.0}
    original = f"{prefix}rope.scaling.original_context_length"
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = (
            _number(metadata, original, path) if original in metadata else config["max_position_embeddings"])
        for ours, theirs in _YARN.items():
            if (key := f"{prefix}rope.scaling.{ours}") in metadata:
                scaling[theirs] = _number(metadata, key, path)
    return scaling


_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "attn_factor": "attention_factor"}


def llama3_divisors(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> Float32:
    """What Llama 3 divides each rotary frequency by, (head_dim / 2,) float32, as GGUF keeps it in rope_freqs.

    Frequencies below low_freq_factor turns in the original context are divided by `factor`, those above
    high_freq_factor turns are kept, and in between the frequency goes linearly from one to the other.
    """
    size = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    frequency = float(config["rope_theta"]) ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    turns = float(scaling["original_max_position_embeddings"]) * frequency / (2 * np.pi)
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - keep) / float(scaling["factor"]) + keep)).astype(np.float32)


def scaling_of_divisors(divisors: Float32, config: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """The rope_scaling of config.json that gives these divisors: Llama 3's with its published constants, or None."""
    size = config["head_dim"] // 2
    if divisors.shape != (size,) or not np.isfinite(divisors).all() or divisors.min() <= 0:
        raise FormatError(f"expected {size} positive divisors; found shape {divisors.shape}", path=path,
                          tensor=ROPE_DIVISORS)
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    return scaling if np.allclose(llama3_divisors(config, scaling), divisors, rtol=1e-5, atol=0) else None


def keys_of_config(config: Mapping[str, Any], arch: GgufArch, *, where: str) -> dict[str, Any]:
    """GGUF's hyperparameter keys of a config.json, prefix included; integers as int, the rest as float."""
    config = flattened(config, arch, where=where)
    rope = rope_of_config(config)
    config = {**arch.defaults, **config}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    keys: dict[str, Any] = {}
    shapes = shapes_of(config, where)
    for key, name in arch.keys.items():
        value = config.get(name)
        if value is not None:
            keys[f"{arch.gguf}.{key}"] = float(value) if name.endswith(("_eps", "_theta", "_freq")) else int(value)
    if missing := [name for name in arch.required if config.get(name) is None]:
        raise FormatError(f"the configuration lacks {', '.join(missing)}, which a GGUF file of {arch.gguf} needs",
                          path=where or None)
    for name, value in arch.constants.items():
        if config.get(name, value) != value:
            raise UnsupportedError(f"{where}: {name} is {config[name]!r}; GGUF's {arch.gguf} implies {value!r} and has "
                                   "no key for another")
    if shapes is not None:  # whole heads, of a length that need not divide the hidden size
        keys |= {f"{arch.gguf}.attention.head_count": [shape.heads for shape in shapes],
                 f"{arch.gguf}.attention.head_count_kv": [shape.kv_heads for shape in shapes],
                 f"{arch.gguf}.feed_forward_length": [shape.width for shape in shapes]}
    if "rope.freq_base" in arch.keys:
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        if shapes is not None or size * config["num_attention_heads"] != config["hidden_size"]:  # else divided from it
            keys[f"{arch.gguf}.attention.value_length"] = int(size)
        keys[f"{arch.gguf}.rope.dimension_count"] = int(size * float(config.get("partial_rotary_factor") or 1.0))
        if "attention.scale" in config:
            keys[f"{arch.gguf}.attention.scale"] = float(config["attention.scale"])
        keys.setdefault(f"{arch.gguf}.attention.head_count_kv", keys[f"{arch.gguf}.attention.head_count"])
        keys.update(_scaling_keys(rope, f"{arch.gguf}.rope.scaling.", where))
    else:
        keys[f"{arch.gguf}.attention.causal"] = False
    return keys


def rope_of_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary section of a config.json, whichever of its two names it has."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _scaling_keys(rope: Mapping[str, Any], prefix: str, where: str) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "llama3"):  # Llama 3's factors are a tensor
        return {}
    if kind == "longrope" and prefix.startswith("phi3."):  # its factors are tensors
        return {f"{prefix}attn_factor": float(rope["attention_factor"])}
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(f"{where}: rotary scaling {kind!r} has no GGUF key; linear, yarn and llama3 have")
    keys: dict[str, Any] = {f"{prefix}type": kind, f"{prefix}factor": float(rope["factor"])}
    if "original_max_position_embeddings" in rope:
        keys[f"{prefix}original_context_length"] = int(rope["original_max_position_embeddings"])
    keys.update({prefix + ours: float(rope[theirs]) for ours, theirs in _YARN.items() if rope.get(theirs) is not None})
    return keys
