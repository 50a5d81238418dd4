"""Tensor groups of a model, and the number formats that each may take.

An item is what the search gives a format of its own: one weight of one layer (the experts of a layer together, the two
factors of a product together), the embedding (with the head, where they are one table), the head. A group is what a
sensitivity is measured of: the items of one class in a band of layers. A candidate is a format that has a kernel; it
replaces only the weights that it makes smaller, so that a weight stored in few bits is never spread over more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import Stored
from edgewise.engine.build import packed_parts
from edgewise.engine.layouts import sparse_layout
from edgewise.engine.packing import packed_nbytes, recipe_of
from edgewise.engine.plan import Experts, Linear, Plan
from edgewise.fit.rounding import is_sparse, of_kept

__all__ = ["LADDER", "Candidate", "TensorGroup", "aligned", "candidates_of", "groups_of", "items_of"]

LADDER: tuple[str, ...] = (
    "int8/g32/fp16", "int6/g32/fp16", "int6/g64/fp16", "int5/g32/fp16", "int5/g64/fp16", "int4/g32/fp16/min",
    "int4/g32/fp16", "int4/g64/fp16/min", "int4/g64/fp16", "int3/g32/fp16/min", "int3/g64/fp16/min",
    "int2/g32/fp16/min", "int2/g64/fp16/min")
"""Formats that the search considers, by falling bits per weight: 8.5 down to 2.5."""

_PAGE_BYTES = 4096
_WORTH = 0.98
"""A candidate that leaves more than this share of a group's bytes is not worth a measurement."""


def aligned(nbytes: int) -> int:
    """Bytes that a packed weight takes: the engine starts each on a page of its own."""
    return -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES


@dataclass(frozen=True, eq=False)
class TensorGroup:
    """Weights that take one format together. packed_bytes, stored_bytes: as they are, in the engine and in a file."""

    name: str
    weights: dict[str, Stored] = field(repr=False)
    packed_bytes: int
    stored_bytes: int
    parameters: int
    layer: int | None = None

    @property
    def bits_per_weight(self) -> float:
        """As stored."""
        return 8 * self.stored_bytes / self.parameters


@dataclass(frozen=True, eq=False)
class Candidate:
    """A group in a format; format None keeps every weight as it is stored. replaced: the weights that change."""

    format: QuantFormat | None
    replaced: tuple[str, ...]
    packed_bytes: int
    stored_bytes: int

    @property
    def label(self) -> str:
        return "as stored" if self.format is None else str(self.format)


def groups_of(plan: Plan, *, bands: int = 1) -> list[TensorGroup]:
    """The groups of a plan: of each class of weights so many bands of layers, as even as can be."""
    members: dict[str, dict[str, Stored]] = {}
    layers = len(plan.layers)
    bands = min(bands, layers)
    for kind, index, name, stored in _weights_of(plan):
        band = "" if index is None or bands == 1 else _band(index * bands // layers, bands, layers)
        members.setdefault(f"{kind}{band}", {})[name] = stored
    return [_group(name, weights) for name, weights in members.items()]


def items_of(plan: Plan) -> list[TensorGroup]:
    """Every weight by itself, the experts of a layer together; a layer's items follow each other."""
    members: dict[tuple[str, int | None], dict[str, Stored]] = {}
    for kind, index, name, stored in _weights_of(plan):
        members.setdefault((kind, index), {})[name] = stored
    return [_group(kind, weights, index) for (kind, index), weights in members.items()]


def _weights_of(plan: Plan) -> Iterator[tuple[str, int | None, str, Stored]]:
    """(class, layer, name, weight) of every weight, once; of one that runs as its parts, these."""
    apart = packed_parts(plan)
    yield "embedding", None, plan.embedding.name, plan.embedding.weight
    for index, layer in enumerate(plan.layers):
        attention = layer.attention
        parts: list[tuple[str, Linear]] = []
        if attention is not None:
            parts += [("query", attention.q), ("key", attention.k), ("value", attention.v), ("output", attention.o)]
        if isinstance(layer.feed_forward, Experts):
            parts.append(("router", layer.feed_forward.router))
            if layer.feed_forward.shared_gate is not None:
                parts.append(("router", layer.feed_forward.shared_gate))
        for ffn in layer.feed_forwards:
            if ffn.gate is not None:
                parts.append(("gate", ffn.gate))
            parts += [("up", ffn.up), ("down", ffn.down)]
        for kind, linear in parts:
            for part, stored in apart.get(id(linear.weight), (("", linear.weight),)):
                yield kind, index, f"{linear.key}{part}", stored
    if plan.head is not None and plan.head.weight is not plan.embedding.weight:
        yield "head", None, plan.head.name, plan.head.weight


def _band(band: int, bands: int, layers: int) -> str:
    first, last = -(-band * layers // bands), -(-(band + 1) * layers // bands) - 1
    return f", layer {first}" if first == last else f", layers {first} to {last}"


def _group(name: str, weights: dict[str, Stored], layer: int | None = None) -> TensorGroup:
    packed = sum(aligned(recipe_of(weight_name, stored).nbytes) for weight_name, stored in weights.items())
    return TensorGroup(name, weights, packed, sum(stored.nbytes for stored in weights.values()),
                       sum(int(np.prod(stored.shape)) for stored in weights.values()), layer)


def candidates_of(group: TensorGroup, formats: Sequence[QuantFormat], count: int | None = 5) -> list[Candidate]:
    """The group as stored, then `count` of the formats that make it smaller, spread evenly over their range of bits.

    count None takes every one of them.
    """
    if count is not None and count < 1:
        raise InvalidValueError(f"at least one candidate per group; given {count}")
    useful = [candidate for fmt in formats if (candidate := _candidate(group, fmt)) is not None]
    useful.sort(key=lambda candidate: -candidate.packed_bytes)
    if count is not None and len(useful) > count:
        places = np.rint(np.linspace(0, len(useful) - 1, count)).astype(int)
        useful = [useful[place] for place in places]
    return [Candidate(None, (), group.packed_bytes, group.stored_bytes), *useful]


def _candidate(group: TensorGroup, fmt: QuantFormat) -> Candidate | None:
    replaced, packed, stored_bytes = [], 0, 0
    size = fmt.granularity.group
    for name, stored in group.weights.items():
        before, after = recipe_of(name, stored).nbytes, _packed_bytes(stored, fmt)
        part_of_another = name.endswith("]")  # rows of a tensor that several linears lie in stay as they are
        if after is not None and after < before and not part_of_another and (not size or stored.shape[1] % size == 0):
            replaced.append(name)
            packed += aligned(after)
            stored_bytes += _stored_bytes(stored, fmt)
        else:
            packed += aligned(before)
            stored_bytes += stored.nbytes
    if not replaced or packed > _WORTH * group.packed_bytes:
        return None
    return Candidate(fmt, tuple(replaced), packed, stored_bytes)


def _packed_bytes(stored: Stored, fmt: QuantFormat) -> int | None:
    """None where no kernel reads the weight in this format."""
    if not is_sparse(stored):
        return packed_nbytes(fmt, stored.shape)
    layout = sparse_layout(of_kept(stored, fmt), stored.shape[1]) if stored.n_m in ((2, 4), (1, 2)) else None
    return None if layout is None else int(layout.native.nbytes(*stored.shape))


def _stored_bytes(stored: Stored, fmt: QuantFormat) -> int:
    if not is_sparse(stored):
        return fmt.nbytes(stored.shape)
    return stored.nbytes - stored.values.nbytes + of_kept(stored, fmt).nbytes(stored.values.shape)
