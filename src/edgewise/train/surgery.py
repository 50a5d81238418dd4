"""Surgery on torch networks for pictures: which channels and heads go together, cutting them, folding, MACs, ONNX.

What must be cut together is found by torch-pruning's dependency graph (Fang et al., "DepGraph: Towards Any Structural
Pruning", CVPR 2023, arXiv:2301.12900; MIT): channels that an addition ties, inputs of the layers that read them, their
normalisations, the places of a flattened channel, the heads of an attention. The cut itself is ours, and is how a
folder is read (models/image_folder.py): tensors are sliced and every layer takes the shapes they have. So whatever is
cut here loads.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from edgewise.core.errors import InvalidValueError, UnsupportedError, notice, require
from edgewise.formats.cache import write_aside
from edgewise.models.image_folder import take_shapes
from edgewise.models.vision_transformer import Attention

__all__ = ["Part", "Unit", "cut", "fold_batch_norm", "macs", "parameters", "remove_blocks", "units_of",
           "write_onnx_net"]

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Where a unit's channels lie in one tensor: place places[i] along axis belongs to channel channels[i].

    side "out": the layer that makes the channel, with its bias and normalisation; "in": a layer that reads it.
    """

    tensor: str
    axis: int
    places: Places
    channels: Places
    side: Literal["out", "in"]


@dataclass(frozen=True)
class Unit:
    """Channels that can be cut one by one, each from all its parts at once. A channel of an attention is a head.

    name: the first layer that makes them.
    """

    name: str
    size: int
    parts: tuple[Part, ...]

    def makers(self) -> tuple[str, ...]:
        """The weights that make the channels."""
        return tuple(part.tensor for part in self.parts if part.side == "out" and part.tensor.endswith("weight"))


def units_of(model: nn.Module, example: Tensor, *, keep: Collection[str] = ()) -> list[Unit]:
    """Every unit that can be cut, in the order in which the network runs; the network's own outputs cannot:
    those of its last layer.

    example: an input, (batch, ...). keep: layers by name whose channels stay. Needs the package torch-pruning.
    """
    pruning = require("torch_pruning", extra="vision", purpose="finding what must be cut together")
    model = copy.deepcopy(model).eval().requires_grad_(True)
    names = {module: name for name, module in model.named_modules()}
    tensors = {id(value): name for name, value in model.named_parameters()}
    unknown = set(keep) - set(names.values())
    if unknown:
        raise InvalidValueError(f"the network has no layer {sorted(unknown)[0]!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of parameters outside of layers, which it then handles
        graph = pruning.DependencyGraph().build_dependency(model, example)
        groups = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
    order = {module: place for place, module in enumerate(_running_order(model, example))}
    last = max((layer for layer in order if isinstance(layer, nn.Conv2d | nn.Linear)), key=order.__getitem__)
    kept = {last, *(model.get_submodule(name) for name in keep)}
    found = []
    for group in groups:
        layers = [item.dep.target.module for item in group if isinstance(item.dep.target.module, nn.Module)]
        makers = [item.dep.target.module for item in group
                  if graph.is_out_channel_pruning_fn(item.dep.handler) and item.dep.target.module in order]
        if kept & set(makers):
            continue
        maker = min((layer for layer in makers if isinstance(layer, nn.Conv2d | nn.Linear)), key=order.__getitem__)
        head = _head_dim(model, [names[layer] for layer in layers if layer in names])
        parts: list[Part] = []
        for item in group:
            out = graph.is_out_channel_pruning_fn(item.dep.handler)
            parts += _parts_of(item, names, tensors, out, head)
        size = graph.get_out_channels(group[0].dep.target.module)
        found.append(Unit(names[maker], size // head, tuple(parts)))
    return sorted(found, key=lambda unit: order[model.get_submodule(unit.name)])


def cut(model: nn.Module, units: Sequence[Unit], removed: Mapping[str, Sequence[int] | Places]) -> nn.Module:
    """A copy without the given channels. removed: by the name of their unit. A unit keeps one channel at least.

    A channel whose makers are zero, and stay zero through its normalisation, leaves the outputs as they are.
    """
    known = {unit.name: unit for unit in units}
    lost = {}
    for name, channels in removed.items():
        if name not in known:
            raise InvalidValueError(f"no unit {name!r}; there are {', '.join(known)}")
        gone = np.unique(np.asarray(channels, np.int64))
        if len(gone) >= known[name].size or (len(gone) and not 0 <= gone[0] <= gone[-1] < known[name].size):
            raise InvalidValueError(f"unit {name!r} has channels 0 to {known[name].size - 1} and keeps one at least; "
                                    f"{len(gone)} are to go: {gone[:8].tolist()}")
        if len(gone):
            lost[name] = gone
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    masks: dict[tuple[str, int], NDArray[np.bool_]] = {}
    for name, gone in lost.items():
        for part in known[name].parts:
            mask = masks.setdefault((part.tensor, part.axis), np.ones(state[part.tensor].shape[part.axis], bool))
            mask[part.places[np.isin(part.channels, gone)]] = False
    for (tensor, axis), mask in masks.items():
        state[tensor] = state[tensor].index_select(axis, torch.from_numpy(np.flatnonzero(mask)))
    made = copy.deepcopy(model)
    take_shapes(made, {key: value.detach().clone() for key, value in state.items()}, where="cut")
    return made.train(model.training)


def remove_blocks(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy in which the named blocks of a residual network pass their input on: cutting in depth."""
    made = copy.deepcopy(model)
    for name in names:
        if not getattr(made.get_submodule(name), "removable", False):
            raise InvalidValueError(f"{name!r} is no block whose output has the shape of its input")
    take_shapes(made, {key: value.detach().clone() for key, value in model.state_dict().items()
                       if not key.endswith("num_batches_tracked")
                       and not any(key.startswith(f"{name}.") for name in names)}, where="remove_blocks")
    return made


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy in evaluation whose batch normalisations are part of the convolutions before them.

    w' = w g / sqrt(v + eps), b' = (b - m) g / sqrt(v + eps) + beta, in float64. One that follows anything else, or a
    convolution that others read too, stays, with a notice.
    """
    made = copy.deepcopy(model).eval()
    graph = _Tracer().trace(made)
    layers = dict(made.named_modules())
    for node in graph.nodes:
        norm = layers.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        before = node.args[0]
        conv = layers.get(str(before.target)) if isinstance(before, fx.Node) and before.op == "call_module" else None
        if not isinstance(conv, nn.Conv2d) or len(before.users) != 1:
            notice("fallback", f"{node.target} follows no convolution of its own and is not folded", where="fold")
            continue
        scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        bias = 0 if conv.bias is None else conv.bias.double()
        shifted = (bias - norm.running_mean.double()) * scale + norm.bias.double()
        with torch.no_grad():
            conv.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).float())
            conv.bias = nn.Parameter(shifted.float())
        parent, _, name = str(node.target).rpartition(".")
        setattr(made.get_submodule(parent), name, nn.Identity())
    return made


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of convolutions, linear layers and attention for one input of the example's shape."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += output[0].numel() * math.prod(layer.weight.shape[1:])
        elif isinstance(layer, nn.Linear):
            total += output[0].numel() * layer.in_features
        elif isinstance(layer, Attention):
            total += 2 * inputs[0].shape[1] ** 2 * layer.value.out_features

    with _hooked(model, count), torch.no_grad():
        copy_mode = model.training
        model.eval()
        model(example[:1])
        model.train(copy_mode)
    return total


def parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(value.numel() for value in model.parameters())


def write_onnx_net(model: nn.Module, example: Tensor, path: str | Path) -> int:
    """Write the network in evaluation as ONNX, the first dimension of its input free; the bytes of the file.

    Inputs and outputs are called "input" and "output". Needs the packages onnx and onnxscript.
    """
    for name in ("onnx", "onnxscript"):
        require(name, extra="vision", purpose="writing a torch network as ONNX")
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it says that torchvision is not installed, which nothing here needs
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            made: Any = torch.onnx.export(
                copy.deepcopy(model).eval(), (torch.cat([example[:1], example[:1]]),), dynamo=True, verbose=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["input"], output_names=["output"])
        data: bytes = made.model_proto.SerializeToString()
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedError(f"{type(model).__name__} cannot be written as ONNX: {error}") from error
    finally:
        logger.setLevel(level)
    with write_aside(path) as file:
        file.write(data)
    return len(data)


# ---- the dependency graph -----------------------------------------------------------------------------------------

def _parts_of(item: Any, names: Mapping[nn.Module, str], tensors: Mapping[int, str], out: bool,
              head: int) -> list[Part]:
    layer, places = item.dep.target.module, np.asarray(item.idxs, np.int64)
    channels = np.asarray(item.root_idxs, np.int64) // head
    if isinstance(layer, nn.Parameter):
        axis = max(place for place, size in enumerate(layer.shape) if size > 1)
        return [Part(tensors[id(layer)], axis, places, channels, "out")]
    if layer not in names:
        return []
    name = names[layer]
    if isinstance(layer, nn.BatchNorm2d):
        kept = ("weight", "bias", "running_mean", "running_var")
        return [Part(f"{name}.{key}", 0, places, channels, "out") for key in kept]
    if isinstance(layer, nn.LayerNorm):
        return [Part(f"{name}.{key}", 0, places, channels, "out") for key in ("weight", "bias")]
    if isinstance(layer, nn.Conv2d | nn.Linear):
        depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1
        if not out and not depthwise:
            return [Part(f"{name}.weight", 1, places, channels, "in")]
        kept = ("weight",) if layer.bias is None else ("weight", "bias")
        return [Part(f"{name}.{key}", 0, places, channels, "out") for key in kept]
    raise UnsupportedError(f"layer {name!r} is a {type(layer).__name__}, whose channels are not cut here; name it, or "
                           "the layers before it, in `keep`")


def _head_dim(model: nn.Module, names: Sequence[str]) -> int:
    """Channels that go as one: those of a head where the unit lies inside an attention, else 1."""
    for name in names:
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent) if parent else model
        if isinstance(owner, Attention) and last == "value":
            inside = {f"{parent}.{key}" for key in ("query", "key", "value", "out")}
            if set(names) & inside == inside and len(set(names) - inside) == 0:
                return owner.head_dim
    return 1


def _running_order(model: nn.Module, example: Tensor) -> list[nn.Module]:
    order: list[nn.Module] = []

    def seen(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if layer not in order:
            order.append(layer)

    with _hooked(model, seen), torch.no_grad():
        model(example)
    return order


@contextlib.contextmanager
def _hooked(model: nn.Module, call: Any) -> Iterator[None]:
    handles = [layer.register_forward_hook(call) for layer in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Tracer(fx.Tracer):
    """Goes into blocks, not into layers whose padding or heads depend on their input."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | Attention) or super().is_leaf_module(m, module_qualified_name)
