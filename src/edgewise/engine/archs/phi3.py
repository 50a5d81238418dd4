"""Phi-3 and Phi-4-mini: as Llama, with q, k, v in one weight, gate and up in another, and LongRoPE.

Abdin et al., "Phi-3 Technical Report", arXiv:2404.14219; Ding et al., "LongRoPE", arXiv:2402.13753.
Part of a head is rotated where `partial_rotary_factor` says so (Phi-4-mini).
"""

from __future__ import annotations

from edgewise.core.checkpoint import Checkpoint
from edgewise.engine.archs._decoder import Decoder
from edgewise.engine.plan import Attention, FeedForward, Layer, Plan, Rope

__all__ = ["ARCHS", "plan"]

ARCHS = ("phi3",)


def plan(checkpoint: Checkpoint) -> Plan:
    """The Plan of a Phi-3 checkpoint. Errors as `plan_of`."""
    model = Decoder.read(checkpoint, context=4096, eps=1e-5)
    model.equal()
    tensors, size, hidden = model.tensors, model.head_dim, model.hidden
    policies = model.policies(["sliding_window" in model.config] * model.layers)
    rope: Rope | None = None
    layers = []
    for i in range(model.layers):
        name, shape = model.name(i), model.shapes[i]
        heads, kv_heads, width = shape.heads, shape.kv_heads, shape.width
        q, k, v = tensors.split(f"{name}.self_attn.qkv_proj", (heads * size, kv_heads * size, kv_heads * size), hidden)
        o = tensors.linear(f"{name}.self_attn.o_proj", hidden, heads * size, bias=False)
        rope = rope or model.rope(partial=True, older_names={"su": "longrope", "yarn": "longrope"})
        attention = Attention(q, k, v, o, heads, kv_heads, size, size**-0.5, rope, policies[i])
        gate, up = tensors.split(f"{name}.mlp.gate_up_proj", (width, width), hidden)
        down = tensors.linear(f"{name}.mlp.down_proj", hidden, width, bias=False)
        layers.append(Layer(attention, FeedForward(up, down, gate, model.function),
                            model.norm(f"{name}.input_layernorm"), model.norm(f"{name}.post_attention_layernorm")))
    return model.finish(layers)
