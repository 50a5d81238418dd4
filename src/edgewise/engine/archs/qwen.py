"""Qwen2 and Qwen3: as Llama, with biases on q, k and v (Qwen2) or a norm of every query and key head (Qwen3).

Yang et al., "Qwen2 Technical Report", arXiv:2407.10671; "Qwen3 Technical Report", arXiv:2505.09388.
A sliding window, where `use_sliding_window` asks for one, is that of the layers from `max_window_layers` on.

The mixtures (qwen2_moe, qwen3_moe) have experts in every `decoder_sparse_step`th layer but those of `mlp_only_layers`;
Qwen2's have a shared expert beside them, times the sigmoid of a gate of its own.
"""

from __future__ import annotations

from functools import cache

from edgewise.core.checkpoint import Checkpoint
from edgewise.engine.archs._decoder import Decoder
from edgewise.engine.plan import Experts, FeedForward, Layer, Linear, Plan

__all__ = ["ARCHS", "plan"]

ARCHS = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")


def plan(checkpoint: Checkpoint) -> Plan:
    """The Plan of a Qwen2 or Qwen3 checkpoint. Errors as `plan_of`."""
    newer, routed = checkpoint.arch.startswith("qwen3"), checkpoint.arch.endswith("_moe")
    kv_heads = {"qwen2_moe": 16, "qwen3_moe": 4}.get(checkpoint.arch, 32)
    # transformers' Qwen3-MoE divides the hidden size where head_dim is not given; Qwen3 has heads of 128.
    model = Decoder.read(checkpoint, context=32_768, kv_heads=kv_heads, head_dim=128 if newer and not routed else None)
    if routed:
        model.equal()
    bias = model.config.flag("attention_bias") if newer else model.config.flag("qkv_bias", True)
    sliding = _sliding(model)
    rope = cache(model.rope)
    layers = []
    for i, policy in enumerate(model.policies(sliding)):
        name = model.name(i)
        attention = model.attention(i, rope, policy, bias=bias, output_bias=bias and newer, head_norms=newer)
        routes = routed and _has_experts(model, i)
        feed_forward = _experts(model, i) if routes else model.feed_forward(i)
        layers.append(Layer(attention, feed_forward, model.part_norm(f"{name}.input_layernorm", attention),
                            model.part_norm(f"{name}.post_attention_layernorm", feed_forward)))
    return model.finish(layers)


def _sliding(model: Decoder) -> list[bool]:
    """Per layer: does it slide?"""
    if not model.config.flag("use_sliding_window"):
        return [False] * model.layers
    first = model.config.integer("max_window_layers", 28, least=0)
    if model.arch == "qwen2_moe":  # every second of the first layers, as transformers has it
        return model.kinds([i % 2 == 0 and i < first for i in range(model.layers)])
    if model.arch == "qwen3_moe":
        return [True] * model.layers
    return model.kinds([i >= first for i in range(model.layers)])


def _has_experts(model: Decoder, layer: int) -> bool:
    dense = model.config.integers("mlp_only_layers")
    return layer not in dense and (layer + 1) % model.config.integer("decoder_sparse_step", 1) == 0


def _experts(model: Decoder, layer: int) -> Experts:
    config, tensors, name = model.config, model.tensors, f"{model.name(layer)}.mlp"
    older = model.arch == "qwen2_moe"
    count = model.experts("num_experts" if "num_experts" in config else "num_local_experts", 60 if older else 128)
    top_k = config.integer("num_experts_per_tok", 4 if older else 8, most=count)
    width = config.integer("moe_intermediate_size", 1408 if older else 768)
    router = tensors.linear(f"{name}.gate", count, model.hidden, bias=False)
    experts = tuple(model.gated(f"{name}.experts.{e}", width) for e in range(count))
    shared: FeedForward | None = None
    gate: Linear | None = None
    if older:
        shared = model.gated(f"{name}.shared_expert", config.integer("shared_expert_intermediate_size", 5632))
        gate = tensors.linear(f"{name}.shared_expert_gate", 1, model.hidden, bias=False)
    return Experts(router, experts, top_k, config.flag("norm_topk_prob"), shared, gate)
