"""A trained network as a Graph: weights as codes, inputs of quantised layers behind "Snap" nodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from edgewise.core.errors import UnsupportedError
from edgewise.core.graph import Graph, Node, TensorInfo
from edgewise.core.numbers import quantize
from edgewise.core.storage import Dense, QuantizedTensor, Stored
from edgewise.train.qat import QuantizedLayer

__all__ = ["graph_of"]


def graph_of(model: nn.Sequential, shape: Sequence[int], name: str = "net") -> Graph:
    """The graph of a Sequential of Conv2d, Linear, BatchNorm2d, ReLU, MaxPool2d and Flatten, in evaluation.

    shape: of one input, without the batch. Layers of train.qat become Snap, codes and the layer's operator.
    """
    if not isinstance(model, nn.Sequential):
        raise UnsupportedError(f"a Graph is made of a Sequential of plain layers; given {type(model).__name__}")
    nodes: list[Node] = []
    constants: dict[str, Stored] = {}
    tensors = {"input": TensorInfo("input", ("batch", *shape))}
    here = "input"

    def add(op: str, inputs: tuple[str, ...], **attributes: object) -> None:
        nonlocal here
        nodes.append(Node(f"{len(nodes)}.{op}", op, inputs, (f"t{len(nodes)}",), attributes))
        here = nodes[-1].outputs[0]

    def constant(called: str, stored: Stored, of: Sequence[int]) -> str:
        constants[called], tensors[called] = stored, TensorInfo(called, tuple(of))
        return called

    def dense(called: str, values: object) -> str:
        array = np.array(values, np.float32)
        return constant(called, Dense(array), array.shape)

    for place, module in model.named_children():
        layer = module
        if isinstance(module, QuantizedLayer):
            layer = module.layer
            add("Snap", (here,), element=module.element.name, scale=float(module.inputs.scale()))
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = layer.weight.detach().numpy()
            if isinstance(module, QuantizedLayer):
                codes, scales, _ = quantize(weight.reshape(len(weight), -1), module.fmt)
                stored = constant(f"{place}.weight", QuantizedTensor(codes, scales, module.fmt), weight.shape)
            else:
                stored = dense(f"{place}.weight", weight)
            bias = () if layer.bias is None else (dense(f"{place}.bias", layer.bias.detach().numpy()),)
            if isinstance(layer, nn.Linear):
                add("Gemm", (here, stored, *bias), transB=1)
            else:
                if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                    raise UnsupportedError(f"layer {place!r}: a convolution is padded by zeros and numbers here")
                add("Conv", (here, stored, *bias), strides=list(layer.stride), pads=[*layer.padding, *layer.padding],
                    dilations=list(layer.dilation), group=layer.groups)
        elif isinstance(layer, nn.BatchNorm2d):
            parts = {"scale": layer.weight, "bias": layer.bias, "mean": layer.running_mean, "var": layer.running_var}
            add("BatchNormalization", (here, *(dense(f"{place}.{key}", value.detach().numpy())
                                               for key, value in parts.items())), epsilon=layer.eps)
        elif isinstance(layer, nn.ReLU):
            add("Relu", (here,))
        elif isinstance(layer, nn.MaxPool2d):
            size = layer.kernel_size if isinstance(layer.kernel_size, tuple) else (layer.kernel_size,) * 2
            step = layer.stride if isinstance(layer.stride, tuple) else (layer.stride,) * 2
            if layer.padding or layer.dilation != 1 or layer.ceil_mode:
                raise UnsupportedError(f"layer {place!r}: pooling without padding, dilation or ceiling only")
            add("MaxPool", (here,), kernel_shape=list(size), strides=list(step))
        elif isinstance(layer, nn.Flatten):
            add("Flatten", (here,), axis=1)
        else:
            raise UnsupportedError(f"layer {place!r} is a {type(layer).__name__}, which no Graph is made of here")
    # The rank of the result follows from the layers; only its name and batch are promised.
    tensors[here] = TensorInfo(here, ("batch", "classes"))
    return Graph(name, tuple(nodes), tensors, ("input",), (here,), constants)
