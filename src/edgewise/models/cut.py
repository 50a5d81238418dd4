"""Layers of unequal shapes in a decoder of transformers: each attention and feed-forward remade as `layer_shapes` says.

The modules keep their class's other attributes and their parameters' names, so that hooks, training and checkpoints see
no difference. Pairs of a cut key head are turned by the frequencies they had; see core/shapes.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from edgewise.core.errors import UnsupportedError
from edgewise.core.shapes import LayerShape
from edgewise.models.decoding import CACHE_NAMES

__all__ = ["cut"]


def cut(model: nn.Module, shapes: Sequence[LayerShape], where: str = "") -> None:
    """Give every decoder layer of a model without values its shape. Raises UnsupportedError for other families."""
    layers = _layers(model)
    if layers is None or len(layers) != len(shapes):
        raise UnsupportedError(f"{where}: {type(model).__name__} has no decoder layers with q, k, v, gate and up of "
                               "their own, which layer_shapes could cut")
    kinds = set(getattr(model.config, "layer_types", None) or ())
    cached = 0
    for index, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
        four = hasattr(layer, "pre_feedforward_layernorm")
        before = {"self_attn": ("input_layernorm", *(("post_attention_layernorm",) if four else ())),
                  "mlp": (("pre_feedforward_layernorm", "post_feedforward_layernorm") if four
                          else ("post_attention_layernorm",))}
        if shape.heads:
            _cut_attention(layer.self_attn, shape)
            # The cache counts positions by its first layer, which therefore is one with attention.
            layer.self_attn.layer_idx = index if len(kinds) > 1 else cached
            cached += 1
        else:
            _drop(layer, "self_attn", _NoAttention(), before)
        if shape.width:
            for name in ("gate_proj", "up_proj"):
                _resize(layer.mlp, name, outputs=shape.width)
            _resize(layer.mlp, "down_proj", inputs=shape.width)
            layer.mlp.intermediate_size = shape.width
        else:
            _drop(layer, "mlp", _NoFeedForward(), before)


def _layers(model: nn.Module) -> Any:
    inner: Any = getattr(model, "model", model)
    layers = getattr(inner, "layers", None)
    if layers is None or not all(hasattr(getattr(layer, "self_attn", None), "v_proj") and
                                 hasattr(getattr(layer, "mlp", None), "gate_proj") for layer in layers):
        return None
    return layers


def _drop(layer: Any, part: str, nothing: nn.Module, norms: dict[str, tuple[str, ...]]) -> None:
    setattr(layer, part, nothing)
    for norm in norms[part]:
        setattr(layer, norm, nn.Identity())


def _resize(owner: Any, name: str, *, outputs: int | None = None, inputs: int | None = None) -> None:
    old: nn.Linear = getattr(owner, name)
    if (outputs or old.out_features, inputs or old.in_features) != (old.out_features, old.in_features):
        setattr(owner, name, nn.Linear(inputs or old.in_features, outputs or old.out_features,
                                       bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype))


def _cut_attention(module: Any, shape: LayerShape) -> None:
    whole = module.head_dim
    _resize(module, "q_proj", outputs=shape.heads * shape.key_dim)
    _resize(module, "k_proj", outputs=shape.kv_heads * shape.key_dim)
    _resize(module, "v_proj", outputs=shape.kv_heads * shape.value_dim)
    _resize(module, "o_proj", inputs=shape.heads * shape.value_dim)
    module.num_key_value_groups = shape.heads // shape.kv_heads
    module.head_dim, module.value_dim = shape.key_dim, shape.value_dim
    pairs = shape.pairs
    module.places = None if pairs is None else torch.tensor(
        [[*own, *(pair + whole // 2 for pair in own)] for own in pairs], device="cpu")
    if not isinstance(module, _Cut):
        module.__class__ = type(f"Cut{type(module).__name__}", (_Cut, type(module)), {})


class _Cut(nn.Module):
    """The forward pass of an attention whose keys and values differ in width, and whose heads keep some pairs."""

    def forward(self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None,
                attention_mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states: (batch, n, hidden) -> the same, and the weights of positions where these are made."""
        rows = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*rows, -1, self.head_dim)
        key = self.k_proj(hidden_states).view(*rows, -1, self.head_dim)
        value = self.v_proj(hidden_states).view(*rows, -1, self.value_dim).transpose(1, 2)
        if getattr(self, "q_norm", None) is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        assert position_embeddings is not None
        cosine, sine = (self._of_heads(part) for part in position_embeddings)
        groups = self.num_key_value_groups if self.places is not None else 1
        query = _turned(query, cosine.repeat_interleave(groups, 1), sine.repeat_interleave(groups, 1))
        key = _turned(key, cosine, sine)
        for cache in [options.pop(name, None) for name in CACHE_NAMES]:
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        made, weights = attend(self, query, key, value, attention_mask,
                               dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling,
                               **options)
        return self.o_proj(made.reshape(*rows, -1).contiguous()), weights

    def _of_heads(self: Any, turns: Tensor) -> Tensor:
        """Cosine or sine of whole heads, (batch, n, d) -> (batch, kv_heads or 1, n, key_dim)."""
        return turns.unsqueeze(1) if self.places is None else turns[..., self.places].transpose(1, 2)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cosine + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sine


class _NoAttention(nn.Module):
    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class _NoFeedForward(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)
