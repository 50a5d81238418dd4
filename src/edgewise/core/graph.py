"""A small network as data: nodes in the order they run, and what is known of every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgewise.core.errors import InvalidValueError
from edgewise.core.plain import Plain
from edgewise.core.storage import Stored

__all__ = ["Graph", "Node", "TensorInfo"]


@dataclass(frozen=True)
class TensorInfo(Plain):
    """Shape and element type of a tensor. A dimension is a number, or the name of one that varies ("batch")."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Node(Plain):
    """One operation: its ONNX operator name, tensor names in and out ("" for an input left out), attributes."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Graph(Plain):
    """nodes stand in an order in which they can run; every tensor is written once.

    constants: weights by tensor name; left out of JSON.
    """

    name: str
    nodes: tuple[Node, ...]
    tensors: Mapping[str, TensorInfo]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Stored] = field(default_factory=dict, metadata={"plain": False}, compare=False)

    def __post_init__(self) -> None:
        known = set(self.inputs)
        written = {name for node in self.nodes for name in node.outputs}
        for node in self.nodes:
            what = f"graph {self.name!r}: node {node.name!r}"
            for name in node.inputs:
                if name in written and name not in known:
                    raise InvalidValueError(f"{what} reads {name!r} before it is written")
                if name and name not in known and name not in self.tensors:
                    raise InvalidValueError(f"{what} reads unknown tensor {name!r}")
            for name in node.outputs:
                if name and name in known:
                    raise InvalidValueError(f"{what} writes {name!r} a second time")
                known.add(name)
        for name in self.outputs:
            if name not in known and name not in self.tensors:
                raise InvalidValueError(f"graph {self.name!r}: output {name!r} is never written")

    def producer(self, tensor: str) -> Node | None:
        """The node that writes a tensor; None for an input or a constant."""
        return next((node for node in self.nodes if tensor in node.outputs), None)

    def consumers(self, tensor: str) -> tuple[Node, ...]:
        """The nodes that read a tensor, in order."""
        return tuple(node for node in self.nodes if tensor in node.inputs)

    def __repr__(self) -> str:
        return f"Graph({self.name}: {len(self.nodes)} nodes, {', '.join(self.inputs)} -> {', '.join(self.outputs)})"
