"""Small networks as ONNX files: weights stay codes, packed, and are looked up in their format's table when they run.

Every operator is standard ONNX, so that ONNX Runtime runs posits and FP4 without knowing them:

    a QuantizedTensor   codes (UINT4, UINT8, UINT16) -> Cast -> Gather from the table of values -> Mul by the scale;
                        integer codes (INT4, INT8, ...) need no table
    a "Snap" node       its input divided by the scale, compared with the boundaries between the values, the true
                        comparisons counted, the count looked up, times the scale: core.round_to, to the bit

A Graph's other operators are written as they are. Opset 21, which brought 4-bit tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.elements import ELEMENTS, NumberFormat, float32_table
from edgewise.core.errors import UnsupportedError, require
from edgewise.core.graph import Graph
from edgewise.core.storage import Dense, QuantizedTensor
from edgewise.formats.cache import write_aside

__all__ = ["write_onnx"]

OPSET, IR = 21, 10


def write_onnx(graph: Graph, path: str | Path) -> int:
    """Write the graph and return the bytes of the file. Needs the extra `onnx`.

    "Snap" nodes have the attributes element (a name that QuantFormat.parse knows) and scale.
    """
    require("onnx", extra="onnx", purpose="writing an ONNX file")
    import onnx

    lowered = _Lowered()
    for name, stored in graph.constants.items():
        shape = graph.tensors[name].shape if name in graph.tensors else stored.shape
        if isinstance(stored, Dense):
            lowered.constant(name, np.asarray(stored.dense()).reshape(shape))  # type: ignore[arg-type]
        elif isinstance(stored, QuantizedTensor):
            lowered.weight(name, stored, tuple(int(n) for n in shape))
        else:
            raise UnsupportedError(f"tensor {name!r}: an ONNX file holds dense and quantised tensors; given "
                                   f"{type(stored).__name__}; write its dense() form")
    for node in graph.nodes:
        if node.op == "Snap":
            lowered.snap(node.inputs[0], node.outputs[0], ELEMENTS[node.attributes["element"]],
                         float(node.attributes["scale"]))
        else:
            lowered.nodes.append(onnx.helper.make_node(node.op, list(node.inputs), list(node.outputs), name=node.name,
                                                       **node.attributes))

    def info(name: str) -> Any:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(graph.tensors[name].shape))

    made = onnx.helper.make_graph(lowered.nodes, graph.name, [info(name) for name in graph.inputs],
                                  [info(name) for name in graph.outputs], list(lowered.constants.values()))
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR,
                                   producer_name="edgewise")
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    with write_aside(path) as file:
        file.write(data)
    return len(data)


class _Lowered:
    """Initialisers and nodes of the file, tables shared."""

    def __init__(self) -> None:
        self.constants: dict[str, Any] = {}
        self.nodes: list[Any] = []

    def constant(self, name: str, values: NDArray[Any]) -> str:
        from onnx import numpy_helper

        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def weight(self, name: str, stored: QuantizedTensor, shape: tuple[int, ...]) -> None:
        fmt = stored.format
        if fmt.zero != "none" or fmt.granularity.kind == "group" or fmt.n_m:
            raise UnsupportedError(f"tensor {name!r}: an ONNX file is written of one scale per row or tensor, without "
                                   f"zero point; given {fmt}")
        from onnx import TensorProto

        self._codes(f"{name}.codes", stored.codes, shape, fmt.element)
        if fmt.element.kind == "int":
            values = self.node("Cast", [f"{name}.codes"], f"{name}.values", to=TensorProto.FLOAT)
        else:
            table = self.constant(f"table.{fmt.element.name}", np.nan_to_num(fmt.element.values()).astype(np.float32))
            places = self.node("Cast", [f"{name}.codes"], f"{name}.places", to=TensorProto.INT32)
            values = self.node("Gather", [table, places], f"{name}.values")
        scales = self.constant(f"{name}.scales", stored.scales.reshape(-1, *(1,) * (len(shape) - 1)))
        self.node("Mul", [values, scales], name)

    def _codes(self, name: str, codes: NDArray[Any], shape: tuple[int, ...], element: NumberFormat) -> None:
        from onnx import TensorProto, helper

        signed = element.kind == "int" and element.signed
        if element.bits > 4:
            self.constant(name, codes.reshape(shape))
            return
        flat = codes.reshape(-1).astype(np.uint8) & 0xF
        flat = np.concatenate([flat, np.zeros(len(flat) % 2, np.uint8)])
        kind = TensorProto.INT4 if signed else TensorProto.UINT4
        self.constants[name] = helper.make_tensor(name, kind, shape, (flat[::2] | flat[1::2] << 4).tobytes(), raw=True)

    def snap(self, name: str, output: str, element: NumberFormat, scale: float) -> None:
        from onnx import TensorProto

        boundaries, values = float32_table(element)
        step = self.constant(f"{output}.scale", np.array(scale, np.float32))
        last = self.constant("last axis", np.array([-1], np.int64))
        ends = self.constant(f"boundaries.{element.name}", boundaries)
        table = self.constant(f"values.{element.name}", values)
        scaled = self.node("Div", [name, step], f"{output}.scaled")
        wide = self.node("Unsqueeze", [scaled, last], f"{output}.wide")
        above = self.node("Greater", [wide, ends], f"{output}.above")
        ones = self.node("Cast", [above], f"{output}.ones", to=TensorProto.FLOAT)
        count = self.node("ReduceSum", [ones, last], f"{output}.count", keepdims=0)
        place = self.node("Cast", [count], f"{output}.place", to=TensorProto.INT32)
        found = self.node("Gather", [table, place], f"{output}.found")
        self.node("Mul", [found, step], output)
