"""Float models to compress, without a download of float weights: a rescaled real one, and a small random one.

SmolLM2 comes on the grid of Q4_1: rounding it to that grid again costs nothing and proves nothing. A seeded rescale
that keeps the function moves every weight off the grid: a norm's gain times s and the columns that read it over s;
rows of v times s and columns of o over s; rows of up times s and columns of down over s; s = exp U(-0.1, 0.1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import UnsupportedError
from edgewise.core.numbers import FP32
from edgewise.core.storage import Dense, Stored

__all__ = ["float_reference", "random_llama"]

Float32 = NDArray[np.float32]


def float_reference(checkpoint: Checkpoint, seed: int, *, spread: float = 0.1) -> Checkpoint:
    """The same function in float32, its weights rescaled and rounded to 16 bits once. Llama-like checkpoints."""
    if checkpoint.arch != "llama":
        raise UnsupportedError(f"the rescale knows the tensors of llama; {checkpoint.source} is {checkpoint.arch!r}")
    rng, config = np.random.default_rng(seed), checkpoint.config
    heads = int(config["num_attention_heads"])
    groups = heads // int(config.get("num_key_value_heads", heads))
    tensors: dict[str, Float32] = {name: np.array(stored.dense(), np.float32)
                                   for name, stored in checkpoint.tensors.items()}

    def factors(count: int) -> Float32:
        return np.exp(rng.uniform(-spread, spread, count)).astype(np.float32)

    for i in range(int(config["num_hidden_layers"])):
        layer = f"model.layers.{i}."
        for norm, readers in (("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                              ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))):
            s = factors(len(tensors[f"{layer}{norm}.weight"]))
            tensors[f"{layer}{norm}.weight"] *= s
            for reader in readers:
                tensors[f"{layer}{reader}.weight"] /= s
        values, output = tensors[f"{layer}self_attn.v_proj.weight"], tensors[f"{layer}self_attn.o_proj.weight"]
        s = factors(len(values))
        values *= s[:, None]
        per_head = s.reshape(-1, output.shape[1] // heads)
        output /= np.repeat(per_head, groups, axis=0).reshape(-1)  # several query heads read one value head
        up, down = tensors[f"{layer}mlp.up_proj.weight"], tensors[f"{layer}mlp.down_proj.weight"]
        s = factors(len(up))
        up *= s[:, None]
        down /= s
    stored: dict[str, Stored] = {
        name: Dense(value.astype(np.float16).astype(np.float32) if value.ndim == 2 else value, FP32)
        for name, value in tensors.items()}
    return Checkpoint(checkpoint.arch, checkpoint.config, stored, checkpoint.metadata,
                      (*checkpoint.lineage, Step("rescale", {"spread": spread}, seed=seed)),
                      source=f"{checkpoint.source} rescaled")


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
