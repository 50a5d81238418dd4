"""Small random models of `transformers`, as checkpoints of ours and as Hugging Face folders. Needs torch.

Every parameter is random, norms and biases included, and large enough that attention is far from uniform: a model
whose weights are nearly zero agrees with almost any mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.storage import Dense, Stored

__all__ = ["DECODERS", "ENCODERS", "ENCODER_DECODERS", "POSITIONS", "VOCAB", "build", "checkpoint_of", "ids_of", "save",
           "torch_output"]

VOCAB = 96
POSITIONS = 80
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_decoder(changes)))


def _mistral(**changes: Any) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_decoder(changes)))


def _model(family: str, **changes: Any) -> Any:
    """A causal model of another family, by the name of its classes."""
    import transformers

    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    return getattr(transformers, f"{family}ForCausalLM")(config(**_decoder({"pad_token_id": 0, **changes})))


def _gemma3(**changes: Any) -> Any:
    return _model("Gemma3", **{"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 13,
                               "num_hidden_layers": 3, "sliding_window_pattern": 3, "tie_word_embeddings": True,
                               "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-2, **changes})


def _longrope(original: int, dims: int, **changes: Any) -> dict[str, Any]:
    """Phi-3's scaling. transformers looks for the original context beside the rotary parameters."""
    return {"original_max_position_embeddings": original, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": original,
        "short_factor": [1.0 + 0.05 * i for i in range(dims // 2)],
        "long_factor": [1.5 + 0.25 * i for i in range(dims // 2)], **changes}}


def _decoder(changes: dict[str, Any]) -> dict[str, Any]:
    return {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-3,
            "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager", **changes}


def _encoder(family: str, **changes: Any) -> Any:
    import transformers

    config = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
              "num_attention_heads": 4, "max_position_embeddings": 128, "layer_norm_eps": 1e-3,
              "attn_implementation": "eager", **changes}
    return getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**config))


def _t5(family: str = "T5", *, untied: bool = False, **changes: Any) -> Any:
    """untied: transformers ties the output layer of a new model in any case, but not one that a file brings."""
    import torch
    import transformers

    config = {"vocab_size": VOCAB, "d_model": 64, "d_kv": 24, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2,
              "num_heads": 4, "layer_norm_epsilon": 1e-3, "relative_attention_num_buckets": 12,
              "relative_attention_max_distance": 20, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
              "attn_implementation": "eager", **({"tie_word_embeddings": False} if untied else {}), **changes}
    made = getattr(transformers, f"{family}Config")(**config)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(made)
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 64))
        model.config.tie_word_embeddings = False
    return model


DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _llama(),
    "llama tied": lambda: _llama(tie_word_embeddings=True),
    "llama without groups": lambda: _llama(num_key_value_heads=4),
    "llama one key head": lambda: _llama(num_key_value_heads=1),
    "llama head size": lambda: _llama(head_dim=24),
    "llama biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama gelu": lambda: _llama(hidden_act="gelu_pytorch_tanh"),
    "llama rope base": lambda: _llama(rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}),
    "llama rope linear": lambda: _llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "llama rope dynamic": lambda: _llama(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
    "llama rope llama3": lambda: _llama(rope_parameters={**LLAMA3, "rope_theta": 500_000.0}),
    "llama rope yarn": lambda: _llama(rope_parameters={**YARN, "rope_theta": 1e4}),
    "llama rope yarn options": lambda: _llama(rope_parameters={
        **YARN, "rope_theta": 1e4, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.0,
        "truncate": False}),
    "mistral": lambda: _mistral(sliding_window=24),
    "mistral head size": lambda: _mistral(sliding_window=7, head_dim=32),
    "mistral without window": lambda: _mistral(sliding_window=None),
    "qwen2": lambda: _model("Qwen2", tie_word_embeddings=True),
    "qwen2 window": lambda: _model("Qwen2", use_sliding_window=True, sliding_window=11, max_window_layers=1),
    "qwen3": lambda: _model("Qwen3", head_dim=24),
    "qwen3 biases": lambda: _model("Qwen3", head_dim=16, attention_bias=True, tie_word_embeddings=True),
    "phi3": lambda: _model("Phi3"),
    "phi3 window": lambda: _model("Phi3", sliding_window=19, num_key_value_heads=4),
    "phi3 short": lambda: _model("Phi3", **_longrope(128, 16)),
    "phi3 long": lambda: _model("Phi3", **_longrope(64, 16)),
    "phi3 part": lambda: _model("Phi3", **_longrope(64, 12, partial_rotary_factor=0.75), tie_word_embeddings=True),
    "mixtral": lambda: _model("Mixtral", num_local_experts=5, num_experts_per_tok=2),
    "mixtral window": lambda: _model("Mixtral", num_local_experts=4, num_experts_per_tok=3, sliding_window=17),
    "qwen2 moe": lambda: _model("Qwen2Moe", num_experts=6, num_experts_per_tok=3, moe_intermediate_size=48,
                                shared_expert_intermediate_size=112, tie_word_embeddings=True),
    "qwen2 moe some dense": lambda: _model(
        "Qwen2Moe", num_experts=4, num_experts_per_tok=1, moe_intermediate_size=40, norm_topk_prob=True,
        shared_expert_intermediate_size=24, mlp_only_layers=[1]),
    "qwen3 moe": lambda: _model("Qwen3Moe", num_experts=17, num_experts_per_tok=4, moe_intermediate_size=32,
                                norm_topk_prob=True, head_dim=24),
    "qwen3 moe sparse step": lambda: _model("Qwen3Moe", num_experts=4, num_experts_per_tok=2, decoder_sparse_step=2,
                                            moe_intermediate_size=32, num_hidden_layers=4),
    "gemma3": lambda: _gemma3(),
    "gemma3 scaled": lambda: _gemma3(num_hidden_layers=4, query_pre_attn_scalar=20, rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: _encoder("Bert"),
    "bert tanh": lambda: _encoder("Bert", hidden_act="gelu_new", type_vocab_size=3),
    "roberta": lambda: _encoder("Roberta", type_vocab_size=1),
    "roberta padding index": lambda: _encoder("Roberta", pad_token_id=3),
    "xlm-roberta": lambda: _encoder("XLMRoberta", type_vocab_size=1),
}


ENCODER_DECODERS: dict[str, Callable[[], Any]] = {
    "t5": lambda: _t5(),
    "t5 head size": lambda: _t5(d_kv=16, num_heads=3, num_layers=2, feed_forward_proj="gated-silu"),
    "t5 1.1": lambda: _t5(untied=True, feed_forward_proj="gated-gelu"),
    "t5 buckets": lambda: _t5(relative_attention_num_buckets=32, relative_attention_max_distance=128),
    "mt5": lambda: _t5("MT5", untied=True),
    "umt5": lambda: _t5("UMT5"),
}


def build(name: str, seed: int = 0) -> Any:
    """The model of that name in one of the tables above, parameters seeded and random, in evaluation mode, float32."""
    import torch

    model = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}[name]()
    generator = torch.Generator().manual_seed(seed)
    gemma = "gemma" in model.config.model_type
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter_name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif parameter.ndim == 1:  # Gemma's norms multiply by one more than their weight
                parameter.copy_((0 if gemma else 1) + 0.2 * noise)
            elif "relative_attention_bias" in parameter_name:
                parameter.copy_(2.0 * noise)
            elif "t5" in model.config.model_type and parameter_name in ("shared.weight", "lm_head.weight"):
                parameter.copy_((0.2 if parameter_name.startswith("shared") else 0.5) * noise)
            elif ".SelfAttention." in parameter_name or ".EncDecAttention." in parameter_name:  # scores are not scaled
                size = model.config.d_kv**-0.25 if parameter_name.endswith(("q.weight", "k.weight")) else 1.0
                parameter.copy_(1.4 * size * noise / parameter.shape[-1] ** 0.5)
            elif ".wi" in parameter_name:  # where the two formulas of GELU differ most
                parameter.copy_(2.0 * noise / parameter.shape[-1] ** 0.5)
            elif "embed" in parameter_name:
                parameter.copy_((0.3 / model.config.hidden_size**0.5 if gemma else 0.3) * noise)
            else:
                peaked = any(part in parameter_name for part in ("q_proj", "k_proj", "query", "key"))
                parameter.copy_((2.0 if peaked else 1.0) * noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def ids_of(model: Any, positions: int = POSITIONS, seed: int = 1) -> np.ndarray:
    """Seeded token ids (positions,) that avoid the padding index, which encoders treat apart."""
    padding = model.config.pad_token_id
    allowed = np.array([i for i in range(VOCAB) if i != padding])
    return np.random.default_rng(seed).choice(allowed, positions)


def torch_output(model: Any, ids: np.ndarray, **inputs: Any) -> np.ndarray:
    """Logits of a causal model, last hidden states of an encoder: (n, ...) float32."""
    import torch

    with torch.no_grad():
        result = model(torch.tensor(np.asarray(ids))[None], **inputs)
    output = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return output[0].numpy()


def checkpoint_of(model: Any) -> Checkpoint:
    """The model as a Checkpoint of ours, straight from its parameters and configuration."""
    tensors: dict[str, Stored] = {}
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            tensors |= _as_in_files(name, value.detach().numpy(), model.config.model_type)
    if getattr(model.config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    config = model.config.to_dict()
    return Checkpoint(config["model_type"], config, tensors, source="tiny")


def _as_in_files(name: str, value: np.ndarray, family: str) -> dict[str, Stored]:
    """transformers stacks the experts when it reads a file; here they are apart again, under the names of files."""
    if family == "mixtral":
        name = name.replace(".mlp.", ".block_sparse_moe.")
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    if name.endswith("experts.gate_up_proj"):
        stem, half = name.removesuffix("gate_up_proj"), value.shape[1] // 2
        return {f"{stem}{e}.{part}.weight": Dense(np.ascontiguousarray(rows)) for e, both in enumerate(value)
                for part, rows in ((gate, both[:half]), (up, both[half:]))}
    if name.endswith("experts.down_proj"):
        stem = name.removesuffix("down_proj")
        return {f"{stem}{e}.{down}.weight": Dense(matrix) for e, matrix in enumerate(value)}
    return {name: Dense(value)}


def save(model: Any, folder: Path) -> Path:
    """The model as a Hugging Face folder: config.json and model.safetensors."""
    model.save_pretrained(folder, safe_serialization=True)
    return folder
