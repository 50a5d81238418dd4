"""A small Llama model with random weights and a byte-level tokenizer, made without torch and without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.storage import Dense, Stored
from edgewise.formats.folder_writer import write_folder

__all__ = ["CHAT_TEMPLATE", "SPECIAL", "tiny_checkpoint", "tiny_encoder", "tiny_folder", "tokenizer_json"]

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
VOCAB = 264
"""256 bytes and the special tokens, rounded up; ids above them are never made from text."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tokenizer_json() -> bytes:
    """tokenizer.json of a byte-level tokenizer without merges: one token per byte, special tokens first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return made.to_str().encode("utf-8")


def tiny_checkpoint(*, hidden: int = 64, layers: int = 2, heads: int = 4, kv_heads: int = 2, width: int = 128,
                    context: int = 256, seed: int = 0, tied: bool = True, template: bool = True,
                    generation: dict[str, Any] | None = None, arch: str = "llama") -> Checkpoint:
    """Every parameter is random. `generation`: further keys of generation_config.json."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Stored:
        return Dense(rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32))

    def vector() -> Stored:
        return Dense(rng.uniform(0.5, 1.5, hidden).astype(np.float32))

    head_dim = hidden // heads
    tensors: dict[str, Stored] = {"model.embed_tokens.weight": matrix(VOCAB, hidden), "model.norm.weight": vector()}
    for i in range(layers):
        layer = f"model.layers.{i}."
        for part, rows, columns in (
                ("self_attn.q_proj", heads * head_dim, hidden), ("self_attn.k_proj", kv_heads * head_dim, hidden),
                ("self_attn.v_proj", kv_heads * head_dim, hidden), ("self_attn.o_proj", hidden, heads * head_dim),
                ("mlp.gate_proj", width, hidden), ("mlp.up_proj", width, hidden), ("mlp.down_proj", hidden, width)):
            tensors[f"{layer}{part}.weight"] = matrix(rows, columns)
        tensors[f"{layer}input_layernorm.weight"] = vector()
        tensors[f"{layer}post_attention_layernorm.weight"] = vector()
    if not tied:
        tensors["lm_head.weight"] = matrix(VOCAB, hidden)
    config = {"model_type": arch, "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": hidden,
              "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
              "num_key_value_heads": kv_heads, "max_position_embeddings": context, "rms_norm_eps": 1e-5,
              "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": tied, "bos_token_id": 0,
              "eos_token_id": 1}
    metadata: dict[str, Any] = {
        "name": "tiny", "licence": "apache-2.0", "tokenizer": tokenizer_json(),
        "tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"},
        "generation": {"bos_token_id": 0, "eos_token_id": 1, **(generation or {})}}
    if template:
        metadata["chat_template"] = CHAT_TEMPLATE
    return Checkpoint(arch, config, tensors, metadata, source="tiny")


def tiny_encoder(*, hidden: int = 64, layers: int = 2, heads: int = 4, width: int = 128, context: int = 64,
                 seed: int = 0) -> Checkpoint:
    """A BERT encoder in the same manner, with mean pooling."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Stored] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = Dense(rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32))
        tensors[f"{name}.bias"] = Dense(rng.normal(0, 0.1, rows).astype(np.float32))

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = Dense(rng.uniform(0.5, 1.5, hidden).astype(np.float32))
        tensors[f"{name}.bias"] = Dense(rng.normal(0, 0.1, hidden).astype(np.float32))

    for table, rows in (("word", VOCAB), ("position", context), ("token_type", 2)):
        tensors[f"embeddings.{table}_embeddings.weight"] = Dense(rng.normal(0, 1, (rows, hidden)).astype(np.float32))
    norm("embeddings.LayerNorm")
    for i in range(layers):
        layer = f"encoder.layer.{i}."
        for part in ("query", "key", "value"):
            linear(f"{layer}attention.self.{part}", hidden, hidden)
        linear(f"{layer}attention.output.dense", hidden, hidden)
        norm(f"{layer}attention.output.LayerNorm")
        linear(f"{layer}intermediate.dense", width, hidden)
        linear(f"{layer}output.dense", hidden, width)
        norm(f"{layer}output.LayerNorm")
    config = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": VOCAB, "hidden_size": hidden,
              "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
              "max_position_embeddings": context, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    metadata = {"name": "tiny encoder", "tokenizer": tokenizer_json(), "generation": {},
                "pooling": {"mode": "mean", "normalize": True, "max_tokens": context}}
    return Checkpoint("bert", config, tensors, metadata, source="tiny encoder")


def tiny_folder(path: Path, checkpoint: Checkpoint | None = None, **options: Any) -> Path:
    """A model folder of a checkpoint, by default of tiny_checkpoint(**options)."""
    return write_folder(checkpoint or tiny_checkpoint(**options), path)
