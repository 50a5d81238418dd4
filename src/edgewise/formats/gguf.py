"""GGUF files as Checkpoints: Hugging Face's names, keys and rotary layout, tensors as views of the mapped file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import FormatError, notice
from edgewise.core.storage import Blocks, Dense, LazyTensors, QuantizedTensor, Stored, rows_of
from edgewise.formats.ggml_blocks import PLAIN, codec, ggml_bytes, type_of
from edgewise.formats.gguf_config import ROPE_DIVISORS, config_of_keys, scaling_of_divisors
from edgewise.formats.gguf_families import LONG_FACTORS, feed_forward_of_t5, with_factors
from edgewise.formats.gguf_file import GgufMetadata, GgufShards, read_gguf_raw
from edgewise.formats.gguf_names import GgufArch, arch_of_file
from edgewise.formats.gguf_rotary import split_rotary
from edgewise.formats.gguf_writer import LINEAGE, write_gguf, write_gguf_raw
from edgewise.formats.mapped import read_ahead, release_pages

__all__ = ["check_finite", "read_gguf", "read_gguf_raw", "write_gguf", "write_gguf_raw"]

_POOLING = {1: "mean", 2: "cls", 3: "last"}


def read_gguf(path: str | Path) -> Checkpoint:
    """A model from a GGUF file, or from all shards when given one of them.

    Nothing is copied but the rows of query and key weights, whose rotary pairs are moved from GGUF's interleaved
    order to rotate-half; they are copied each time they are asked for. A tensor with a NaN or infinite scale is
    refused when its values are first asked for. Raises SourceError, FormatError (file, tensor, byte offset),
    UnsupportedError.
    """
    shards = GgufShards.open(path)
    path = Path(path)
    metadata = shards.metadata
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise FormatError("key general.architecture is missing or not a string", path=path)
    arch = arch_of_file(name, where=str(path), experts=metadata.integer(f"{name[:64]}.expert_count", 0) > 0)
    config = config_of_keys(metadata, arch, path)
    tensors = _tensors(shards, arch, config, path)
    _complete_config(config, shards, arch, path)
    return Checkpoint(
        arch=config["model_type"], config=config, tensors=tensors, metadata=_metadata(metadata, arch, config, path),
        lineage=_lineage(metadata, path), source=str(path), files=tuple(str(file.path) for file in shards.files))


def check_finite(checkpoint: Checkpoint) -> None:
    """Read the scales of every tensor once, so that one that is NaN or infinite is an error now.

    Tensors of `read_gguf` check themselves when their values are first asked for, and name the byte; this asks for
    all of them, and looks at those of other origin too.
    """
    for name in checkpoint.tensors:
        stored = checkpoint.tensors[name]
        if isinstance(stored, QuantizedTensor):
            finite = bool(np.isfinite(stored.scales).all())
        elif kind := type_of(stored):
            finite = codec(kind).nonfinite_byte(ggml_bytes(stored, kind)) is None
        else:
            finite = bool(np.isfinite(stored.dense()).all())
        if not finite:
            raise FormatError("holds scales or values that are NaN or infinite", path=checkpoint.source or None,
                              tensor=name)


def _tensors(shards: GgufShards, arch: GgufArch, config: dict[str, Any], path: Path) -> LazyTensors:
    makers: dict[str, Callable[[], Stored]] = {}
    checked: set[str] = set()

    def whole(name: str) -> Stored:
        if name not in checked:
            shards.home[name].check_finite(name)
            checked.add(name)
            release_pages(shards.home[name].raw(name))
        return shards.stored(name)

    def maker(name: str, heads: int | None) -> Callable[[], Stored]:
        def make() -> Stored:
            stored = whole(name)
            if arch.is_raised(name):
                return Dense(stored.dense() - np.float32(arch.norm_offset))
            if arch.is_row(name):
                return Dense(stored.dense().reshape(1, -1))
            moved = stored if heads is None else split_rotary(stored, heads)
            release_pages(shards.home[name].raw(name))  # read for the check, and for the copy
            return moved

        kind, shape = shards.home[name].tensors[name].type, shards.shape(name)
        if len(shape) < 2 or arch.is_raised(name) or arch.is_row(name):
            return make
        if kind in PLAIN:
            return lambda: Dense.later(lambda: dense_of(make()).data, PLAIN[kind][1], shape)
        return lambda: Blocks.later(lambda: blocks_of(make()).raw, codec(kind), shape)

    def expert(name: str, number: int) -> Callable[[], Stored]:
        kind, shape = shards.home[name].tensors[name].type, shards.shape(name)
        if kind in PLAIN:
            return lambda: Dense.later(lambda: dense_of(rows_of(whole(name), number)).data, PLAIN[kind][1], shape[1:])
        return lambda: Blocks.later(lambda: blocks_of(rows_of(whole(name), number)).raw, codec(kind), shape[1:])

    def dense_of(stored: Stored) -> Dense:
        assert isinstance(stored, Dense)
        return stored

    def blocks_of(stored: Stored) -> Blocks:
        assert isinstance(stored, Blocks)
        return stored

    # Vectors lie all over the file: asked for together, they come from a disk in the time of one.
    for name, file in shards.home.items():
        if len(shards.shape(name)) == 1:
            read_ahead(file.raw(name))
    for name in shards.home:
        each = arch.stack(name)
        if each is not None:
            if shards.shape(name)[:1] != (config[arch.experts],) or len(shards.shape(name)) != 3:
                raise FormatError(f"shape {shards.shape(name)}; expected a matrix for each of the "
                                  f"{config[arch.experts]} experts", path=shards.home[name].path, tensor=name,
                                  offset=shards.home[name].tensors[name].offset)
            makers |= {each.replace("{e}", str(e)): expert(name, e) for e in range(config[arch.experts])}
            continue
        theirs = arch.hf_name(name)
        if theirs is None:
            if name not in (ROPE_DIVISORS, *LONG_FACTORS.values()):
                notice("ignored", f"tensor {name} has no place in {arch.hf}", where=str(path))
            continue
        heads = arch.heads(name, config, shards.shape(name)[0])
        if heads is not None and shards.shape(name)[0] % (2 * heads):
            raise FormatError(f"{shards.shape(name)[0]} rows do not divide into {heads} heads with rotary pairs",
                              path=shards.home[name].path, tensor=name, offset=shards.home[name].tensors[name].offset)
        makers[theirs] = maker(name, heads)
    factors = {key: whole(name).dense() for key, name in LONG_FACTORS.items() if name in shards.home}
    if factors and arch.hf == "phi3":
        with_factors(config, factors, shards.metadata, path)
    if arch.hf == "t5":
        feed_forward_of_t5(config, makers)
    if ROPE_DIVISORS in shards.home:
        scaling = scaling_of_divisors(shards.stored(ROPE_DIVISORS).dense(), config, path)
        if scaling is None:  # no rule that config.json can name: the engine divides by the tensor itself
            makers[ROPE_DIVISORS] = maker(ROPE_DIVISORS, None)
        else:
            config["rope_scaling"] = scaling
    return LazyTensors(makers)


def _complete_config(config: dict[str, Any], shards: GgufShards, arch: GgufArch, path: Path) -> None:
    """What a GGUF file says by its tensors: vocabulary, tied output, biases."""
    if "token_embd.weight" not in shards.home:
        raise FormatError("there is no tensor token_embd.weight", path=path)
    config["vocab_size"] = shards.shape("token_embd.weight")[0]
    pattern, count = re.escape(arch.block) + r"(\d{1,6})\.", config[arch.keys["block_count"]]
    layers = {int(found[1]) for name in shards.home if (found := re.match(pattern, name))}
    if len(layers) != count or layers != set(range(len(layers))):
        raise FormatError(f"key {arch.gguf}.block_count is {count}, but the tensors are of {len(layers)} layers",
                          path=path)
    if arch.hf == "t5":
        config["tie_word_embeddings"] = "output.weight" not in shards.home
    elif "output" in arch.tensors:
        config["tie_word_embeddings"] = "output.weight" not in shards.home
        config["attention_bias"] = "blk.0.attn_q.bias" in shards.home
        config["mlp_bias"] = "blk.0.ffn_up.bias" in shards.home
        if "sliding_window" in config and arch.hf == "llama":
            config["model_type"] = "mistral"
    elif "token_types.weight" in shards.home:
        config["type_vocab_size"] = shards.shape("token_types.weight")[0]


def _metadata(metadata: GgufMetadata, arch: GgufArch, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if "tokenizer.ggml.model" in metadata:
        made["tokenizer"] = metadata.below("tokenizer.ggml.")
    for key, name in (("tokenizer.chat_template", "chat_template"), ("general.name", "name"),
                      ("general.license", "licence")):
        if isinstance(metadata.get(key), str):
            made[name] = metadata[key]
    pooling = metadata.integer(f"{arch.gguf}.pooling_type", 0)
    if pooling in _POOLING:
        made["pooling"] = {"mode": _POOLING[pooling], "normalize": True,
                           "max_tokens": config.get("max_position_embeddings")}
    made["generation"] = _generation(metadata, config, path)
    return made


def _lineage(metadata: GgufMetadata, path: Path) -> tuple[Step, ...]:
    """The steps that write_gguf recorded."""
    if LINEAGE not in metadata:
        return ()
    try:
        return tuple(Step.from_json(step) for step in json.loads(metadata[LINEAGE]))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise FormatError(f"key {LINEAGE} is malformed: {error!r}"[:200], path=path,
                          offset=metadata.offset(LINEAGE)) from None


def _generation(metadata: GgufMetadata, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """generation_config.json: begin, padding, and every token that ends an answer."""
    found: dict[str, int] = {}
    for name in ("bos", "eos", "eot", "eom", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        token = metadata.integer(key, -1)
        if 0 <= token < config["vocab_size"]:
            found[name] = token
        elif key in metadata and token not in (-1, 2**32 - 1):  # both mean: none
            notice("ignored", f"{key} is {token}, outside the vocabulary of {config['vocab_size']}", where=str(path))
    ends = list(dict.fromkeys(found[name] for name in ("eos", "eot", "eom") if name in found))
    generation: dict[str, Any] = {}
    if ends:
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if "bos" in found:
        generation["bos_token_id"] = found["bos"]
    if "padding" in found:
        generation["pad_token_id"] = found["padding"]
    return generation
