"""Layers of unequal shapes, padded with zeros until they are equal: for tools that know no `layer_shapes`.

A layer that lost heads, dimensions or neurons gets them back as zeros, where they were: rotary pairs return to their
frequencies, so that a padded dimension adds zero to every score; padded values and neurons meet columns of zeros. A
layer that lost a part gets one that gives zero. Exact in exact arithmetic; the file is as large as before the cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import FormatError, notice
from edgewise.core.numbers import BF16, FP16, float32_to_bf16
from edgewise.core.shapes import LAYER_SHAPES, LayerShape, config_with_shapes, shapes_of
from edgewise.core.storage import Dense, LazyTensors, Stored

__all__ = ["equal_shapes"]

Float32 = NDArray[np.float32]
_LAYER = re.compile(r"^(?P<stem>.*\blayers)\.(?P<index>\d+)\.(?P<rest>.+)$")
_PART = re.compile(r"^(self_attn|mlp)\.")


def equal_shapes(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with layers of one shape, each as wide as the widest needs; itself where they are.

    Weights that grow are dense: 16-bit floats where they were, else float32.
    """
    shapes = shapes_of(checkpoint.config, checkpoint.source)
    if shapes is None:
        return checkpoint
    size = checkpoint.config.get("head_dim")
    if type(size) is not int or size < 1:
        raise FormatError(f"configuration key 'head_dim' is {size!r}; beside {LAYER_SHAPES} it says how wide a whole "
                          "head is", path=checkpoint.source or None)
    kv_heads = max(max(shape.kv_heads for shape in shapes), 1)
    group = max(max(shape.heads // shape.kv_heads for shape in shapes if shape.heads) if any(
        shape.heads for shape in shapes) else 1, 1)
    size = max(size, *(max(shape.key_dim, shape.value_dim) for shape in shapes))
    if size != checkpoint.config["head_dim"]:
        raise FormatError(f"{LAYER_SHAPES} has heads of {size} dimensions, more than the whole head of "
                          f"{checkpoint.config['head_dim']} that head_dim names", path=checkpoint.source or None)
    heads, kv_heads = _heads(checkpoint, group, kv_heads)
    whole = LayerShape(heads, kv_heads, size, size, max(max(shape.width for shape in shapes), 1))
    layers: dict[tuple[str, int], dict[str, str]] = {}
    makers: dict[str, Callable[[], Stored]] = {}
    for name in checkpoint.tensors:
        found = _LAYER.match(name)
        if found:
            layers.setdefault((found["stem"], int(found["index"])), {})[found["rest"]] = name
        else:
            makers[name] = lambda name=name: checkpoint.tensors[name]  # type: ignore[misc]
    every: dict[str, str] = {}
    for rests in layers.values():
        every |= {rest: name for rest, name in rests.items() if rest not in every}
    stem = next(iter(layers), ("model.layers", 0))[0]
    for index, shape in enumerate(shapes):
        for rest, example in every.items():
            own = layers.get((stem, index), {}).get(rest)
            makers[f"{stem}.{index}.{rest}"] = _maker(checkpoint, rest, own, example, shape, whole)
    grown = 1 - sum(map(_parameters, shapes)) / (len(shapes) * _parameters(whole))
    notice("info", f"layers of unequal shapes are padded with zeros to {whole.heads} heads and {whole.width} neurons "
           f"each: {100 * grown:.0f} % of their weights are padding", where=checkpoint.source)
    return replace(checkpoint, tensors=LazyTensors(makers),
                   config=config_with_shapes(checkpoint.config, [whole] * len(shapes), size))


def _heads(checkpoint: Checkpoint, group: int, kv_heads: int) -> tuple[int, int]:
    """As many heads and key heads as before the cut, where that is enough; else at least `group` to each key head.

    transformers wants heads to divide the hidden size, even where `head_dim` is given.
    """
    hidden, before = int(checkpoint.config["hidden_size"]), checkpoint.config.get("num_attention_heads")
    keys = checkpoint.config.get("num_key_value_heads") or before
    if type(before) is int and type(keys) is int and keys >= kv_heads and before >= group * keys and (
            before % keys == hidden % before == 0):
        return before, keys
    fits = (one for one in range(group, hidden // kv_heads + 1) if hidden % (one * kv_heads) == 0)
    return next(fits, group) * kv_heads, kv_heads


def _parameters(shape: LayerShape) -> int:
    """For each hidden dimension."""
    return (shape.heads + shape.kv_heads) * (shape.key_dim + shape.value_dim) + 3 * shape.width


def _maker(checkpoint: Checkpoint, rest: str, own: str | None, example: str, shape: LayerShape,
           whole: LayerShape) -> Callable[[], Stored]:
    hidden = int(checkpoint.config["hidden_size"])
    if own is None:  # a part that the layer lost; a norm of it sees a stream that leads nowhere
        if _PART.match(rest) and "norm" not in rest:
            found = _whole_shape(rest, whole, hidden)
            return lambda: Dense(np.zeros(found, np.float32))
        return lambda: Dense(np.ones(checkpoint.tensors[example].shape, np.float32))
    if not _PART.match(rest) or "norm" in rest:
        return lambda: checkpoint.tensors[own]

    def make() -> Stored:
        stored = checkpoint.tensors[own]
        target = _whole_shape(rest, whole, hidden)
        if shape == whole or (tuple(stored.shape) == target and shape.pairs is None):
            return stored
        return _as_stored(_padded(np.asarray(stored.dense(), np.float32), rest, shape, whole, target), stored)

    return make


def _whole_shape(rest: str, whole: LayerShape, hidden: int) -> tuple[int, ...]:
    part, _, kind = rest.partition("_proj.")
    rows = {"self_attn.q": whole.heads * whole.key_dim, "self_attn.k": whole.kv_heads * whole.key_dim,
            "self_attn.v": whole.kv_heads * whole.value_dim, "mlp.gate": whole.width, "mlp.up": whole.width,
            "self_attn.o": hidden, "mlp.down": hidden}[part]
    inputs = {"self_attn.o": whole.heads * whole.value_dim, "mlp.down": whole.width}.get(part, hidden)
    return (rows,) if kind == "bias" else (rows, inputs)


def _padded(values: Float32, rest: str, shape: LayerShape, whole: LayerShape, target: tuple[int, ...]) -> Float32:
    """values: as stored, of the cut layer -> (target)."""
    part, _, kind = rest.partition("_proj.")
    if kind == "bias" and part in ("self_attn.o", "mlp.down"):
        return values
    made = np.zeros(target, np.float32)
    if part.startswith("mlp"):
        made[(slice(0, shape.width),) if part != "mlp.down" else (slice(None), slice(0, shape.width))] = values
        return made
    groups = shape.heads // shape.kv_heads
    if part in ("self_attn.q", "self_attn.k"):
        count, all_of = (groups, whole.heads // whole.kv_heads) if part == "self_attn.q" else (1, 1)
        heads = made.reshape(whole.kv_heads, all_of, whole.key_dim, -1)
        given = values.reshape(shape.kv_heads, count, shape.key_dim, -1)
        for head in range(shape.kv_heads):
            heads[head][:count, _places(shape, whole, head)] = given[head]
        return made
    if part == "self_attn.v":
        made.reshape(whole.kv_heads, whole.value_dim, -1)[:shape.kv_heads, :shape.value_dim] = values.reshape(
            shape.kv_heads, shape.value_dim, -1)
        return made
    made.reshape(-1, whole.kv_heads, whole.heads // whole.kv_heads, whole.value_dim)[
        :, :shape.kv_heads, :groups, :shape.value_dim] = values.reshape(
            -1, shape.kv_heads, groups, shape.value_dim)
    return made


def _places(shape: LayerShape, whole: LayerShape, head: int) -> NDArray[np.int64]:
    """Where the dimensions of a cut key head were in a whole one."""
    if shape.pairs is None:
        return np.arange(shape.key_dim)
    pairs = np.array(shape.pairs[head], np.int64)
    return np.concatenate([pairs, pairs + whole.key_dim // 2])


def _as_stored(values: Float32, like: Stored) -> Dense:
    number: Any = like.number if isinstance(like, Dense) else None
    if number == FP16:
        return Dense(values.astype(np.float16), FP16)
    return Dense(float32_to_bf16(values), BF16) if number == BF16 else Dense(values)

