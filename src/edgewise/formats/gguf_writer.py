"""Checkpoints as GGUF files. Our own writer: blocks are copied byte for byte, and one tensor is held at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import FormatError, InvalidValueError, UnsupportedError, notice
from edgewise.core.shapes import shapes_of
from edgewise.core.storage import Dense, Stored
from edgewise.formats.cache import Progress, write_aside
from edgewise.formats.equal_shapes import equal_shapes
from edgewise.formats.ggml_blocks import WRITTEN, codec, ggml_bytes, stored_of, type_of
from edgewise.formats.gguf_config import (
    ROPE_DIVISORS,
    keys_of_config,
    llama3_divisors,
    rope_of_config,
    said_in_arrays,
)
from edgewise.formats.gguf_families import flattened, long_factors
from edgewise.formats.gguf_file import ARRAY, BOOL, NUMBERS, STRING
from edgewise.formats.gguf_names import DECI, GgufArch, arch_of_config
from edgewise.formats.gguf_rotary import interleave_rotary
from edgewise.formats.gguf_tokenizer import keys_of_tokenizer

__all__ = ["LINEAGE", "Types", "as_layers_of_gguf", "write_gguf", "write_gguf_raw"]

Types = Callable[[str, Stored], str] | Mapping[str, str] | str
LINEAGE = "edgewise.lineage"
_ALIGNMENT = 32
_U32, _I32, _F32, _U64, _I64 = 4, 5, 6, 10, 11
_KIND_OF = {np.dtype(dtype): kind for kind, dtype in NUMBERS.items()} | {np.dtype(bool): BOOL}
_POOLING = {"mean": 1, "cls": 2, "last": 3}


def write_gguf(checkpoint: Checkpoint, path: str | Path, types: Types = "keep", *, overwrite: bool = True,
               progress: Progress | None = None) -> None:
    """Write a model as one GGUF file; it appears whole or not at all.

    types: the block type of each matrix, by one name for all, by its Hugging Face name, or by a function of name and
    tensor. "keep" (also for what a mapping leaves out) is the type it is stored in. A tensor already stored in
    its type is copied byte for byte, codes and scales that fit a type are packed without rounding, and anything
    else is rounded as ggml does. Vectors, and the tables that ggml only reads so, are F32.
    A matrix whose rows are not whole blocks is written as F16, with a notice. Layers of unequal shapes are written as
    GGUF's deci where its arrays say what they are, and else padded with zeros.
    Raises UnsupportedError for an architecture or a tokenizer that GGUF has no name for, BudgetError for a full disk.
    """
    where = checkpoint.source or "checkpoint"
    arch = arch_of_config(checkpoint.arch, where=where)
    checkpoint = as_layers_of_gguf(checkpoint)
    if shapes_of(checkpoint.config) is not None:
        arch = DECI
    tensors = _tensors(checkpoint, arch, types, where)
    keys = _keys(checkpoint, arch, where)
    if any(codec(kind).block > 1 for kind, _, _ in tensors.values()):
        keys["general.quantization_version"] = 2
    _write(Path(path), keys, tensors, overwrite, progress)


def as_layers_of_gguf(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with layers as a GGUF file has them: unequal where deci's arrays say so, else padded."""
    said = checkpoint.arch == "llama" and said_in_arrays(checkpoint.config)
    return checkpoint if said else equal_shapes(checkpoint)


def write_gguf_raw(path: str | Path, keys: Mapping[str, Any], tensors: Mapping[str, tuple[str, Stored]], *,
                   overwrite: bool = True) -> None:
    """Write keys and tensors (block type, value) under the names given; the inverse of read_gguf_raw."""
    _write(Path(path), keys, {name: (kind, stored.shape, _always(stored)) for name, (kind, stored) in tensors.items()},
           overwrite, None)


Entry = tuple[str, tuple[int, ...], Callable[[], Stored]]
"""Block type, shape, and what makes the tensor when its turn comes."""


def _always(stored: Stored) -> Callable[[], Stored]:
    return lambda: stored


def _tensors(checkpoint: Checkpoint, arch: GgufArch, types: Types, where: str) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    config = flattened(checkpoint.config, arch, where=where)
    tied = bool(config.get("tie_word_embeddings"))
    stacks: dict[str, dict[int, str]] = {}
    for name in checkpoint.tensors:
        place = arch.place_in_stack(name)
        if place is not None:
            stacks.setdefault(place[0], {})[place[1]] = name
            continue
        theirs = arch.gguf_name(name)
        if name == ROPE_DIVISORS:
            theirs = name
        if theirs is None:
            notice("ignored", f"tensor {name} has no place in GGUF's {arch.gguf} and is not written", where=where)
            continue
        if tied and theirs.startswith("output."):
            continue
        if theirs in entries:
            raise FormatError(f"two tensors would be written as {theirs}", path=where, tensor=name)
        stored = checkpoint.tensors[name]
        kind = "F32" if len(stored.shape) < 2 or arch.is_float32(theirs) else _choose(name, stored, types, where)
        shape = stored.shape
        if arch.is_row(theirs):
            kind, shape = "F32", (math.prod(shape),)
        entries[theirs] = (kind, shape, _maker(checkpoint, name, theirs, arch))
    for theirs, names in stacks.items():
        entries[theirs] = _stack(checkpoint, theirs, names, config.get(arch.experts) or 0, types, where)
    rope = rope_of_config(config)
    if rope.get("rope_type") == "longrope" and arch.hf == "phi3":
        entries |= {name: ("F32", factors.shape, _always(Dense(factors)))
                    for name, factors in long_factors(checkpoint.config, rope, where).items()}
    if rope.get("rope_type", rope.get("type")) == "llama3":
        divisors = llama3_divisors({**arch.defaults, **checkpoint.config, **rope}, rope)
        entries[ROPE_DIVISORS] = ("F32", divisors.shape, _always(Dense(divisors)))
    if "token_embd.weight" not in entries:
        raise FormatError("the checkpoint has no token embedding under its Hugging Face name", path=where)
    return entries


def _with_heads(checkpoint: Checkpoint) -> dict[str, Any]:
    config = dict(checkpoint.config)
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config.get("num_attention_heads")
    return config


def _maker(checkpoint: Checkpoint, name: str, theirs: str, arch: GgufArch) -> Callable[[], Stored]:
    heads = arch.heads(theirs, _with_heads(checkpoint), checkpoint.tensors[name].shape[0])
    if heads is not None:
        return lambda: interleave_rotary(checkpoint.tensors[name], heads)
    if arch.is_raised(theirs):
        return lambda: Dense(checkpoint.tensors[name].dense() + np.float32(arch.norm_offset))
    if arch.is_row(theirs):
        return lambda: Dense(np.ascontiguousarray(checkpoint.tensors[name].dense().reshape(-1)))
    return lambda: checkpoint.tensors[name]


def _stack(checkpoint: Checkpoint, theirs: str, names: Mapping[int, str], experts: int, types: Types,
           where: str) -> Entry:
    """One tensor of the matrices of all experts, in the type that the first is written in."""
    if names.keys() != set(range(experts)):
        raise FormatError(f"{theirs} needs a matrix for each of the {experts} experts; the checkpoint has "
                          f"{len(names)}", path=where, tensor=next(iter(names.values())))
    first = checkpoint.tensors[names[0]]
    kind = _choose(names[0], first, types, where)

    def make() -> Stored:
        raw = np.concatenate([ggml_bytes(checkpoint.tensors[names[e]], kind) for e in range(experts)])
        return stored_of(kind, raw, (experts, *first.shape))

    return kind, (experts, *first.shape), make


def _choose(name: str, stored: Stored, types: Types, where: str) -> str:
    """The block type of a matrix."""
    if callable(types):
        asked = types(name, stored)
    else:
        asked = types if isinstance(types, str) else types.get(name, "keep")
    present = type_of(stored)
    if asked == "keep":
        if present is not None:
            return present
        notice("fallback", f"{name} is stored in a form that no block type holds ({stored!r}); written as F16",
               where=where)
        return "F16"
    if asked not in WRITTEN and asked != present:
        raise UnsupportedError(f"{where}, tensor {name!r}: cannot write {asked!r}; expected keep, {', '.join(WRITTEN)}")
    if stored.shape[-1] % codec(asked).block:
        notice("fallback", f"{name} has rows of {stored.shape[-1]} values, which are not whole blocks of {asked}; "
               "written as F16", where=where)
        return "F16"
    return asked


def _keys(checkpoint: Checkpoint, arch: GgufArch, where: str) -> dict[str, Any]:
    metadata = checkpoint.metadata
    keys: dict[str, Any] = {"general.architecture": arch.gguf, "general.type": "model"}
    if metadata.get("name"):
        keys["general.name"] = metadata["name"]
    if metadata.get("licence"):
        keys["general.license"] = metadata["licence"]
    keys.update(keys_of_config(checkpoint.config, arch, where=where))
    mode = metadata.get("pooling", {}).get("mode")
    if mode is not None:
        if mode in _POOLING:
            keys[f"{arch.gguf}.pooling_type"] = _POOLING[mode]
        else:
            notice("ignored", f"pooling {mode!r} has no GGUF key and is not written", where=where)
    tokenizer = metadata.get("tokenizer")
    if isinstance(tokenizer, bytes):
        keys.update(keys_of_tokenizer(tokenizer, int(checkpoint.config["vocab_size"]), where=where))
    elif isinstance(tokenizer, Mapping):
        keys.update({key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}": tokenizer[key]
                     for key in tokenizer})
    else:
        notice("degraded", "the checkpoint has no tokenizer, so the file will not turn text into tokens", where=where)
    keys.update(_special_tokens(metadata.get("generation") or {}, keys))
    if metadata.get("chat_template"):
        keys["tokenizer.chat_template"] = metadata["chat_template"]
    if checkpoint.lineage:
        keys[LINEAGE] = json.dumps([step.to_json() for step in checkpoint.lineage])
    return keys


def _special_tokens(generation: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, int]:
    ends = generation.get("eos_token_id")
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    found = {"bos": generation.get("bos_token_id"), "padding": generation.get("pad_token_id"),
             **dict(zip(("eos", "eot", "eom"), ends, strict=False))}
    return {key: int(token) for name, token in found.items()
            if token is not None and (key := f"tokenizer.ggml.{name}_token_id") not in keys}


def _write(path: Path, keys: Mapping[str, Any], tensors: Mapping[str, Entry], overwrite: bool,
           progress: Progress | None) -> None:
    header = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)))
    for name, value in keys.items():
        header += _string(name) + _value(name, value)
    position = 0
    sizes: dict[str, int] = {}
    for name, (kind, shape, _) in tensors.items():
        if not 1 <= len(shape) <= 4:
            raise UnsupportedError(f"{path}, tensor {name!r}: GGUF holds 1 to 4 dimensions; given {len(shape)}")
        sizes[name] = math.prod(shape[:-1]) * codec(kind).row_nbytes(shape[-1])
        header += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), codec(kind).ggml_id,
                                              position)
        position += -(-sizes[name] // _ALIGNMENT) * _ALIGNMENT
    header += bytes(-len(header) % _ALIGNMENT)
    total, done = sum(sizes.values()), 0
    with write_aside(path, overwrite=overwrite) as file:
        file.write(header)
        for name, (kind, _, make) in tensors.items():
            raw = np.ascontiguousarray(ggml_bytes(make(), kind))
            assert raw.nbytes == sizes[name], (name, raw.nbytes, sizes[name])
            file.write(raw.data)
            file.write(bytes(-raw.nbytes % _ALIGNMENT))
            done += raw.nbytes
            if progress is not None:
                progress(f"writing {path.name}", done, total)


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _number(kind: int, value: float) -> bytes:
    return np.array(value, "u1" if kind == BOOL else NUMBERS[kind]).tobytes()


def _value(name: str, value: Any) -> bytes:
    """A key's type and value. Python integers are U32 (I32, U64 or I64 where they must), floats F32; arrays keep
    their dtype, lists of integers are I32 and of floats F32."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return struct.pack("<I", BOOL) + _number(BOOL, value)
    if isinstance(value, int):
        kind = next((kind for kind in (_U32, _I32, _U64, _I64) if _fits(value, kind)), None)
        if kind is None:
            raise InvalidValueError(f"key {name}: {value} does not fit 64 bits")
        return struct.pack("<I", kind) + _number(kind, value)
    if isinstance(value, float):
        return struct.pack("<I", _F32) + _number(_F32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, np.ndarray) and value.dtype in _KIND_OF:
        return struct.pack("<IIQ", ARRAY, _KIND_OF[value.dtype], value.size) + np.ascontiguousarray(value).tobytes()
    if isinstance(value, Sequence):
        return _list(name, value)
    raise InvalidValueError(f"key {name}: a value of type {type(value).__name__} has no GGUF type")


def _fits(value: int, kind: int) -> bool:
    limits = np.iinfo(NUMBERS[kind])
    return bool(limits.min <= value <= limits.max)


def _list(name: str, values: Sequence[Any]) -> bytes:
    if values and all(isinstance(value, str) for value in values):
        return struct.pack("<IIQ", ARRAY, STRING, len(values)) + b"".join(map(_string, values))
    kinds = {type(value) for value in values}
    for accepted, dtype in (({bool}, np.dtype(bool)), ({int}, np.dtype("<i4")), ({int, float}, np.dtype("<f4"))):
        if kinds <= accepted:
            array: NDArray[Any] = np.array(values, dtype)
            return struct.pack("<IIQ", ARRAY, _KIND_OF[dtype], len(values)) + array.tobytes()
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise InvalidValueError(f"key {name}: a list of {names} has no GGUF type")
