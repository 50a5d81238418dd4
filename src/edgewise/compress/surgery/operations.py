"""Operations on a decoder's coupled groups (groups.py): cut, zero, merge, fold and inherit. Pure; arrays only.

    smaller = cut(checkpoint, {"0.width": kept_neurons, "3.heads": [0, 2], "5.attention": [], "7": [], "hidden": dims})

What is cut leaves the other weights as they are: cutting units that are zero changes no answer but by rounding. Only
weights that lose rows or columns are touched; floats keep their number format, and what is quantised becomes float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.surgery.groups import Decoder, Group, decoder_of, groups_of
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import InvalidValueError, UnsupportedError, notice
from edgewise.core.numbers import BF16, FP16, bf16_to_float32, float32_to_bf16
from edgewise.core.shapes import LayerShape, config_with_shapes
from edgewise.core.storage import Dense, LazyTensors, Stored

__all__ = ["absorb", "cut", "fold_norms", "inherit", "merge", "norms_of", "zero"]

Float32 = NDArray[np.float32]
Kept = Mapping[str, Sequence[int] | NDArray[np.integer[Any]]]
Score = Callable[[Checkpoint, Group], NDArray[np.floating[Any]]]


def cut(checkpoint: Checkpoint, keep: Kept, *, step: Step | None = None) -> Checkpoint:
    """The checkpoint with only these units of the groups named; groups that are not named keep all.

    Raises InvalidValueError for an unknown group or unit, for key heads of a layer that would keep unequal numbers of
    pairs or of dimensions, and for a model without layers.
    """
    decoder = decoder_of(checkpoint)
    groups = groups_of(checkpoint, decoder)
    kept = {name: _units(groups, name, units) for name, units in keep.items()}
    gone = {layer for layer in range(len(decoder.shapes)) if not len(kept.get(str(layer), [0]))}
    masks: dict[tuple[str, int], NDArray[np.bool_]] = {}
    for name, units in kept.items():
        for member in groups[name].members:
            mask = masks.setdefault((member.tensor, member.axis),
                                    np.ones(checkpoint.tensors[member.tensor].shape[member.axis], bool))
            mask[np.delete(member.index, units, axis=0).reshape(-1)] = False
    shapes, dropped = [], set()
    for layer, shape in enumerate(decoder.shapes):
        made = None if layer in gone else _shape(decoder, layer, shape, kept)
        if made is None:
            dropped |= set(decoder.tensors[layer].values())
            continue
        shapes.append(made)
        for part, there in (("attention", made.heads), ("feed_forward", made.width)):
            if not there and f"{layer}.{part}" in groups:
                dropped |= {member.tensor for member in groups[f"{layer}.{part}"].members}
    if not shapes:
        raise InvalidValueError("a model keeps at least one layer with one part; all would go")
    names = _numbered(decoder, dropped)
    config, gain = _hidden_config(checkpoint, decoder, kept.get("hidden"))
    widened = [old for old in names if not isinstance(checkpoint.tensors[old], Dense) and any(
        (old, axis) in masks and not masks[old, axis].all() for axis in (0, 1))]
    if widened:
        notice("fallback", f"{len(widened)} quantised weights lose rows or columns and become float32; cut before "
               "quantising", where=checkpoint.source)
    makers: dict[str, Callable[[], Stored]] = {
        new: _cutter(checkpoint, old, masks, gain if _is_stream_norm(old, decoder) else 1.0)
        for old, new in names.items()}
    step = step or Step("cut", {"groups": len(keep)})
    made_config = config_with_shapes(config, shapes, decoder.head_dim)
    if isinstance(kinds := made_config.get("layer_types"), list | tuple):
        left = [layer for layer in range(len(decoder.shapes)) if set(decoder.tensors[layer].values()) - dropped]
        made_config["layer_types"] = [kinds[layer] for layer in left]
    return replace(checkpoint, tensors=LazyTensors(makers), config=made_config,
                   lineage=(*checkpoint.lineage, step), files=())


def _units(groups: Mapping[str, Group], name: str, units: Any) -> NDArray[np.int64]:
    if name not in groups:
        near = ", ".join(sorted(groups)[:6])
        raise InvalidValueError(f"there is no group {name!r}; groups are such as {near}")
    given = np.asarray(units, np.int64).reshape(-1)
    if given.size and (given.min() < 0 or given.max() >= groups[name].units or len(set(given.tolist())) != len(given)):
        raise InvalidValueError(f"the units of {name} are 0 to {groups[name].units - 1}, each once; given "
                                f"{given.tolist()[:8]}")
    return np.sort(given)


def _shape(decoder: Decoder, layer: int, shape: LayerShape, kept: Mapping[str, NDArray[np.int64]]
           ) -> LayerShape | None:
    """What is left of a layer; None where nothing is."""
    def left(name: str, whole: int) -> list[int]:
        return [int(unit) for unit in kept.get(f"{layer}.{name}", range(whole))]

    heads = left("heads", shape.kv_heads) if left("attention", 1) else []
    width = len(left("width", shape.width)) if left("feed_forward", 1) else 0
    queries = left("queries", shape.heads // shape.kv_heads) if heads else []
    pairs = [left(f"pairs.{head}", shape.key_dim // 2) for head in heads]
    values = [len(left(f"values.{head}", shape.value_dim)) for head in heads]
    for what, sizes in (("pairs", [len(own) for own in pairs]), ("values", values)):
        if len(set(sizes)) > 1:
            raise InvalidValueError(f"the key heads of layer {layer} keep {what} of unequal number, {sizes}; all keep "
                                    "as many, which ones is for each to choose")
    if not queries or not pairs[0] or not values[0]:
        return LayerShape(0, 0, 0, 0, width) if width else None
    before = shape.pairs or (tuple(range(shape.key_dim // 2)),) * shape.kv_heads
    chosen = tuple(tuple(before[head][pair] for pair in own) for head, own in zip(heads, pairs, strict=True))
    all_of_them = all(own == tuple(range(decoder.head_dim // 2)) for own in chosen)
    key_dim = 2 * len(pairs[0]) if decoder.turned else shape.key_dim
    return LayerShape(len(heads) * len(queries), len(heads), key_dim, values[0], width,
                      None if all_of_them or not decoder.turned else chosen)


def _numbered(decoder: Decoder, dropped: set[str]) -> dict[str, str]:
    """Names of the tensors that stay -> their names when layers are numbered anew."""
    names = {name: name for name in decoder.others}
    count = 0
    for own in decoder.tensors:
        staying = {rest: name for rest, name in own.items() if name not in dropped}
        names |= {name: f"{decoder.stem}.{count}.{rest}" for rest, name in staying.items()}
        count += bool(staying)
    return names


def _hidden_config(checkpoint: Checkpoint, decoder: Decoder, kept: NDArray[np.int64] | None
                   ) -> tuple[dict[str, Any], float]:
    """The configuration, and what norms of the stream are multiplied by.

    With S the sum of squares of a stream of which m of n dimensions are not zero,
    x / sqrt(S / n + eps) = sqrt(n / m) x / sqrt(S / m + eps n / m).
    """
    config = dict(checkpoint.config)
    if kept is None or len(kept) == decoder.hidden:
        return config, 1.0
    if not len(kept):
        raise InvalidValueError("the stream keeps at least one dimension")
    if "gemma" in checkpoint.arch or any("_norm." in rest for own in decoder.tensors for rest in own):
        raise UnsupportedError(f"{checkpoint.arch}: the stream cannot be narrowed: its embedding is scaled by its "
                               "width, or its heads share the norms' epsilon")
    ratio = decoder.hidden / len(kept)
    config |= {"hidden_size": len(kept), "rms_norm_eps": float(config.get("rms_norm_eps") or 1e-6) * ratio}
    return config, math.sqrt(ratio)


def _is_stream_norm(name: str, decoder: Decoder) -> bool:
    return name.endswith("layernorm.weight") or (name in decoder.others and name.endswith("norm.weight"))


def _cutter(checkpoint: Checkpoint, name: str, masks: Mapping[tuple[str, int], NDArray[np.bool_]], gain: float
            ) -> Callable[[], Stored]:
    own = {axis: masks[name, axis] for axis in (0, 1) if (name, axis) in masks and not masks[name, axis].all()}

    def make() -> Stored:
        stored = checkpoint.tensors[name]
        if not own and gain == 1.0:
            return stored
        data = stored.data if isinstance(stored, Dense) else stored.dense()
        for axis, mask in own.items():
            data = np.compress(mask, data, axis=axis)
        made = Dense(np.ascontiguousarray(data), stored.number) if isinstance(stored, Dense) else Dense(data)
        return made if gain == 1.0 else _like(made.dense() * np.float32(gain), made)

    return make


def _like(values: Float32, stored: Stored) -> Dense:
    """values in the number format of a dense tensor; float32 in place of any other form."""
    number: Any = stored.number if isinstance(stored, Dense) else None
    if number == FP16:
        return Dense(values.astype(np.float16), FP16)
    return Dense(float32_to_bf16(values), BF16) if number == BF16 else Dense(np.asarray(values, np.float32))


def _changed(checkpoint: Checkpoint, made: Mapping[str, Stored], step: Step) -> Checkpoint:
    return checkpoint.with_tensors({name: made[name] if name in made else checkpoint.tensors[name]
                                    for name in checkpoint.tensors}, step)


def zero(checkpoint: Checkpoint, gone: Kept, *, step: Step | None = None) -> Checkpoint:
    """The checkpoint with all that these units own set to zero, at its old shape."""
    groups = groups_of(checkpoint)
    values: dict[str, Float32] = {}
    for name, units in gone.items():
        chosen = _units(groups, name, units)
        for member in groups[name].members:
            if member.tensor not in values:
                values[member.tensor] = checkpoint.tensors[member.tensor].dense().copy()
            place = member.index[chosen].reshape(-1)
            if member.axis:
                values[member.tensor][:, place] = 0
            else:
                values[member.tensor][place] = 0
    return _changed(checkpoint, {name: _like(value, checkpoint.tensors[name]) for name, value in values.items()},
                    step or Step("zero", {"groups": len(gone)}))


def merge(checkpoint: Checkpoint, name: str, clusters: Sequence[Sequence[int]], *, step: Step | None = None
          ) -> Checkpoint:
    """One unit in place of each cluster: the mean of what writes them, the sum of what reads them.

    Units in no cluster stay. Exact where the units of a cluster are alike. A group that nothing reads (pairs, parts)
    cannot be merged. Raises InvalidValueError.
    """
    groups = groups_of(checkpoint)
    group = groups.get(name)
    readers = [] if group is None else [member for member in group.members if member.role == "reads"]
    if group is None or not readers or name == "hidden":
        raise InvalidValueError(f"units of {name} are not merged: they need weights of their own that read them, as "
                                "those of N.width, N.heads, N.queries and N.values.H have")
    chosen = [_units(groups, name, cluster) for cluster in clusters]
    flat = np.concatenate([np.zeros(0, np.int64), *chosen])
    if len(set(flat.tolist())) != len(flat) or any(not len(cluster) for cluster in chosen):
        raise InvalidValueError("a unit is in one cluster, and no cluster is empty")
    made: dict[str, Stored] = {}
    for member in group.members:
        values = checkpoint.tensors[member.tensor].dense().copy()
        view = values.T if member.axis else values
        for cluster in chosen:
            parts = view[member.index[cluster]]
            joined = parts.sum(axis=0) if member.role == "reads" else parts.mean(axis=0)
            view[member.index[cluster[0]]] = joined
        made[member.tensor] = _like(values, checkpoint.tensors[member.tensor])
    left = np.setdiff1d(np.arange(group.units), np.concatenate([np.zeros(0, np.int64), *(c[1:] for c in chosen)]))
    return cut(_changed(checkpoint, made, step or Step("merge", {"group": name, "clusters": len(chosen)})),
               {name: left}, step=Step("cut", {"groups": 1}))


def absorb(checkpoint: Checkpoint, name: str, keep: Sequence[int], matrix: NDArray[np.floating[Any]], *,
           step: Step | None = None) -> Checkpoint:
    """Cut to `keep`, where what goes is made of what stays: x_gone = x_kept @ matrix, (kept, gone), so that the columns
    that read the units that go are given, times the matrix, to those that stay. Of groups whose units own one column of
    each reader, such as N.width."""
    groups = groups_of(checkpoint)
    kept = _units(groups, name, keep)
    group = groups[name]
    gone = np.setdiff1d(np.arange(group.units), kept)
    if matrix.shape != (len(kept), len(gone)):
        raise InvalidValueError(f"what goes is a matrix ({len(kept)}, {len(gone)}) of what stays; given {matrix.shape}")
    made: dict[str, Stored] = {}
    for member in group.members:
        if member.role == "reads":
            if member.index.shape[1] != 1 or name == "hidden":
                raise InvalidValueError(f"units of {name} own more than one column of what reads them; absorb is for "
                                        "groups such as N.width")
            values = checkpoint.tensors[member.tensor].dense().astype(np.float64)
            view = values if member.axis else values.T
            view[:, member.index[kept, 0]] += view[:, member.index[gone, 0]] @ np.asarray(matrix, np.float64).T
            made[member.tensor] = _like(values.astype(np.float32), checkpoint.tensors[member.tensor])
    return cut(_changed(checkpoint, made, step or Step("absorb", {"group": name})), {name: kept},
               step=Step("cut", {"groups": 1}))


def fold_norms(checkpoint: Checkpoint) -> Checkpoint:
    """Every norm before a part folded into the weights that read it, its own weight one. Changes no answer but by
    rounding. Where norms are raised by one, or come after their part, there is nothing to fold into."""
    decoder = decoder_of(checkpoint)
    made: dict[str, Stored] = {}
    if any("pre_feedforward_layernorm.weight" in own for own in decoder.tensors):
        raise UnsupportedError(f"{checkpoint.arch} norms what a part gives, which no weight reads")
    pairs = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
             "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}
    for own in decoder.tensors:
        for norm, readers in pairs.items():
            if f"{norm}.weight" not in own:
                continue
            gain = checkpoint.tensors[own[f"{norm}.weight"]]
            made[own[f"{norm}.weight"]] = _like(np.ones(decoder.hidden, np.float32), gain)
            for reader in readers:
                weight = checkpoint.tensors[own[f"{reader}.weight"]]
                made[own[f"{reader}.weight"]] = _like(weight.dense() * gain.dense(), weight)
    return _changed(checkpoint, made, Step("fold_norms"))


def norms_of(checkpoint: Checkpoint, group: Group) -> NDArray[np.float64]:
    """(units,): the 2-norm of everything a unit owns."""
    squares = np.zeros(group.units)
    for member in group.members:
        stored = checkpoint.tensors[member.tensor]
        values = bf16_to_float32(stored.data) if isinstance(stored, Dense) and stored.number == BF16 else stored.dense()
        along = np.square(values, dtype=np.float64)
        along = along if along.ndim == 1 else along.sum(axis=1 - member.axis)
        squares += along[member.index].sum(axis=1)
    return np.sqrt(squares)


def inherit(checkpoint: Checkpoint, *, layers: Sequence[int] | None = None, kv_heads: int | None = None,
            width: int | None = None, hidden: int | None = None, score: Score = norms_of) -> Checkpoint:
    """A smaller model that starts from the larger one's weights: these layers, and in each the best units by score.

    Equal in every layer, so that the result is a plain model of its family where it keeps whole heads.
    """
    decoder = decoder_of(checkpoint)
    groups = groups_of(checkpoint, decoder)
    keep: dict[str, Any] = {}
    staying = range(len(decoder.shapes)) if layers is None else sorted(set(layers))
    keep |= {str(layer): [] for layer in range(len(decoder.shapes)) if layer not in staying}

    def best(name: str, count: int | None) -> None:
        if count is None or name not in groups:
            return
        if not 1 <= count <= groups[name].units:
            raise InvalidValueError(f"{name} has {groups[name].units} units; {count} cannot be inherited")
        order = np.argsort(-np.asarray(score(checkpoint, groups[name])), kind="stable")
        keep[name] = np.sort(order[:count])

    for layer in staying:
        best(f"{layer}.heads", kv_heads)
        best(f"{layer}.width", width)
    best("hidden", hidden)
    return cut(checkpoint, keep, step=Step("inherit", {"layers": list(staying), "kv_heads": kv_heads, "width": width,
                                                       "hidden": hidden}))
