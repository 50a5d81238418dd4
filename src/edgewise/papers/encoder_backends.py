"""One encoder in several runtimes, made from the same Plan: edgewise, torch, ONNX Runtime, MLX.

A backend is a function: ids (batch, tokens) int64, mask (batch, tokens) bool -> last hidden states (batch, tokens,
hidden) float32, complete when it returns. edgewise reads one sequence after the other, without its padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import MissingExtraError, UnsupportedError, notice, require
from edgewise.engine.loading import session_of
from edgewise.engine.plan import FeedForward, Layer, Linear, Plan

__all__ = ["BACKENDS", "Backend", "backends", "edgewise_backend", "mlx_backend", "onnx_backend", "torch_backend"]

Backend = Callable[[NDArray[np.int64], NDArray[np.bool_]], NDArray[np.float32]]
Ids, Mask = NDArray[np.int64], NDArray[np.bool_]


def edgewise_backend(plan: Plan, threads: int, *, padding: bool = False) -> Backend:
    """padding: read the padding too, as if it were text, which is what forgetting the mask does."""
    session = session_of(plan, kv="fp32", context=plan.context, batch=plan.context, threads=threads)

    def run(ids: Ids, mask: Mask) -> NDArray[np.float32]:
        out = np.zeros((*ids.shape, plan.hidden), np.float32)
        for row, (tokens, kept) in enumerate(zip(ids, mask, strict=True)):
            count = len(tokens) if padding else int(kept.sum())
            session.truncate(0, 0)
            session.forward(np.ascontiguousarray(tokens[:count], np.int32), np.zeros(count, np.int32))
            out[row, :count] = session.normed(np.arange(count, dtype=np.int32))
        return out

    return run


def torch_backend(model: Any, threads: int) -> Backend:
    """A transformers encoder."""
    torch = require("torch", extra="torch", purpose="the torch backend")
    torch.set_num_threads(threads)

    def run(ids: Ids, mask: Mask) -> NDArray[np.float32]:
        with torch.inference_mode():
            states = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64)))
        found: NDArray[np.float32] = states.last_hidden_state.numpy()
        return found

    return run


def _dense(linear: Linear) -> NDArray[np.float32]:
    return np.ascontiguousarray(linear.weight.dense(), np.float32)


def _plain(layer: Layer) -> FeedForward:
    """What the graphs below know: post-norm layers with an ungated exact GELU."""
    ffn = layer.feed_forward
    if not isinstance(ffn, FeedForward) or ffn.gate is not None or ffn.function != "gelu" or layer.order != "post":
        raise UnsupportedError("this backend runs BERT-like encoders: post-norm layers with an ungated GELU")
    return ffn


def onnx_backend(plan: Plan, threads: int) -> Backend:
    """The plan as an ONNX graph of standard operators (opset 20), run by ONNX Runtime's CPU provider."""
    onnx = require("onnx", extra="onnx", purpose="the ONNX Runtime backend")
    runtime = require("onnxruntime", extra="onnx", purpose="the ONNX Runtime backend")
    helper, nodes, weights = onnx.helper, [], []

    def constant(value: NDArray[Any]) -> str:
        name = f"w{len(weights)}"
        weights.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def op(kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def linear(x: str, source: Linear) -> str:
        y = op("MatMul", x, constant(_dense(source).T))
        return y if source.bias is None else op("Add", y, constant(source.bias))

    def normed(x: str, norm: Any) -> str:
        return op("LayerNormalization", x, constant(norm.weight), constant(norm.bias), axis=-1, epsilon=norm.eps)

    h = op("Gather", constant(_dense(plan.embedding)), "ids")
    h = op("Add", h, op("Gather", constant(_table(plan.position_embedding)), "positions"))
    h = op("Add", h, constant(_table(plan.token_type_embedding)[0]))
    h = normed(h, plan.embedding_norm)
    for layer in plan.layers:
        attention, ffn = layer.attention, _plain(layer)
        split = constant(np.array([0, 0, attention.heads, attention.head_dim], np.int64))

        def heads(x: str, split: str = split, order: tuple[int, ...] = (0, 2, 1, 3)) -> str:
            return op("Transpose", op("Reshape", x, split), perm=order)

        scores = op("MatMul", heads(linear(h, attention.q)), heads(linear(h, attention.k), order=(0, 2, 3, 1)))
        scores = op("Add", op("Mul", scores, constant(np.float32(attention.scale))), "hidden_positions")
        mixed = op("MatMul", op("Softmax", scores, axis=-1), heads(linear(h, attention.v)))
        mixed = op("Reshape", op("Transpose", mixed, perm=[0, 2, 1, 3]),
                   constant(np.array([0, 0, attention.heads * attention.head_dim], np.int64)))
        h = normed(op("Add", h, linear(mixed, attention.o)), layer.attention_norm)
        h = normed(op("Add", h, linear(op("Gelu", linear(h, ffn.up)), ffn.down)), layer.feed_forward_norm)
    value, kinds = helper.make_tensor_value_info, onnx.TensorProto
    graph = helper.make_graph(
        nodes, plan.arch,
        [value("ids", kinds.INT64, ["b", "s"]), value("positions", kinds.INT64, ["b", "s"]),
         value("hidden_positions", kinds.FLOAT, ["b", 1, 1, "s"])],
        [value(h, kinds.FLOAT, ["b", "s", plan.hidden])], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(ids: Ids, mask: Mask) -> NDArray[np.float32]:
        feeds = {"ids": ids, "positions": _positions(plan, mask), "hidden_positions": _hidden(mask)}
        found: NDArray[np.float32] = session.run(None, feeds)[0]
        return found

    return run


def mlx_backend(plan: Plan, threads: int, *, forced: bool = True) -> Backend:
    """The plan in MLX on its CPU device. It picks its own threads. forced: wait for the result, as a timer must."""
    mx = require("mlx.core", extra="mlx", purpose="the MLX backend")
    mx.set_default_device(mx.cpu)
    del threads

    def linear(source: Linear) -> Callable[[Any], Any]:
        weight = mx.array(_dense(source)).T
        bias = mx.array(0.0 if source.bias is None else source.bias)
        return lambda x: mx.addmm(bias, x, weight)

    def normed(norm: Any) -> Callable[[Any], Any]:
        weight, bias = mx.array(norm.weight), mx.array(norm.bias)
        return lambda x: mx.fast.layer_norm(x, weight, bias, norm.eps)

    tables = [mx.array(t) for t in (_dense(plan.embedding), _table(plan.position_embedding),
                                    _table(plan.token_type_embedding)[0])]
    first = normed(plan.embedding_norm)
    layers = [(layer.attention, *(linear(part) for part in (
        layer.attention.q, layer.attention.k, layer.attention.v, layer.attention.o, _plain(layer).up,
        _plain(layer).down)), normed(layer.attention_norm), normed(layer.feed_forward_norm)) for layer in plan.layers]

    def run(ids: Ids, mask: Mask) -> Any:
        h = first(tables[0][mx.array(ids)] + tables[1][mx.array(_positions(plan, mask))] + tables[2])
        hidden = mx.array(_hidden(mask))
        for attention, q, k, v, o, up, down, attention_norm, ffn_norm in layers:
            def heads(x: Any, attention: Any = attention) -> Any:
                return x.reshape(*x.shape[:2], attention.heads, attention.head_dim).transpose(0, 2, 1, 3)

            scores = (heads(q(h)) * attention.scale) @ heads(k(h)).transpose(0, 1, 3, 2) + hidden
            mixed = (mx.softmax(scores, axis=-1) @ heads(v(h))).transpose(0, 2, 1, 3)
            h = attention_norm(h + o(mixed.reshape(*mixed.shape[:2], -1)))
            wide = up(h)
            h = ffn_norm(h + down(wide * (1 + mx.erf(wide / math.sqrt(2))) / 2))
        if not forced:
            return h
        mx.eval(h)
        return np.array(h)

    return run


def _table(values: NDArray[np.float32] | None) -> NDArray[np.float32]:
    if values is None:
        raise UnsupportedError("this backend runs encoders with learned positions and token types")
    return np.asarray(values, np.float32)


def _positions(plan: Plan, mask: Mask) -> NDArray[np.int64]:
    """Position numbers, (batch, tokens). Those of padding do not matter; RoBERTa counts the others alone."""
    positions: NDArray[np.int64] = np.maximum(mask.cumsum(axis=1) - 1, 0) + plan.position_offset
    return positions


def _hidden(mask: Mask) -> NDArray[np.float32]:
    """What is added to scores, (batch, 1, 1, tokens): the most negative number where there is padding."""
    hidden: NDArray[np.float32] = np.where(mask, np.float32(0), np.finfo(np.float32).min)[:, None, None, :]
    return hidden


BACKENDS = ("edgewise", "torch", "onnxruntime", "mlx")


def backends(plan: Plan, torch_model: Any, threads: int) -> dict[str, Backend]:
    """Those that are installed; a notice names each that is not, and why."""
    makers: dict[str, Callable[[], Backend]] = {
        "edgewise": lambda: edgewise_backend(plan, threads), "torch": lambda: torch_backend(torch_model, threads),
        "onnxruntime": lambda: onnx_backend(plan, threads), "mlx": lambda: mlx_backend(plan, threads)}
    found = {}
    for name in BACKENDS:
        try:
            found[name] = makers[name]()
        except MissingExtraError as error:
            notice("info", f"{name} is left out: {error}", where="backends")
    return found
