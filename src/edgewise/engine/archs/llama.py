"""Llama and Mistral: RMSNorm before each part, rotary grouped-query attention, gated SiLU feed-forward.

Touvron et al., "Llama 2", arXiv:2307.09288; Jiang et al., "Mistral 7B", arXiv:2310.06825 (sliding window).
Covers SmolLM2, TinyLlama and Llama 2 and 3, with every rotary scaling that `_rope` names.

Layers may differ, or lack a part, as `layer_shapes` says (core/shapes.py). Head counts and the feed-forward width may
also be lists in the configuration, one number per layer.
"""

from __future__ import annotations

from functools import cache

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import notice
from edgewise.engine.archs._decoder import Decoder
from edgewise.engine.plan import AttentionPolicy, Layer, Plan

__all__ = ["ARCHS", "plan"]

ARCHS = ("llama", "mistral")


def plan(checkpoint: Checkpoint) -> Plan:
    """The Plan of a Llama or Mistral checkpoint. Errors as `plan_of`."""
    if checkpoint.arch == "mistral":
        model = Decoder.read(checkpoint, context=131_072, kv_heads=8)
    else:
        model = Decoder.read(checkpoint, context=2048)
    config = model.config
    attention_bias = config.flag("attention_bias") if "attention_bias" in config else None
    feed_forward_bias = config.flag("mlp_bias") if "mlp_bias" in config else None
    policy = _policy(model)
    rope = cache(model.rope)
    layers = []
    for i in range(model.layers):
        name = model.name(i)
        attention = model.attention(i, rope, policy, bias=attention_bias, output_bias=attention_bias)
        feed_forward = model.feed_forward(i, bias=feed_forward_bias)
        layers.append(Layer(attention, feed_forward, model.part_norm(f"{name}.input_layernorm", attention),
                            model.part_norm(f"{name}.post_attention_layernorm", feed_forward)))
    return model.finish(layers)


def _policy(model: Decoder) -> AttentionPolicy:
    if "sliding_window" not in model.config:
        return AttentionPolicy("causal")
    window = model.config.integer("sliding_window")
    if model.arch == "llama":
        notice("ignored", f"sliding_window {window}: a Llama model sees every earlier position", where=model.source)
        return AttentionPolicy("causal")
    return AttentionPolicy("sliding", window)
