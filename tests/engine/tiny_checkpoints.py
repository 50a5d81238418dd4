"""Small random models as Checkpoints with a tokenizer of single bytes, without torch: what the tests of loading,
generation and scoring run. Every string has a token sequence, and every random token sequence is a string."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.storage import Dense, Stored
from edgewise.formats.gguf_writer import write_gguf

__all__ = ["EOS", "bert", "byte_tokenizer", "gguf_file", "llama", "t5"]

EOS = 256
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"


def byte_tokenizer() -> bytes:
    """tokenizer.json of 256 bytes and <eos>; no text is more than one byte a token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken("<eos>", special=True)])
    return made.to_str().encode()


def _dense(rng: np.random.Generator, rows: int, cols: int, peak: float = 1.0) -> Dense:
    return Dense((peak * rng.standard_normal((rows, cols)) / cols**0.5).astype(np.float32))


def llama(*, tokenizer: bool = True, hidden: int = 64, ffn: int = 96, layers: int = 2, heads: int = 4,
          kv_heads: int = 2, context: int = 128, vocab: int = 257, seed: int = 0, template: str | None = TEMPLATE,
          **config: Any) -> Checkpoint:
    rng = np.random.default_rng(seed)
    dim = hidden // heads
    tensors: dict[str, Stored] = {
        "model.embed_tokens.weight": _dense(rng, vocab, hidden, hidden**0.5),
        "lm_head.weight": _dense(rng, vocab, hidden, 2.0),
        "model.norm.weight": Dense(np.ones(hidden, np.float32))}
    for i in range(layers):
        for part, rows, cols, peak in (
                ("self_attn.q_proj", heads * dim, hidden, 2.0), ("self_attn.k_proj", kv_heads * dim, hidden, 2.0),
                ("self_attn.v_proj", kv_heads * dim, hidden, 1.0), ("self_attn.o_proj", hidden, heads * dim, 1.0),
                ("mlp.gate_proj", ffn, hidden, 1.0), ("mlp.up_proj", ffn, hidden, 1.0),
                ("mlp.down_proj", hidden, ffn, 1.0)):
            tensors[f"model.layers.{i}.{part}.weight"] = _dense(rng, rows, cols, peak)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = Dense(
                (1 + 0.2 * rng.standard_normal(hidden)).astype(np.float32))
    metadata: dict[str, Any] = {"generation": {"eos_token_id": EOS}}
    if tokenizer:
        metadata["tokenizer"] = byte_tokenizer()
    if template is not None:
        metadata["chat_template"] = template
    return Checkpoint("llama", {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "max_position_embeddings": context, "tie_word_embeddings": False, **config}, tensors, metadata,
        source="tiny.gguf")


def bert(*, positions: int = 48, vocab: int = 257, hidden: int = 32, seed: int = 0,
         pooling: str | None = None) -> Checkpoint:
    rng = np.random.default_rng(seed)
    tensors: dict[str, Stored] = {
        "embeddings.word_embeddings.weight": _dense(rng, vocab, hidden, 4.0),
        "embeddings.position_embeddings.weight": _dense(rng, positions, hidden, 4.0),
        "embeddings.token_type_embeddings.weight": _dense(rng, 2, hidden)}
    layer = "encoder.layer.0"
    for name in ("embeddings.LayerNorm", f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"):
        tensors[f"{name}.weight"] = Dense(np.ones(hidden, np.float32))
        tensors[f"{name}.bias"] = Dense(np.zeros(hidden, np.float32))
    for part, out, inputs in (("attention.self.query", hidden, hidden), ("attention.self.key", hidden, hidden),
                              ("attention.self.value", hidden, hidden), ("attention.output.dense", hidden, hidden),
                              ("intermediate.dense", 48, hidden), ("output.dense", hidden, 48)):
        tensors[f"{layer}.{part}.weight"] = _dense(rng, out, inputs)
        tensors[f"{layer}.{part}.bias"] = Dense((0.2 * rng.standard_normal(out)).astype(np.float32))
    metadata: dict[str, Any] = {"tokenizer": byte_tokenizer()}
    if pooling is not None:
        metadata["pooling"] = {"mode": pooling, "normalize": True}
    return Checkpoint("bert", {
        "model_type": "bert", "hidden_size": hidden, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": vocab, "max_position_embeddings": positions, "type_vocab_size": 2,
        "pad_token_id": 0}, tensors, metadata, source="tiny-bert")


def t5(*, tokenizer: bytes | None = None, hidden: int = 64, heads: int = 3, size: int = 24, ffn: int = 96,
       layers: int = 2, vocab: int = 257, positions: int = 64, seed: int = 0, gated: bool = True,
       **config: Any) -> Checkpoint:
    """T5 1.1, gated and with an output layer of its own; or T5 with neither."""
    rng = np.random.default_rng(seed)
    inner = heads * size
    tensors: dict[str, Stored] = {"shared.weight": _dense(rng, vocab, hidden, 2.0)}
    if gated:
        tensors["lm_head.weight"] = _dense(rng, vocab, hidden, 2.0)
    for stack in ("encoder", "decoder"):
        tensors[f"{stack}.final_layer_norm.weight"] = Dense(np.ones(hidden, np.float32))
        for i in range(layers):
            block = f"{stack}.block.{i}.layer"
            attentions = ["0.SelfAttention"] + ["1.EncDecAttention"] * (stack == "decoder")
            for name in attentions:
                for part in "qkv":
                    tensors[f"{block}.{name}.{part}.weight"] = _dense(rng, inner, hidden, 0.6 if part != "v" else 1.0)
                tensors[f"{block}.{name}.o.weight"] = _dense(rng, hidden, inner)
            if i == 0:
                tensors[f"{block}.0.SelfAttention.relative_attention_bias.weight"] = Dense(
                    rng.standard_normal((32, heads)).astype(np.float32))
            last = len(attentions)
            for part in ("wi_0", "wi_1") if gated else ("wi",):
                tensors[f"{block}.{last}.DenseReluDense.{part}.weight"] = _dense(rng, ffn, hidden)
            tensors[f"{block}.{last}.DenseReluDense.wo.weight"] = _dense(rng, hidden, ffn)
            for part in range(last + 1):
                tensors[f"{block}.{part}.layer_norm.weight"] = Dense(
                    (1 + 0.2 * rng.standard_normal(hidden)).astype(np.float32))
    return Checkpoint("t5", {
        "model_type": "t5", "d_model": hidden, "d_kv": size, "d_ff": ffn, "num_layers": layers, "num_heads": heads,
        "vocab_size": vocab, "n_positions": positions, "decoder_start_token_id": 0, "pad_token_id": 0,
        "tie_word_embeddings": not gated, "feed_forward_proj": "gated-gelu" if gated else "relu",
        "layer_norm_epsilon": 1e-6, **config}, tensors,
        {"tokenizer": tokenizer or byte_tokenizer(), "generation": {"eos_token_id": EOS}}, source="tiny-t5")


def gguf_file(path: Path, form: str = "Q8_0", **changes: Any) -> Path:
    """The tiny Llama as a GGUF file, its linears in a block type."""
    write_gguf(llama(**changes), path, form)
    return path
