"""What of a decoder is cut together: groups of units, and the rows and columns of weights that belong to each unit.

A unit is the least that can go: a neuron, a rotary pair, a dimension of a value, a key head with its query heads, one
query head of every key head, a dimension of the residual stream. Of layer i, all by name:

    i.width            neurons: rows of gate and up, columns of down
    i.heads            key heads: their rows of k and v, the rows of q and columns of o of their query heads
    i.queries          the n-th query head of every key head (so that key heads keep as many): rows of q, columns of o
    i.pairs.h          rotary pairs of key head h: two rows of k, two of each of its query heads
    i.values.h         dimensions of the values of key head h: a row of v, a column of o for each of its query heads
    i.attention, i.feed_forward   one unit each: the part with its norms
    i                  one unit: the whole layer
    hidden             dimensions of the stream: embedding, head, norms, columns of what reads it, rows of what adds

A member is a tensor's axis with an index array (units, k): what each unit owns there. It *writes* a unit (makes its
value) or *reads* it (uses that). Units of several groups may share a row: it stays where all of them keep it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import FormatError, UnsupportedError
from edgewise.core.shapes import LayerShape, shapes_of

__all__ = ["Decoder", "Group", "Member", "decoder_of", "groups_of"]

Index = NDArray[np.int64]
_Q, _K, _V, _O = (f"self_attn.{part}_proj" for part in "qkvo")
_GATE, _UP, _DOWN = (f"mlp.{part}_proj" for part in ("gate", "up", "down"))
_LAYER = re.compile(r"^(?P<stem>(?:.*\.)?layers)\.(?P<index>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True, eq=False)
class Member:
    """What the units of a group own of one tensor. index: (units, k) along `axis`."""

    tensor: str
    axis: int
    index: Index
    role: Literal["writes", "reads"]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that go with everything they own."""

    name: str
    units: int
    members: tuple[Member, ...]

    def __repr__(self) -> str:
        return f"Group({self.name}: {self.units} units, {len(self.members)} members)"


@dataclass(frozen=True, eq=False)
class Decoder:
    """The sizes of a decoder, read off its configuration and its tensors.

    tensors: of each layer, by what follows the layer's number ("mlp.up_proj.weight") -> its whole name. stem: what the
    number follows ("model.layers"). turned: rotary pairs of a whole head; 0 where heads cannot lose any.
    """

    hidden: int
    head_dim: int
    shapes: tuple[LayerShape, ...]
    stem: str
    tensors: tuple[Mapping[str, str], ...]
    others: tuple[str, ...]
    turned: int

    def rest(self, layer: int, rest: str) -> str | None:
        """The name of a layer's tensor, or None."""
        return self.tensors[layer].get(rest)


def decoder_of(checkpoint: Checkpoint) -> Decoder:
    """Raises UnsupportedError for what has no decoder layers with q, k, v, gate and up in weights of their own."""
    stems: dict[str, dict[int, dict[str, str]]] = {}
    others = []
    for name in checkpoint.tensors:
        found = _LAYER.match(name)
        if found:
            stems.setdefault(found["stem"], {}).setdefault(int(found["index"]), {})[found["rest"]] = name
        else:
            others.append(name)
    rests = {rest for layers in stems.values() for layer in layers.values() for rest in layer}
    count = checkpoint.config.get("num_hidden_layers")
    wanted = {f"{part}.weight" for part in (_Q, _K, _V, _O, _GATE, _UP, _DOWN)}
    routed = any(".experts." in rest or "_moe." in rest for rest in rests)
    if len(stems) != 1 or routed or (len(rests & wanted) < len(wanted) and shapes_of(checkpoint.config) is None):
        raise UnsupportedError(
            f"{checkpoint.source or checkpoint.arch}: surgery is for decoders with layers.N.{_Q}, {_GATE} and so on, "
            f"without experts; {checkpoint.arch} lacks {', '.join(sorted(wanted - rests)) or 'such layers'}")
    (stem, layers), = stems.items()
    if sorted(layers) != list(range(len(layers))) or len(layers) != count:
        raise FormatError(f"num_hidden_layers is {count}; the tensors are of layers {sorted(layers)}",
                          path=checkpoint.source or None)
    ordered = tuple(layers[index] for index in range(len(layers)))
    hidden = int(checkpoint.config["hidden_size"])
    size = checkpoint.config.get("head_dim") or hidden // int(checkpoint.config["num_attention_heads"])
    shapes = shapes_of(checkpoint.config, checkpoint.source)
    if shapes is None:
        shapes = tuple(_shape(checkpoint, own, int(size)) for own in ordered)
    normed = any("q_norm" in rest for rest in rests)
    part = float(checkpoint.config.get("partial_rotary_factor") or 1.0)
    return Decoder(hidden, int(size), shapes, stem, ordered, tuple(others), 0 if normed or part != 1 else size // 2)


def _shape(checkpoint: Checkpoint, own: Mapping[str, str], size: int) -> LayerShape:
    def rows(part: str) -> int:
        return int(checkpoint.tensors[own[f"{part}.weight"]].shape[0])

    return LayerShape(rows(_Q) // size, rows(_K) // size, size, size, rows(_UP))


def groups_of(checkpoint: Checkpoint, decoder: Decoder | None = None) -> dict[str, Group]:
    """Every group of a decoder by name."""
    decoder = decoder or decoder_of(checkpoint)
    found: dict[str, Group] = {}
    for layer, shape in enumerate(decoder.shapes):
        if shape.heads:
            found |= {group.name: group for group in _attention(decoder, layer, shape)}
        if shape.width:
            every = np.arange(shape.width)[:, None]
            found[f"{layer}.width"] = Group(f"{layer}.width", shape.width, tuple(
                _members(decoder, layer, [(_GATE, 0, every, "writes"), (_UP, 0, every, "writes"),
                                          (_DOWN, 1, every, "reads")])))
        for part, there in (("attention", shape.heads), ("feed_forward", shape.width)):
            if there:
                names = [name for rest, name in decoder.tensors[layer].items() if _part_of(rest, decoder, layer) ==
                         part]
                found[f"{layer}.{part}"] = _whole(checkpoint, f"{layer}.{part}", names)
        found[f"{layer}"] = _whole(checkpoint, f"{layer}", list(decoder.tensors[layer].values()))
    found["hidden"] = _hidden(checkpoint, decoder)
    return found


def _part_of(rest: str, decoder: Decoder, layer: int) -> str:
    """attention or feed_forward, norms included: with four norms the second is attention's own."""
    if rest.startswith(("self_attn.", "input_layernorm.")):
        return "attention"
    four = "pre_feedforward_layernorm.weight" in decoder.tensors[layer]
    return "attention" if four and rest.startswith("post_attention_layernorm.") else "feed_forward"


def _whole(checkpoint: Checkpoint, name: str, tensors: list[str]) -> Group:
    return Group(name, 1, tuple(Member(tensor, 0, np.arange(checkpoint.tensors[tensor].shape[0])[None], "writes")
                                for tensor in tensors))


def _members(decoder: Decoder, layer: int, parts: list[tuple[str, int, Index, Any]]) -> list[Member]:
    """Of weights and, along the first axis, biases that are there."""
    made = []
    for part, axis, index, role in parts:
        for ending in ("weight", "bias") if axis == 0 else ("weight",):
            name = decoder.rest(layer, f"{part}.{ending}")
            if name is not None:
                made.append(Member(name, axis, index, role))
    return made


def _attention(decoder: Decoder, layer: int, shape: LayerShape) -> list[Group]:
    key, value, groups = shape.key_dim, shape.value_dim, shape.heads // shape.kv_heads
    queries = np.arange(shape.heads * key).reshape(shape.kv_heads, groups, key)
    keys = np.arange(shape.kv_heads * key).reshape(shape.kv_heads, key)
    values = np.arange(shape.kv_heads * value).reshape(shape.kv_heads, value)
    outputs = np.arange(shape.heads * value).reshape(shape.kv_heads, groups, value)

    def group(name: str, units: int, *parts: tuple[str, int, Index, str]) -> Group:
        shaped = [(part, axis, index.reshape(units, -1), role) for part, axis, index, role in parts]
        return Group(f"{layer}.{name}", units, tuple(_members(decoder, layer, shaped)))

    made = [group("heads", shape.kv_heads, (_Q, 0, queries, "writes"), (_K, 0, keys, "writes"),
                  (_V, 0, values, "writes"), (_O, 1, outputs, "reads")),
            group("queries", groups, (_Q, 0, queries.swapaxes(0, 1), "writes"),
                  (_O, 1, outputs.swapaxes(0, 1), "reads"))]
    for head in range(shape.kv_heads):
        made.append(group(f"values.{head}", value, (_V, 0, values[head], "writes"),
                          (_O, 1, outputs[head].T, "reads")))
        if decoder.turned:
            half = key // 2
            pairs = queries[head].reshape(groups, 2, half).transpose(2, 0, 1)
            made.append(group(f"pairs.{head}", half, (_Q, 0, pairs, "writes"),
                              (_K, 0, keys[head].reshape(2, half).T, "writes")))
    return made


def _hidden(checkpoint: Checkpoint, decoder: Decoder) -> Group:
    every = np.arange(decoder.hidden)[:, None]
    members = []
    for layer in decoder.tensors:
        for rest, name in layer.items():
            axes = _stream_axes(rest)
            members += [Member(name, axis, every, role) for axis, role in axes]
    for name in decoder.others:
        shape = checkpoint.tensors[name].shape
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            members.append(Member(name, 1, every, "writes" if "embed" in name else "reads"))
        elif name.endswith("norm.weight") and shape == (decoder.hidden,):
            members.append(Member(name, 0, every, "reads"))
    return Group("hidden", decoder.hidden, tuple(members))


def _stream_axes(rest: str) -> list[tuple[int, Literal["writes", "reads"]]]:
    """The axis of a layer's tensor that is the stream."""
    part, _, ending = rest.rpartition(".")
    if part in (_O, _DOWN):
        return [(0, "writes")]
    if part in (_Q, _K, _V, _GATE, _UP):
        return [(1, "reads")] if ending == "weight" else []
    return [(0, "reads")] if part.endswith("layernorm") else []
