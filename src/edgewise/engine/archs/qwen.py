"""Qwen2 and Qwen3: as Llama, with biases on q, k and v (Qwen2) or a norm of every query and key head (Qwen3).

Yang et al., "Qwen2 Technical Report", arXiv:2407.10671; "Qwen3 Technical Report", arXiv:2505.09388.
A sliding window, where `use_sliding_window` asks for one, is that of the layers from `max_window_layers` on.
"""

from __future__ import annotations

from edgewise.core.checkpoint import Checkpoint
from edgewise.engine.archs._decoder import Decoder
from edgewise.engine.plan import Attention, Layer, Plan, Rope

__all__ = ["ARCHS", "plan"]

ARCHS = ("qwen2", "qwen3")


def plan(checkpoint: Checkpoint) -> Plan:
    """The Plan of a Qwen2 or Qwen3 checkpoint. Errors as `plan_of`."""
    newer = checkpoint.arch == "qwen3"
    model = Decoder.read(checkpoint, context=32_768, kv_heads=32, head_dim=128 if newer else None)
    bias = model.config.flag("attention_bias") if newer else True
    sliding = [False] * model.layers
    if model.config.flag("use_sliding_window"):
        first = model.config.integer("max_window_layers", 28, least=0)
        sliding = model.kinds([i >= first for i in range(model.layers)])
    rope: Rope | None = None
    layers = []
    for i, policy in enumerate(model.policies(sliding)):
        name = model.name(i)
        linears = model.projections(i, bias=bias, output_bias=bias and newer)
        rope = rope or model.rope()
        q_norm, k_norm = (model.norm(f"{name}.self_attn.{part}_norm", model.head_dim) if newer else None
                          for part in ("q", "k"))
        attention = Attention(*linears, model.heads[i], model.kv_heads[i], model.head_dim, model.head_dim**-0.5, rope,
                              policy, q_norm, k_norm)
        layers.append(Layer(attention, model.gated(f"{name}.mlp", model.widths[i]),
                            model.norm(f"{name}.input_layernorm"), model.norm(f"{name}.post_attention_layernorm")))
    return model.finish(layers)
