"""Mixtral: as Mistral, with a router that sends each token through `num_experts_per_tok` of the experts.

Jiang et al., "Mixtral of Experts", arXiv:2401.04088. Probabilities of the chosen experts are divided by their sum.
"""

from __future__ import annotations

from edgewise.core.checkpoint import Checkpoint
from edgewise.engine.archs._decoder import Decoder
from edgewise.engine.plan import Attention, Experts, Layer, Plan, Rope

__all__ = ["ARCHS", "plan"]

ARCHS = ("mixtral",)


def plan(checkpoint: Checkpoint) -> Plan:
    """The Plan of a Mixtral checkpoint. Errors as `plan_of`."""
    model = Decoder.read(checkpoint, context=131_072, eps=1e-5, kv_heads=8)
    model.equal()
    policies = model.policies(["sliding_window" in model.config] * model.layers)
    count = model.experts("num_local_experts", 8)
    top_k = model.config.integer("num_experts_per_tok", 2, most=count)
    rope: Rope | None = None
    layers = []
    for i in range(model.layers):
        name, shape = model.name(i), model.shapes[i]
        linears = model.projections(i, bias=False, output_bias=False)
        rope = rope or model.rope(base=1_000_000.0)
        attention = Attention(*linears, shape.heads, shape.kv_heads, model.head_dim, model.head_dim**-0.5, rope,
                              policies[i])
        router = model.tensors.linear(f"{name}.block_sparse_moe.gate", count, model.hidden, bias=False)
        experts = tuple(model.gated(f"{name}.block_sparse_moe.experts.{e}", shape.width, parts=("w1", "w3", "w2"))
                        for e in range(count))
        layers.append(Layer(attention, Experts(router, experts, top_k, normalise=True),
                            model.norm(f"{name}.input_layernorm"), model.norm(f"{name}.post_attention_layernorm")))
    return model.finish(layers)
