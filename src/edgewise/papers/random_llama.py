"""A small Llama of random weights: what a recipe's smoke scale runs on, in a second and without a download."""

from __future__ import annotations

import numpy as np

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.storage import Dense, Stored

__all__ = ["random_llama"]


def random_llama(seed: int, *, hidden: int = 64, layers: int = 2, heads: int = 4, kv_heads: int = 2, vocab: int = 256,
                 context: int = 512) -> Checkpoint:
    """A Llama of random weights with a tied head and no tokenizer."""
    rng = np.random.default_rng(seed)
    width, head_dim = 2 * hidden, hidden // heads
    shapes = {"self_attn.q_proj": (heads * head_dim, hidden), "self_attn.k_proj": (kv_heads * head_dim, hidden),
              "self_attn.v_proj": (kv_heads * head_dim, hidden), "self_attn.o_proj": (hidden, heads * head_dim),
              "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width)}
    tensors: dict[str, Stored] = {
        "model.embed_tokens.weight": Dense(rng.normal(0, hidden**-0.5, (vocab, hidden)).astype(np.float32)),
        "model.norm.weight": Dense(rng.uniform(0.5, 1.5, hidden).astype(np.float32))}
    for i in range(layers):
        for name, (rows, columns) in shapes.items():
            weight = rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
            tensors[f"model.layers.{i}.{name}.weight"] = Dense(weight)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = Dense(rng.uniform(0.5, 1.5, hidden).astype(np.float32))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": hidden,
              "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
              "num_key_value_heads": kv_heads, "max_position_embeddings": context, "rms_norm_eps": 1e-5,
              "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True}
    return Checkpoint("llama", config, tensors, {"name": "random llama", "generation": {}}, source="random llama")
