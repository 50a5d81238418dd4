"""Image networks as folders: config.json says which network, model.safetensors holds tensors of any width.

A network whose channels or heads were cut has other shapes than its configuration builds. What was written is read:
the network is built, then every layer takes the shapes that the file has, and a picture goes through before it is
given away. The architecture is called `EdgewiseImage...`, which no other software knows, so that it fails loudly there;
train/surgery.py writes ONNX for others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edgewise.core.errors import FormatError, InvalidValueError
from edgewise.core.plain import Plain
from edgewise.formats.cache import folder_aside
from edgewise.formats.folder_writer import check_target
from edgewise.formats.hostile import read_json
from edgewise.formats.safetensors import open_tensors, write_safetensors
from edgewise.models.convnets import ResNet, Stack
from edgewise.models.efficientnet_lite import EfficientNetLite
from edgewise.models.vision_transformer import VisionTransformer

__all__ = ["ImageConfig", "picture_shape", "read_image_net", "take_shapes", "write_image_net"]

_CONFIGS = {f"EdgewiseImage{config.__name__}": config for config in (Stack, ResNet, VisionTransformer,
                                                                      EfficientNetLite)}


class ImageConfig(Protocol):
    """What builds an image network. Its pictures are (channels, size, size)."""

    @property
    def channels(self) -> int: ...

    @property
    def size(self) -> int: ...

    def build(self) -> nn.Module: ...


def picture_shape(config: ImageConfig) -> tuple[int, int, int]:
    """(channels, height, width) of one picture."""
    return config.channels, config.size, config.size


def write_image_net(model: nn.Module, config: ImageConfig, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a network that `config` built, cut or folded since or not. Whole or not at all."""
    name = f"EdgewiseImage{type(config).__name__}"
    if name not in _CONFIGS or not isinstance(config, Plain):
        raise InvalidValueError(f"an image network is described by one of {', '.join(sorted(_CONFIGS))}; given "
                                f"{type(config).__name__}")
    replace = check_target(path, overwrite=overwrite)
    arrays = {key: value.detach().numpy() for key, value in model.state_dict().items()
              if not key.endswith("num_batches_tracked")}
    for key, values in arrays.items():
        if values.dtype != np.float32:
            raise InvalidValueError(f"tensor {key!r} is written as float32; given {values.dtype}")
    described = {"architectures": [name], "model_type": "edgewise-image", "edgewise_image": config.to_json()}
    with folder_aside(path, replace=replace) as aside:
        write_safetensors(aside / "model.safetensors", {key: ("F32", values.shape) for key, values in arrays.items()},
                          lambda key: np.ascontiguousarray(arrays[key]))
        (aside / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")
    return Path(path)


def read_image_net(path: str | Path) -> tuple[nn.Module, ImageConfig]:
    """The network in evaluation, and its configuration. Raises FormatError for a folder that is not one of ours."""
    folder = Path(path)
    described = read_json(folder / "config.json")
    names = described.get("architectures") if isinstance(described, dict) else None
    known = _CONFIGS.get(names[0]) if isinstance(names, list) and names and isinstance(names[0], str) else None
    if known is None:
        raise FormatError(f"{folder / 'config.json'}: architectures names one of {', '.join(sorted(_CONFIGS))}; given "
                          f"{names!r}")
    try:
        config: ImageConfig = known.from_json(described.get("edgewise_image", {}))
        model = config.build()
    except (InvalidValueError, RuntimeError, ZeroDivisionError) as error:
        raise FormatError(f"{folder / 'config.json'}: describes no network ({error})") from error
    files = open_tensors(folder)
    take_shapes(model, {name: torch.from_numpy(np.array(files.dense(name).dense(), np.float32)) for name in files},
                where=str(folder))
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, *picture_shape(config)))
    except (RuntimeError, ValueError) as error:
        raise FormatError(f"{folder}: the shapes of its tensors do not fit together ({error})") from error
    return model, config


def take_shapes(model: nn.Module, state: Mapping[str, Tensor], *, where: str = "") -> None:
    """Give every layer the tensors of `state`, whatever their widths, in place. Every tensor has its layer.

    A batch normalisation that `state` has nothing of was folded: it becomes the identity, and its convolution gets the
    bias that `state` has. A block of a residual network that `state` has nothing of was cut: it becomes the identity.
    """
    unused = set(state)
    for place, module in list(model.named_modules()):
        if getattr(module, "removable", False) and not any(name.startswith(f"{place}.") for name in state):
            _replace(model, place, nn.Identity())

    def take(name: str, rank: int | None) -> nn.Parameter | None:
        if name not in state:
            return None
        if rank is not None and state[name].dim() != rank:
            raise FormatError(f"{where}: tensor {name!r} has {rank} dimensions; found {state[name].dim()}")
        unused.discard(name)
        return nn.Parameter(state[name])

    def needed(name: str, rank: int | None) -> nn.Parameter:
        found = take(name, rank)
        if found is None:
            raise FormatError(f"{where}: tensor {name!r} is missing")
        return found

    for place, module in list(model.named_modules()):
        at = f"{place}." if place else ""
        if isinstance(module, nn.Conv2d):
            weight = needed(f"{at}weight", 4)
            depthwise = module.groups == module.in_channels > 1
            if weight.shape[2:] != module.weight.shape[2:] or (module.groups > 1 and not depthwise):
                raise FormatError(f"{where}: tensor {at}weight has a kernel of {tuple(module.kernel_size)} and no "
                                  f"groups but one per channel; found shape {tuple(weight.shape)}")
            module.out_channels = len(weight)
            module.groups = len(weight) if depthwise else 1
            module.in_channels = weight.shape[1] * module.groups
            module.weight, module.bias = weight, take(f"{at}bias", 1)
        elif isinstance(module, nn.Linear):
            module.weight, module.bias = needed(f"{at}weight", 2), take(f"{at}bias", 1)
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.BatchNorm2d):
            if f"{at}running_var" not in state:
                _replace(model, place, nn.Identity())
                continue
            module.weight, module.bias = needed(f"{at}weight", 1), needed(f"{at}bias", 1)
            module.running_mean = needed(f"{at}running_mean", 1).detach()
            module.running_var = needed(f"{at}running_var", 1).detach()
            module.num_features = len(module.weight)
        elif isinstance(module, nn.LayerNorm):
            module.weight, module.bias = needed(f"{at}weight", 1), needed(f"{at}bias", 1)
            module.normalized_shape = tuple(module.weight.shape)
        else:
            for name in dict(module.named_parameters(recurse=False)):
                found: Any = needed(f"{at}{name}", None)
                setattr(module, name, found)
    if unused:
        raise FormatError(f"{where}: no layer takes tensor {sorted(unused)[0]!r}")


def _replace(model: nn.Module, place: str, module: nn.Module) -> None:
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
