"""The ONNX graphs of a BERT encoder that ONNX Runtime and OpenVINO are timed on: encoder_graphs.py MODEL FOLDER.

export       torch.onnx.export of the transformers model, as transformers writes attention with attn_implementation
             "eager", of which the exporter keeps GELU and layer norm as single operators
optimised    the same after onnxruntime.transformers.optimizer (BiasGelu, SkipLayerNormalization)
fused        the operators that the optimiser makes of older exports, which it does not find in this one: one Attention
             over packed Q, K, V in each layer, SkipLayerNormalization, BiasGelu
...-int8, ...-int8-channels   each after quantize_dynamic: 8-bit weights, a scale per tensor or per output

All take input_ids and attention_mask (b, s) and give last_hidden_state (b, s, hidden). Prints one JSON line: names.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

MICROSOFT = "com.microsoft"


def export(folder: str, out: Path) -> None:
    import torch
    import transformers

    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False).eval()
    ids = torch.ones(2, 16, dtype=torch.int64)
    batch, length = torch.export.Dim("b", min=1, max=1024), torch.export.Dim("s", min=2, max=512)
    torch.onnx.export(
        model, (ids, torch.ones_like(ids)), str(out), input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state"], dynamo=True, external_data=False,
        dynamic_shapes={name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")})


def optimise(source: Path, out: Path, heads: int, hidden: int) -> None:
    from onnxruntime.transformers import optimizer

    optimizer.optimize_model(str(source), model_type="bert", num_heads=heads, hidden_size=hidden,
                             opt_level=1).save_model_to_file(str(out))


def fuse(plan: Any, out: Path) -> None:
    """The plan in ONNX Runtime's own fused operators."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    weights: list[Any] = []

    def constant(value: Any) -> str:
        weights.append(numpy_helper.from_array(np.ascontiguousarray(value), f"w{len(weights)}"))
        return str(weights[-1].name)

    def op(kind: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [f"v{len(nodes)}"], **attributes))
        return f"v{len(nodes) - 1}"

    def matrix(linear: Any) -> Any:
        return np.asarray(linear.weight.dense(), np.float32).T

    def add_normed(x: str, residual: str, linear: Any, norm: Any) -> str:
        return op("SkipLayerNormalization", op("MatMul", x, constant(matrix(linear))), residual, constant(norm.weight),
                  constant(norm.bias), constant(linear.bias), domain=MICROSOFT, epsilon=norm.eps)

    embedding = np.asarray(plan.embedding.weight.dense(), np.float32)
    zero = constant(np.array([0], np.int64))
    positions = op("Slice", constant(plan.position_embedding + plan.token_type_embedding[0]), zero,
                   op("Shape", "input_ids", start=1, end=2), zero)
    h = op("LayerNormalization", op("Add", op("Gather", constant(embedding), "input_ids"), positions),
           constant(plan.embedding_norm.weight), constant(plan.embedding_norm.bias), axis=-1,
           epsilon=plan.embedding_norm.eps)
    mask = op("Cast", "attention_mask", to=TensorProto.INT32)
    for layer in plan.layers:
        parts = (layer.attention.q, layer.attention.k, layer.attention.v)
        mixed = op("Attention", h, constant(np.concatenate([matrix(part) for part in parts], axis=1)),
                   constant(np.concatenate([part.bias for part in parts])), mask, domain=MICROSOFT,
                   num_heads=layer.attention.heads)
        h = add_normed(mixed, h, layer.attention.o, layer.attention_norm)
        ffn = layer.feed_forward
        wide = op("BiasGelu", op("MatMul", h, constant(matrix(ffn.up))), constant(ffn.up.bias), domain=MICROSOFT)
        h = add_normed(wide, h, ffn.down, layer.feed_forward_norm)
    nodes[-1].output[0] = "last_hidden_state"
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "encoder", [value(name, TensorProto.INT64, ["b", "s"]) for name in ("input_ids", "attention_mask")],
        [value("last_hidden_state", TensorProto.FLOAT, ["b", "s", plan.hidden])], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), out)


def quantise(source: Path, out: Path, per_channel: bool) -> None:
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(source), str(out), weight_type=QuantType.QInt8, per_channel=per_channel,
                     extra_options={"DefaultTensorType": TensorProto.FLOAT})


def main() -> None:
    from edgewise.engine.archs import plan_of
    from edgewise.formats.sources import open_checkpoint

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    model, folder = sys.argv[1], Path(sys.argv[2])
    plan = plan_of(open_checkpoint(model))
    graphs = {name: folder / f"{name}.onnx" for name in ("export", "optimised", "fused")}
    export(model, graphs["export"])
    optimise(graphs["export"], graphs["optimised"], plan.layers[0].attention.heads, plan.hidden)
    fuse(plan, graphs["fused"])
    quantised = []
    for name, path in graphs.items():
        for per_channel in (False, True):
            quantised.append(f"{name}-int8{'-channels' if per_channel else ''}")
            quantise(path, folder / f"{quantised[-1]}.onnx", per_channel)
    print(json.dumps({"float": list(graphs), "int8": quantised}))


if __name__ == "__main__":
    main()
