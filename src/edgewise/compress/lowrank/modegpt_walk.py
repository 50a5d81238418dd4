"""MoDeGPT over a decoder: statistics of the dense model, then layer by layer the three module types of `modegpt`.

    shrunk, cuts = shrink(checkpoint, ModeGpt(sparsity=0.3), sources)

sources(gram) gives a StatsSource that also has the states between blocks, `hidden`; engine.calibrate.EngineStats is
one. It is asked for once without Gram matrices, for the influence of layers, and once with. One layer's matrices are
in memory at a time. With a state folder a killed run goes on after the last layer that it finished. What is kept of
weights in blocks or codes is written as 16-bit floats: a quantisation comes after.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.lowrank.modegpt import (
    Heads,
    ModeGpt,
    Sizes,
    feed_forward,
    influence_of,
    query_key,
    removed_shares,
    sizes_of,
    value_output,
    with_ones,
)
from edgewise.compress.walk import Block, Finished, Group, StatsSource, blocks_of
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import InvalidValueError, UnsupportedError
from edgewise.core.numbers import BF16, FP16, FP32, NumberFormat, float32_to_bf16
from edgewise.core.shapes import LayerShape, config_with_shapes, shapes_of
from edgewise.core.stats import InputStats
from edgewise.core.storage import Dense, Stored
from edgewise.formats.cache import write_aside

__all__ = ["Cut", "StatesSource", "shrink"]

Float64 = NDArray[np.float64]
Progress = Callable[[str, int, int], None]
_PARTS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
          "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


class StatesSource(StatsSource, Protocol):
    """Statistics, and the states that the next block reads, (tokens, hidden)."""

    @property
    def hidden(self) -> Any: ...


@dataclass(frozen=True)
class Cut:
    """What became of a layer. errors: relative, of what feed-forward and heads give on the calibration text."""

    influence: float
    removed: float
    shape: LayerShape
    feed_forward_error: float
    value_error: float


def shrink(checkpoint: Checkpoint, config: ModeGpt, sources: Callable[[bool], StatesSource], *,
           step: Step | None = None, state: Path | None = None, key: str = "", progress: Progress | None = None
           ) -> tuple[Checkpoint, tuple[Cut, ...]]:
    """The checkpoint with smaller layers, and what was done to each.

    state, key: as for `compress.walk.walk`; the result reads its tensors from the folder. Raises UnsupportedError for
    models of other parts: layers that differ already, weights that hold several linears, experts, norms of queries and
    keys.
    """
    step = step or Step("modegpt", asdict(config))
    blocks = blocks_of(checkpoint)
    heads, dense = _sizes(checkpoint, blocks, config)
    kept = Finished(state, checkpoint, step, key) if state is not None else None
    influence = np.zeros(len(blocks))
    if config.allocation == "entropic":
        influence = _kept_influence(state, lambda: _influence(blocks, sources(False), progress))
    phi = removed_shares(influence, config)
    sizes = sizes_of(dense, phi, config)
    source = sources(True)
    changed: dict[str, Stored] = {}
    cuts: list[Cut] = []
    for block, size, share, own in zip(blocks, sizes, phi, influence, strict=True):
        if progress is not None:
            progress(f"decomposing {block.name}", block.index, len(blocks))
        tensors = {name: checkpoint.tensors[name] for name in block.tensors}
        made = kept.load(block) if kept is not None else None
        if kept is not None and made is not None:
            said = kept.note(block)
            shape, errors = LayerShape.from_json(said["shape"]), said["errors"]
        else:
            seen = {group.site: _stats(source, block, group, tensors) for group in block.groups
                    if group.site in ("attention", "down")}
            made, shape, errors = _decomposed(block, tensors, seen, heads, dense, size, config)
            if kept is not None:
                kept.save(block, made, {"shape": shape.to_json(), "errors": list(errors)})
                made = kept.load(block) or {}
        source.leave(block, tensors)
        changed.update(made)
        cuts.append(Cut(float(own), float(share), shape, *errors))
    if progress is not None:
        progress("decomposing", len(blocks), len(blocks))
    shaped = config_with_shapes(checkpoint.config, [cut.shape for cut in cuts], dense.head_dim)
    tensors = {name: changed.get(name, checkpoint.tensors[name]) for name in checkpoint.tensors}
    return checkpoint.with_tensors(tensors, step, **shaped), tuple(cuts)


def _kept_influence(state: Path | None, measured: Callable[[], Float64]) -> Float64:
    """As an earlier run measured it, else measured and kept."""
    path = None if state is None else state / "influence.json"
    if path is not None and path.is_file():
        return np.asarray(json.loads(path.read_text("utf-8")), np.float64)
    found = measured()
    if path is not None:
        with write_aside(path) as file:
            file.write(json.dumps(found.tolist()).encode())
    return found


def _sizes(checkpoint: Checkpoint, blocks: tuple[Block, ...], config: ModeGpt) -> tuple[Heads, Sizes]:
    """Of every layer, which are alike. A feed-forward and heads of the parts that shrink are what they must be."""
    where, tensors = checkpoint.source or checkpoint.arch, checkpoint.tensors
    if shapes_of(checkpoint.config) is not None:
        raise UnsupportedError(f"{where}: its layers are of unequal shapes already; decompose the model that it was "
                               "made from, with a larger sparsity")
    wanted = {"mlp": ("gate", "up", "down"), "qk": ("q", "k"), "vo": ("v", "o")}
    for block in blocks:
        for part in (part for module in sorted(config.modules) for part in wanted[module]):
            if f"{block.name}.{_PARTS[part]}.weight" not in tensors:
                raise UnsupportedError(f"{where}: {block.name} has no {_PARTS[part]}, which MoDeGPT decomposes; set "
                                       f"parts to those of {config.parts} that the model has")
        if "qk" in config.modules and f"{block.name}.self_attn.q_norm.weight" in tensors:
            raise UnsupportedError(f"{where}: queries and keys are normed head by head, so that none of their "
                                   "dimensions can go; set parts=mlp,vo")
    own = [{part: tensors[name].shape for part, stem in _PARTS.items()
            if (name := f"{block.name}.{stem}.weight") in tensors} for block in blocks]
    if any(each != own[0] for each in own):
        raise UnsupportedError(f"{where}: its layers are of unequal shapes; expected equal ones")
    count, kv_count = checkpoint.config.get("num_attention_heads"), checkpoint.config.get("num_key_value_heads")
    kv_count = count if kv_count is None else kv_count
    if type(count) is not int or type(kv_count) is not int or not {"q", "k", "v", "o", "down"} <= own[0].keys():
        raise UnsupportedError(f"{where}: expected num_attention_heads and q, k, v, o and down projections in weights "
                               "of their own")
    size, rest = divmod(own[0]["q"][0], count)
    if rest or own[0]["v"][0] != kv_count * size or own[0]["k"][0] != kv_count * size or count % kv_count:
        raise UnsupportedError(f"{where}: {count} query and {kv_count} key heads do not fit queries "
                               f"{own[0]['q']}, keys {own[0]['k']} and values {own[0]['v']}")
    return Heads(count, kv_count), Sizes(own[0]["down"][1], size, size)


def _influence(blocks: tuple[Block, ...], source: StatesSource, progress: Progress | None) -> Float64:
    found = []
    for block in blocks:
        if progress is not None:
            progress("influence of layers", block.index, len(blocks))
        before = np.array(source.hidden)
        source.leave(block, {})
        found.append(influence_of(before, source.hidden))
    return np.array(found)


def _stats(source: StatesSource, block: Block, group: Group, tensors: Mapping[str, Stored]) -> InputStats:
    found = source.stats(block, group, tensors)
    if found is None or found.gram is None:
        raise InvalidValueError(f"MoDeGPT needs the Gram matrix of the inputs of {group.names[0]}; the source of "
                                "statistics gives none")
    return found


def _decomposed(block: Block, tensors: Mapping[str, Stored], seen: Mapping[str, InputStats], heads: Heads, dense: Sizes,
                size: Sizes, config: ModeGpt) -> tuple[dict[str, Stored], LayerShape, tuple[float, float]]:
    """(tensors that changed, the layer's shape, errors of feed-forward and of values)."""
    made: dict[str, Stored] = {}

    def name(part: str, kind: str = "weight") -> str:
        return f"{block.name}.{_PARTS[part]}.{kind}"

    def weight(part: str) -> Float64:
        return np.asarray(tensors[name(part)].dense(), np.float64)

    def put(part: str, values: Float64, kind: str = "weight") -> None:
        made[name(part, kind)] = _stored(values, tensors[name(part, kind)], name(part, kind))

    def rows(part: str, kept: NDArray[np.int64]) -> None:
        put(part, weight(part)[kept])
        if name(part, "bias") in tensors:
            put(part, np.asarray(tensors[name(part, "bias")].dense(), np.float64)[kept], "bias")

    attention = seen["attention"]
    assert attention.gram is not None
    biased = any(name(part, "bias") in tensors for part in "qkv")
    gram = with_ones(attention.gram, attention.total, attention.count) if biased else attention.gram

    def with_bias(part: str) -> Float64:
        values = weight(part)
        if not biased:
            return values
        bias = tensors[name(part, "bias")].dense() if name(part, "bias") in tensors else np.zeros(len(values))
        return np.column_stack([values, np.asarray(bias, np.float64)])

    errors = [0.0, 0.0]
    if size.width < dense.width:
        stats = seen["down"]
        assert stats.gram is not None
        feeding = feed_forward(weight("down"), stats.gram, size.width, config, layer=block.index)
        rows("gate", feeding.neurons)
        rows("up", feeding.neurons)
        put("down", feeding.down)
        errors[0] = feeding.error
    pairs: tuple[tuple[int, ...], ...] | None = None
    if size.head_dim < dense.head_dim:
        kept = query_key(with_bias("q"), with_bias("k"), gram, heads, size.head_dim, config, layer=block.index)
        starts = np.arange(heads.heads) * dense.head_dim
        rows("q", np.concatenate([start + kept[head // heads.group] for head, start in enumerate(starts)]))
        rows("k", np.concatenate([start + own for start, own in zip(starts, kept, strict=False)]))
        # Without pairs what stands in the place of one is turned as the first half of them would be.
        half = size.head_dim // 2
        pairs = tuple(tuple(int(i) for i in (own[:half] if config.pairs else np.arange(half))) for own in kept)
    if size.value_dim < dense.value_dim:
        value, output, errors[1] = value_output(with_bias("v"), weight("o"), gram, heads, size.value_dim, config)
        if biased:
            if name("v", "bias") in tensors:
                put("v", value[:, -1], "bias")
            value = value[:, :-1]
        put("v", value)
        put("o", output)
    shape = LayerShape(heads.heads, heads.kv_heads, size.head_dim, size.value_dim, size.width, pairs)
    return made, shape, (errors[0], errors[1])


def _stored(values: Float64, like: Stored, name: str) -> Dense:
    """Dense, in the number format of what it stands for, else in halves."""
    number: NumberFormat = like.number if isinstance(like, Dense) else FP16
    single = np.ascontiguousarray(values, np.float32)
    if number == BF16:
        return Dense(float32_to_bf16(single), BF16)
    if number == FP32:
        return Dense(single)
    if float(np.abs(single).max(initial=0.0)) > FP16.max_value:
        raise InvalidValueError(f"{name} became {float(np.abs(single).max()):.4g}, which fp16 ends before; take the "
                                "source in bf16 or fp32")
    return Dense(single.astype(np.float16), FP16)
