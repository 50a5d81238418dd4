"""A Checkpoint as a torch module of transformers, and back: what we write loads in the engine and in torch.

Weights are what `Stored.dense()` gives, in float32 unless another dtype is asked for. A tied output layer is tied
again. Static activations that the configuration names are applied as they are defined (models/static.py), and layers
are cut as `layer_shapes` says (models/cut.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from edgewise.core.activation import activations_of
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import FormatError, InvalidValueError, UnsupportedError, notice
from edgewise.core.shapes import LAYER_SHAPES, shapes_of
from edgewise.core.storage import Dense, InputSparse, Stored
from edgewise.formats.sources import open_checkpoint
from edgewise.models.cut import cut
from edgewise.models.sparse import decode_sparsely
from edgewise.models.static import Rounding, install

__all__ = ["checkpoint_of", "load"]

_EXPERT = re.compile(r"^(?P<stem>.*\.experts)\.(?P<index>\d+)\.(?P<part>[a-z0-9_]+)\.weight$")
_EXPERT_PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_RUN_KEYS = {"activations"}


def load(source: str | os.PathLike[str] | Checkpoint, *, dtype: torch.dtype = torch.float32,
         offline: bool | None = None) -> nn.Module:
    """The model as transformers has it, in evaluation mode on the CPU: a causal model where it has an output layer.

    Raises UnsupportedError for an architecture that transformers does not have or a way of running that torch has no
    twin of here, and FormatError for tensors that do not fit.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(os.fspath(source), offline=offline)
    run = checkpoint.config.get("quantization_config") or {}
    if unknown := sorted(set(run) - _RUN_KEYS):
        notice("ignored", f"torch runs the model without what quantization_config says of {', '.join(unknown)}",
               where=checkpoint.source)
    model = _empty(checkpoint)
    _fill(model, checkpoint, dtype)
    thresholds = {name: stored for name, stored in checkpoint.tensors.items() if isinstance(stored, InputSparse)}
    if thresholds:
        decode_sparsely(model, thresholds)
    sites = activations_of(checkpoint.config)
    if sites:
        install(model, {site: Rounding(item) for site, item in sites.items()})
    return model.eval()


def checkpoint_of(model: nn.Module, like: Checkpoint, step: Step, **config: Any) -> Checkpoint:
    """A checkpoint with the model's parameters in place of those of `like`, as float32; the others stay as they are."""
    state = {name: value for name, value in model.state_dict().items() if name in like.tensors}
    changed: dict[str, Stored] = {
        name: Dense(value.detach().float().cpu().numpy().copy()) for name, value in state.items()}
    return like.with_tensors({name: changed[name] if name in changed else like.tensors[name]
                              for name in like.tensors}, step, **config)


def _empty(checkpoint: Checkpoint) -> nn.Module:
    """The module, its parameters without values."""
    values = {key: value for key, value in checkpoint.config.items()
              if key not in ("model_type", "quantization_config", "architectures", "torch_dtype", "dtype", LAYER_SHAPES)
              }
    shapes = shapes_of(checkpoint.config, checkpoint.source)
    if shapes is not None and checkpoint.config["hidden_size"] % checkpoint.config.get("num_attention_heads", 1):
        values |= {"num_attention_heads": 1, "num_key_value_heads": 1}  # checked there, and replaced by the shapes
    try:
        config = transformers.AutoConfig.for_model(checkpoint.arch, **values)
    except ValueError as error:
        raise UnsupportedError(f"{checkpoint.source}: transformers {transformers.__version__} has no architecture "
                               f"{checkpoint.arch!r}: {error}") from error
    config._attn_implementation = "eager"
    embeddings = [name for name in checkpoint.tensors if name.endswith("embed_tokens.weight")]
    if config.is_encoder_decoder:
        kind: Any = transformers.AutoModelForSeq2SeqLM
    else:
        kind = transformers.AutoModelForCausalLM if embeddings else transformers.AutoModel
    with torch.device("meta"):
        model: nn.Module = kind.from_config(config)
    if shapes is not None:
        cut(model, shapes, checkpoint.source)
    return model


def _fill(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    wanted = {name: tuple(value.shape) for name, value in model.named_parameters()}
    found = _named(checkpoint, wanted)
    missing = sorted(wanted.keys() - found.keys())
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if tied:
        missing = [name for name in missing if name != "lm_head.weight"]
    missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:
        raise FormatError(f"the model lacks {len(missing)} tensors that {type(model).__name__} has",
                          path=checkpoint.source or None, tensor=missing[0])
    for name, value in found.items():
        if tuple(value.shape) != wanted[name]:
            raise FormatError(f"shape {tuple(value.shape)} found; {type(model).__name__} has {wanted[name]}",
                              path=checkpoint.source or None, tensor=name)
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(torch.from_numpy(value).to(dtype), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, parameter)
    for name in wanted.keys() - found.keys():  # an encoder's pooler that the file does not have
        owner, _, leaf = name.rpartition(".")
        if name.startswith("pooler."):
            setattr(model.get_submodule(owner), leaf, nn.Parameter(torch.zeros(wanted[name], dtype=dtype),
                                                                   requires_grad=False))
    _make_buffers(model)
    if tied:
        model.tie_weights()  # type: ignore[operator]


def _named(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Values by the names that the module gives them: experts are stacked there."""
    found: dict[str, np.ndarray] = {}
    experts: dict[str, dict[str, dict[int, str]]] = {}
    unused = []
    for name in checkpoint.tensors:
        expert = _EXPERT.match(name)
        own = name.replace(".block_sparse_moe.", ".mlp.")
        own = next((form for form in (own, own.removeprefix("model."), f"model.{own}") if form in wanted), own)
        if expert and expert["part"] in _EXPERT_PARTS:
            stem = expert["stem"].replace(".block_sparse_moe.", ".mlp.")
            experts.setdefault(stem, {}).setdefault(_EXPERT_PARTS[expert["part"]], {})[int(expert["index"])] = name
        elif own in wanted:
            found[own] = _values(checkpoint.tensors[name])
        else:
            unused.append(name)
    for stem, parts in experts.items():
        if set(parts) != {"gate", "up", "down"}:
            raise FormatError(f"experts with {sorted(parts)}; expected gate, up and down",
                              path=checkpoint.source or None, tensor=stem)
        stacked = {part: np.stack([_values(checkpoint.tensors[names[index]]) for index in sorted(names)])
                   for part, names in parts.items()}
        found[f"{stem}.gate_up_proj"] = np.concatenate([stacked["gate"], stacked["up"]], axis=1)
        found[f"{stem}.down_proj"] = stacked["down"]
    if unused:
        notice("ignored", f"torch does not use {', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''}",
               where=checkpoint.source)
    return found


def _values(stored: Stored) -> np.ndarray:
    values = np.array(stored.dense(), np.float32)
    if not np.isfinite(values).all():
        raise InvalidValueError(f"{stored!r} holds values that are not finite")
    return values


def _make_buffers(model: nn.Module) -> None:
    """Constants that a module computes when it is made, such as rotary frequencies: made again, with values."""
    for name, module in model.named_modules():
        own = dict(module.named_buffers(recurse=False))
        if not any(value.is_meta for value in own.values()):
            continue
        made = _made_again(module, model)
        for leaf, value in own.items():
            if not value.is_meta:
                continue
            other = getattr(made, leaf, None)
            if other is None:
                raise UnsupportedError(f"the constant {name}.{leaf} of {type(module).__name__} cannot be made again")
            module.register_buffer(leaf, other, persistent=leaf not in module._non_persistent_buffers_set)
        for leaf, value in vars(made).items():  # a plain attribute that holds a tensor, such as a kept original
            if isinstance(value, torch.Tensor) and isinstance(vars(module).get(leaf), torch.Tensor):
                setattr(module, leaf, value)


def _made_again(module: nn.Module, model: nn.Module) -> nn.Module:
    config = getattr(module, "config", model.config)
    kind: Any = type(module)
    if "num_embeddings" in vars(module) and "scalar_embed_scale" in vars(module):  # Gemma's scaled embedding
        made: nn.Module = kind(1, 1, 0, embed_scale=module.scalar_embed_scale)
        return made
    try:
        made = kind(config)
    except TypeError as error:
        raise UnsupportedError(f"{kind.__name__} is not made from a configuration: {error}") from error
    return made
