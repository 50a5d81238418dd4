"""Llama and Mistral: RMSNorm before each part, rotary grouped-query attention, gated SiLU feed-forward.

Touvron et al., "Llama 2", arXiv:2307.09288; Jiang et al., "Mistral 7B", arXiv:2310.06825 (sliding window).
Covers SmolLM2, TinyLlama and Llama 2 and 3, with every rotary scaling that `_rope` names.

Head counts and the feed-forward width may be lists in the configuration, one number per layer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import FormatError, notice
from edgewise.engine.archs._reading import FUNCTIONS, Config, Tensors
from edgewise.engine.archs._rope import rope_of
from edgewise.engine.plan import Attention, AttentionPolicy, FeedForward, Layer, Linear, Norm, Plan, Rope

__all__ = ["ARCHS", "plan"]

ARCHS = ("llama", "mistral")

# transformers' own defaults, for configurations that leave a key out.
_CONTEXT = {"llama": 2048, "mistral": 131_072}

_KNOWN_EXTRA = {
    r"rotary_emb\.inv_freq$": "rotary frequencies are computed from the configuration, not read",
}


def plan(checkpoint: Checkpoint) -> Plan:
    """The Plan of a Llama or Mistral checkpoint. Errors as `plan_of`."""
    source = checkpoint.source
    config, tensors = Config(checkpoint.config, source), Tensors(checkpoint)
    hidden = config.integer("hidden_size")
    count = config.layers(tensors)
    vocab = config.integer("vocab_size")
    context = config.integer("max_position_embeddings", _CONTEXT[checkpoint.arch])
    eps = config.number("rms_norm_eps", 1e-6)
    function = config.choice("hidden_act", FUNCTIONS, "silu")
    heads = config.per_layer("num_attention_heads", count)
    if "num_key_value_heads" in config:
        kv_heads = config.per_layer("num_key_value_heads", count)
    else:
        kv_heads = [8] * count if checkpoint.arch == "mistral" else heads
    for queries, keys in zip(heads, kv_heads, strict=True):
        if queries % keys:
            raise FormatError(f"num_attention_heads {queries} is not a multiple of num_key_value_heads {keys}",
                              path=source or None)
    head_dim = config.integer("head_dim", hidden // heads[0] or None)
    widths = config.per_layer("intermediate_size", count)
    attention_bias = config.flag("attention_bias") if "attention_bias" in config else None
    feed_forward_bias = config.flag("mlp_bias") if "mlp_bias" in config else None
    policy = _policy(checkpoint.arch, config, source)

    prefix = tensors.prefix(("model.", ""), "embed_tokens.weight")
    embedding = tensors.linear(f"{prefix}embed_tokens", vocab, hidden, bias=False)
    rope: Rope | None = None
    layers = []
    for i in range(count):
        name = f"{prefix}layers.{i}"
        q, k, v = (
            tensors.linear(f"{name}.self_attn.{part}_proj", n * head_dim, hidden, bias=attention_bias)
            for part, n in (("q", heads[i]), ("k", kv_heads[i]), ("v", kv_heads[i])))
        o = tensors.linear(f"{name}.self_attn.o_proj", hidden, heads[i] * head_dim, bias=attention_bias)
        if rope is None:  # after the first weights: head_dim is then one that the file really holds
            rope = rope_of(config, head_dim, context, divisors=_divisors(tensors, head_dim), source=source)
        attention = Attention(q, k, v, o, heads[i], kv_heads[i], head_dim, head_dim**-0.5, rope, policy)
        gate, up = (tensors.linear(f"{name}.mlp.{part}_proj", widths[i], hidden, bias=feed_forward_bias)
                    for part in ("gate", "up"))
        down = tensors.linear(f"{name}.mlp.down_proj", hidden, widths[i], bias=feed_forward_bias)
        layers.append(Layer(
            attention, FeedForward(up, down, gate, function),
            Norm("rms", tensors.dense(f"{name}.input_layernorm.weight", (hidden,)), eps),
            Norm("rms", tensors.dense(f"{name}.post_attention_layernorm.weight", (hidden,)), eps)))
    final_norm = Norm("rms", tensors.dense(f"{prefix}norm.weight", (hidden,)), eps)
    head = _head(config, tensors, embedding, vocab, hidden)
    tensors.finish(_KNOWN_EXTRA)
    return Plan(checkpoint.arch, "decoder", hidden, vocab, context, embedding, tuple(layers), final_norm, head)


def _head(config: Config, tensors: Tensors, embedding: Linear, vocab: int, hidden: int) -> Linear:
    """The output layer: the embedding itself where tied, or where neither key nor tensor says that it is not."""
    tied = config.flag("tie_word_embeddings", "tie_word_embeddings" not in config and "lm_head.weight" not in tensors)
    if tied:
        return Linear(embedding.name, embedding.weight, None, embedding.activation)
    return tensors.linear("lm_head", vocab, hidden, bias=False)


def _divisors(tensors: Tensors, head_dim: int) -> NDArray[np.float32] | None:
    """What GGUF files of Llama 3 hold instead of its rotary scaling: a divisor for each frequency."""
    return tensors.dense("rope_freqs.weight", (head_dim // 2,)) if "rope_freqs.weight" in tensors else None


def _policy(arch: str, config: Config, source: str) -> AttentionPolicy:
    if "sliding_window" not in config:
        return AttentionPolicy("causal")
    window = config.integer("sliding_window")
    if arch == "llama":
        notice("ignored", f"sliding_window {window}: a Llama model sees every earlier position", where=source)
        return AttentionPolicy("causal")
    return AttentionPolicy("sliding", window)
