"""How each architecture is named in GGUF files and in Hugging Face folders: one table per architecture.

A new family is one more `GgufArch` in ARCHITECTURES. `{i}` stands for the number of a layer, and a tensor template
without ending stands for its `.weight` and its `.bias`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field, replace
from typing import Any

from edgewise.core.errors import UnsupportedError
from edgewise.core.shapes import LAYER_SHAPES
from edgewise.core.values import dataclass

__all__ = ["ARCHITECTURES", "DECI", "GgufArch", "arch_of_config", "arch_of_file"]


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
    stacks: GGUF name template of a tensor that holds one matrix per expert -> Hugging Face's template of each, where
    `{e}` stands for the number of the expert. experts: config key with their number, "" without experts.
    rows: matrices of one row, which are vectors in GGUF.
    norm_offset: what GGUF's weights of norms have been raised by; Hugging Face's multiply by that much more.
    block: what the number of a layer follows in the names of tensors. written: files of it are made, not only read.
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
    stacks: Mapping[str, str] = field(default_factory=dict)
    experts: str = ""
    rows: tuple[str, ...] = ()
    norm_offset: float = 0.0
    block: str = "blk."
    written: bool = True

    def hf_name(self, name: str) -> str | None:
        """The Hugging Face name of a GGUF tensor, or None when the architecture has no place for it."""
        return _rename(name, self.tensors)

    def gguf_name(self, name: str) -> str | None:
        """The GGUF name of a Hugging Face tensor, or None."""
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        return _rename(name, {theirs: ours for ours, theirs in self.tensors.items()})

    def stack(self, name: str) -> str | None:
        """The Hugging Face name of each matrix of a GGUF stack, with {e} in it; None for any other tensor."""
        return _rename(name, self.stacks)

    def place_in_stack(self, name: str) -> tuple[str, int] | None:
        """The GGUF stack that a Hugging Face tensor belongs to, and its number there."""
        for ours, theirs in self.stacks.items():
            pattern = re.escape(f"{theirs}.weight").replace(r"\{i\}", r"(\d{1,6})").replace(r"\{e\}", r"(\d{1,6})")
            if found := re.fullmatch(pattern, name):
                return f"{ours}.weight".replace("{i}", found[1]), int(found[2])
        return None

    def is_row(self, name: str) -> bool:
        """Whether a GGUF vector is a matrix of one row in Hugging Face's layout."""
        return _template(name).rpartition(".")[0] in self.rows

    def is_raised(self, name: str) -> bool:
        """Whether a GGUF tensor is a norm's weight that `norm_offset` has been added to."""
        return self.norm_offset != 0 and name.endswith("_norm.weight")

    def is_float32(self, name: str) -> bool:
        """Whether ggml reads a GGUF tensor in F32 only."""
        return _template(name).rpartition(".")[0] in self.float32

    def heads(self, name: str, config: Mapping[str, Any], rows: int) -> int | None:
        """Heads of a GGUF tensor of so many rows that are stored for interleaved rotary pairs, else None."""
        stem = _template(name).rpartition(".")[0]
        if stem not in self.rotary:
            return None
        return rows // int(config["head_dim"]) if LAYER_SHAPES in config else int(config[self.rotary[stem]])


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
DECI = replace(_LLAMA, gguf="deci", also=(), written=False)
"""Llama with heads and widths of each layer in arrays. Puzzle (Bercovich et al., arXiv:2411.19146) made the first."""
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
_NO_WINDOW = {key: name for key, name in _DECODER_KEYS.items() if name != "sliding_window"}
_QWEN2 = GgufArch(
    gguf="qwen2", hf="qwen2", keys=_NO_WINDOW, tensors=_DECODER_TENSORS, constants={"hidden_act": "silu"},
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 32768},
)
_HEAD_NORMS = {
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
}
_QWEN3 = GgufArch(
    gguf="qwen3", hf="qwen3", keys=_NO_WINDOW, tensors={**_DECODER_TENSORS, **_HEAD_NORMS},
    constants={"hidden_act": "silu"},
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 32768},
)
_PHI3 = GgufArch(
    gguf="phi3", hf="phi3",
    keys={**_DECODER_KEYS, "rope.scaling.original_context_length": "original_max_position_embeddings"},
    tensors={
        **{ours: theirs for ours, theirs in _DECODER_TENSORS.items()
           if not ours.endswith(("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"))},
        "blk.{i}.attn_qkv": "model.layers.{i}.self_attn.qkv_proj",
        "blk.{i}.ffn_up": "model.layers.{i}.mlp.gate_up_proj",
    },
    constants={"hidden_act": "silu"},
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096},
)
_GEMMA3 = GgufArch(
    gguf="gemma3", hf="gemma3_text",
    keys={**_DECODER_KEYS, "attention.sliding_window_pattern": "sliding_window_pattern",
          "rope.freq_base_swa": "rope_local_base_freq"},
    tensors={
        **_DECODER_TENSORS, **_HEAD_NORMS,
        "blk.{i}.post_attention_norm": "model.layers.{i}.post_attention_layernorm",
        "blk.{i}.ffn_norm": "model.layers.{i}.pre_feedforward_layernorm",
        "blk.{i}.post_ffw_norm": "model.layers.{i}.post_feedforward_layernorm",
    },
    constants={"hidden_activation": "gelu_pytorch_tanh"},
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "max_position_embeddings": 131_072,
              "rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6},
    norm_offset=1.0,
)
_WITHOUT_FFN = {ours: theirs for ours, theirs in _DECODER_TENSORS.items() if "ffn_" not in ours or "norm" in ours}
_MIXTRAL = GgufArch(
    gguf="llama", hf="mixtral",
    keys={**_DECODER_KEYS, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    tensors={**_WITHOUT_FFN, "blk.{i}.ffn_gate_inp": "model.layers.{i}.block_sparse_moe.gate"},
    stacks={
        "blk.{i}.ffn_gate_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
        "blk.{i}.ffn_down_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
        "blk.{i}.ffn_up_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
    },
    experts="num_local_experts",
    constants={"hidden_act": "silu"},
    rotary=_LLAMA.rotary,
    required=(*_LLAMA.required, "num_local_experts", "num_experts_per_tok"),
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "max_position_embeddings": 131_072},
)
_QWEN_EXPERT_KEYS = {
    "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_QWEN_EXPERTS = {
    f"blk.{{i}}.ffn_{part}_exps": f"model.layers.{{i}}.mlp.experts.{{e}}.{part}_proj"
    for part in ("gate", "up", "down")}
_QWEN2MOE = GgufArch(
    gguf="qwen2moe", hf="qwen2_moe",
    keys={**_NO_WINDOW, **_QWEN_EXPERT_KEYS,
          "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    tensors={
        **_WITHOUT_FFN,
        "blk.{i}.ffn_gate_inp": "model.layers.{i}.mlp.gate",
        "blk.{i}.ffn_gate_inp_shexp": "model.layers.{i}.mlp.shared_expert_gate",
        **{f"blk.{{i}}.ffn_{part}_shexp": f"model.layers.{{i}}.mlp.shared_expert.{part}_proj"
           for part in ("gate", "up", "down")},
    },
    stacks=_QWEN_EXPERTS, experts="num_experts", rows=("blk.{i}.ffn_gate_inp_shexp",),
    constants={"hidden_act": "silu", "norm_topk_prob": False, "decoder_sparse_step": 1},
    required=(*_LLAMA.required, *_QWEN_EXPERT_KEYS.values(), "shared_expert_intermediate_size"),
    defaults=_QWEN2.defaults,
)
_QWEN3MOE = GgufArch(
    gguf="qwen3moe", hf="qwen3_moe", keys={**_NO_WINDOW, **_QWEN_EXPERT_KEYS},
    tensors={**_WITHOUT_FFN, **_HEAD_NORMS, "blk.{i}.ffn_gate_inp": "model.layers.{i}.mlp.gate"},
    stacks=_QWEN_EXPERTS, experts="num_experts",
    constants={"hidden_act": "silu", "norm_topk_prob": True, "decoder_sparse_step": 1},
    required=(*_LLAMA.required, *_QWEN_EXPERT_KEYS.values()),
    defaults=_QWEN3.defaults,
)
_T5_ATTENTION = {f"attn_{part}": f"SelfAttention.{part}" for part in "qkvo"} | {
    "attn_rel_b": "SelfAttention.relative_attention_bias"}
_T5_PARTS = {"ffn_gate": "DenseReluDense.wi_0", "ffn_up": "DenseReluDense.wi_1", "ffn_down": "DenseReluDense.wo",
             "ffn_norm": "layer_norm"}  # without a gate, ffn_up is wi: see gguf_families
_T5_ENCODER = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "enc.blk.{i}.attn_norm": "encoder.block.{i}.layer.0.layer_norm",
    **{f"enc.blk.{{i}}.{ours}": f"encoder.block.{{i}}.layer.0.{theirs}" for ours, theirs in _T5_ATTENTION.items()},
    **{f"enc.blk.{{i}}.{ours}": f"encoder.block.{{i}}.layer.1.{theirs}" for ours, theirs in _T5_PARTS.items()},
}
_T5 = GgufArch(
    gguf="t5", hf="t5", block="enc.blk.", written=False,
    keys={
        "block_count": "num_layers",
        "decoder_block_count": "num_decoder_layers",
        "context_length": "n_positions",
        "embedding_length": "d_model",
        "feed_forward_length": "d_ff",
        "attention.head_count": "num_heads",
        "attention.key_length": "d_kv",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
        "attention.relative_buckets_count": "relative_attention_num_buckets",
    },
    tensors={
        **_T5_ENCODER,
        "output": "lm_head",
        "dec.output_norm": "decoder.final_layer_norm",
        "dec.blk.{i}.attn_norm": "decoder.block.{i}.layer.0.layer_norm",
        "dec.blk.{i}.cross_attn_norm": "decoder.block.{i}.layer.1.layer_norm",
        **{f"dec.blk.{{i}}.{ours}": f"decoder.block.{{i}}.layer.0.{theirs}" for ours, theirs in _T5_ATTENTION.items()},
        **{f"dec.blk.{{i}}.cross_attn_{part}": f"decoder.block.{{i}}.layer.1.EncDecAttention.{part}"
           for part in "qkvo"},
        **{f"dec.blk.{{i}}.{ours}": f"decoder.block.{{i}}.layer.2.{theirs}" for ours, theirs in _T5_PARTS.items()},
    },
    constants={},
    required=("num_layers", "d_model", "num_heads", "d_kv", "d_ff"),
    defaults={"layer_norm_epsilon": 1e-6, "n_positions": 512, "relative_attention_num_buckets": 32},
)
_T5_ALONE = replace(_T5, gguf="t5encoder", tensors=_T5_ENCODER, constants={"is_encoder_decoder": False})
ARCHITECTURES: tuple[GgufArch, ...] = (
    _LLAMA, DECI, _BERT, _QWEN2, _QWEN3, _PHI3, _GEMMA3, _MIXTRAL, _QWEN2MOE, _QWEN3MOE, _T5, _T5_ALONE)


def arch_of_file(name: str, *, where: str, experts: bool = False) -> GgufArch:
    """The table of a file's general.architecture. experts: the file says that it has some."""
    for arch in ARCHITECTURES:
        if arch.gguf == name and bool(arch.experts) == experts:
            return arch
    known = {arch.gguf: None for arch in ARCHITECTURES}
    if name in known:
        raise UnsupportedError(f"{where}: {name!r} {'with' if experts else 'without'} experts is none that edgewise "
                               "reads")
    raise UnsupportedError(f"{where}: architecture {name!r}; edgewise reads {', '.join(known)} from GGUF files "
                           "(`edgewise inspect` shows any file)")


def arch_of_config(model_type: str, *, where: str) -> GgufArch:
    """The table under which a `model_type` is written."""
    for arch in ARCHITECTURES:
        if arch.written and model_type in (arch.hf, *arch.also):
            return arch
    known = ", ".join(name for arch in ARCHITECTURES if arch.written for name in (arch.hf, *arch.also))
    raise UnsupportedError(f"{where}: models of type {model_type!r} are not written as GGUF; {known} are. Write a "
                           "Hugging Face folder instead")
