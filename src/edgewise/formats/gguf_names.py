"""How each architecture is named in GGUF files and in Hugging Face folders: one table per architecture.

A new family is one more `GgufArch` in ARCHITECTURES. `{i}` stands for the number of a layer, and a tensor template
without ending stands for its `.weight` and its `.bias`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgewise.core.errors import UnsupportedError

__all__ = ["ARCHITECTURES", "GgufArch", "arch_of_config", "arch_of_file"]


@dataclass(frozen=True)
class GgufArch:
    """One architecture.

    gguf: value of general.architecture. hf: `model_type` of transformers.
    keys: GGUF key without its "<gguf>." prefix -> key of config.json.
    tensors: GGUF name template -> Hugging Face name template.
    constants: config.json keys that the GGUF architecture implies.
    rotary: rows of these tensors are stored for interleaved rotary pairs -> config key with their number of heads.
    required: config.json keys without which there is no model.
    defaults: what transformers assumes where a config.json leaves a key out.
    also: further `model_type`s that are written as this architecture.
    float32: tensors that ggml reads in F32 only, beside all vectors.
    prefixes: what checkpoints with a task head put before the names of the model itself.
    """

    gguf: str
    hf: str
    keys: Mapping[str, str]
    tensors: Mapping[str, str]
    constants: Mapping[str, Any]
    rotary: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    defaults: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()

    def hf_name(self, name: str) -> str | None:
        """The Hugging Face name of a GGUF tensor, or None when the architecture has no place for it."""
        return _rename(name, self.tensors)

    def gguf_name(self, name: str) -> str | None:
        """The GGUF name of a Hugging Face tensor, or None."""
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        return _rename(name, {theirs: ours for ours, theirs in self.tensors.items()})

    def is_float32(self, name: str) -> bool:
        """Whether ggml reads a GGUF tensor in F32 only."""
        return _template(name).rpartition(".")[0] in self.float32

    def heads(self, name: str, config: Mapping[str, Any]) -> int | None:
        """Heads of a GGUF tensor whose rows are stored for interleaved rotary pairs, else None."""
        stem = _template(name).rpartition(".")[0]
        return int(config[self.rotary[stem]]) if stem in self.rotary else None


def _template(name: str) -> str:
    """The name with the first number between dots replaced by {i}."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name, count=1)


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    number = re.search(r"(?<=\.)(\d+)(?=\.)", name)
    stem, _, ending = _template(name).rpartition(".")
    if ending not in ("weight", "bias") or stem not in table:
        return None
    return f"{table[stem]}.{ending}".replace("{i}", number[1] if number else "")


_DECODER_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_DECODER_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}
_LLAMA = GgufArch(
    gguf="llama", hf="llama", keys=_DECODER_KEYS, tensors=_DECODER_TENSORS,
    constants={"hidden_act": "silu"},
    rotary={"blk.{i}.attn_q": "num_attention_heads", "blk.{i}.attn_k": "num_key_value_heads"},
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048},
    also=("mistral",),
)
_BERT = GgufArch(
    gguf="bert", hf="bert",
    keys={
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.layer_norm_epsilon": "layer_norm_eps",
    },
    tensors={
        "token_embd": "embeddings.word_embeddings",
        "position_embd": "embeddings.position_embeddings",
        "token_types": "embeddings.token_type_embeddings",
        "token_embd_norm": "embeddings.LayerNorm",
        "blk.{i}.attn_q": "encoder.layer.{i}.attention.self.query",
        "blk.{i}.attn_k": "encoder.layer.{i}.attention.self.key",
        "blk.{i}.attn_v": "encoder.layer.{i}.attention.self.value",
        "blk.{i}.attn_output": "encoder.layer.{i}.attention.output.dense",
        "blk.{i}.attn_output_norm": "encoder.layer.{i}.attention.output.LayerNorm",
        "blk.{i}.ffn_up": "encoder.layer.{i}.intermediate.dense",
        "blk.{i}.ffn_down": "encoder.layer.{i}.output.dense",
        "blk.{i}.layer_output_norm": "encoder.layer.{i}.output.LayerNorm",
    },
    constants={"hidden_act": "gelu", "position_embedding_type": "absolute"},
    defaults={"layer_norm_eps": 1e-12, "max_position_embeddings": 512},
    float32=("position_embd", "token_types"),
    prefixes=("bert.",),
)
ARCHITECTURES: tuple[GgufArch, ...] = (_LLAMA, _BERT)


def arch_of_file(name: str, *, where: str) -> GgufArch:
    """The table of a file's general.architecture."""
    for arch in ARCHITECTURES:
        if arch.gguf == name:
            return arch
    raise UnsupportedError(f"{where}: architecture {name!r}; edgewise reads {', '.join(a.gguf for a in ARCHITECTURES)} "
                           "from GGUF files (`edgewise inspect` shows any file)")


def arch_of_config(model_type: str, *, where: str) -> GgufArch:
    """The table under which a `model_type` is written."""
    for arch in ARCHITECTURES:
        if model_type in (arch.hf, *arch.also):
            return arch
    known = ", ".join(name for arch in ARCHITECTURES for name in (arch.hf, *arch.also))
    raise UnsupportedError(f"{where}: models of type {model_type!r} are not written as GGUF; {known} are. Write a "
                           "Hugging Face folder instead")
