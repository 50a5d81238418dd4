"""A graph can run in the order its nodes stand in."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.core.graph import Graph, Node, TensorInfo
from edgewise.core.storage import Dense

TENSORS = {name: TensorInfo(name, ("batch", 4)) for name in ("x", "h", "y")} | {"w": TensorInfo("w", (4, 4))}
GEMM = Node("gemm", "Gemm", ("x", "w"), ("h",), {"alpha": 1.0})
RELU = Node("relu", "Relu", ("h", ""), ("y",))


def graph(*nodes, inputs=("x",), outputs=("y",)):
    return Graph("g", nodes, TENSORS, inputs, outputs, {"w": Dense(np.ones((4, 4), np.float32))})


def test_neighbours():
    g = graph(GEMM, RELU)
    assert g.producer("h") is GEMM
    assert g.producer("x") is None
    assert g.consumers("h") == (RELU,)
    assert repr(g) == "Graph(g: 2 nodes, x -> y)"


def test_json_leaves_the_constants_out():
    g = graph(GEMM, RELU)
    data = g.to_json()
    assert "constants" not in data
    assert Graph.from_json(data) == g
    assert Graph.from_json(data).tensors["x"].shape == ("batch", 4)


@pytest.mark.parametrize(("nodes", "options", "message"), [
    ((RELU, GEMM), {}, "reads 'h' before it is written"),
    ((GEMM, GEMM, RELU), {}, "a second time"),
    ((GEMM, Node("n", "Relu", ("z",), ("y",))), {}, "unknown tensor 'z'"),
    ((GEMM,), {"outputs": ("nowhere",)}, "never written"),
])
def test_refusals(nodes, options, message):
    with pytest.raises(InvalidValueError, match=message):
        graph(*nodes, **options)
