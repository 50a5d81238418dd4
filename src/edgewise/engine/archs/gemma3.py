"""Gemma 3, the text model: local and global layers with rotary bases of their own, norms before and after each part.

"Gemma 3 Technical Report", arXiv:2503.19786. Five layers of six see `sliding_window` positions and rotate by
`rope_local_base_freq`; every sixth sees all of them, with `rope_theta` and its scaling. Query and key heads are normed.
Norms multiply by (1 + weight); the embedding is multiplied by sqrt(hidden), rounded to the number format of the table
as transformers does (a quantised table has no such format, and is multiplied by the float32 root).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import UnsupportedError
from edgewise.core.numbers import BF16, FP16, bf16_to_float32, float32_to_bf16
from edgewise.core.storage import Dense, Stored
from edgewise.engine.archs._decoder import Decoder
from edgewise.engine.archs._reading import Config
from edgewise.engine.plan import Layer, Plan, Rope

__all__ = ["ARCHS", "plan"]

ARCHS = ("gemma3_text", "gemma3")

_KNOWN_EXTRA = {r"(^|\.)(vision_tower|multi_modal_projector)\.": "the text model alone is run, without its eyes"}


def plan(checkpoint: Checkpoint) -> Plan:
    """The Plan of a Gemma 3 checkpoint, of the text model where it has a vision tower. Errors as `plan_of`."""
    if checkpoint.arch == "gemma3" and checkpoint.config.get("text_config"):
        text = Config(checkpoint.config, checkpoint.source).mapping("text_config")
        checkpoint = replace(checkpoint, config={
            "tie_word_embeddings": checkpoint.config.get("tie_word_embeddings"), **text})
    model = Decoder.read(
        checkpoint, context=131_072, head_dim=256, kv_heads=4, function="gelu_pytorch_tanh",
        function_key="hidden_activation", norm_offset=1.0,
        prefixes=("model.", "language_model.model.", "model.language_model.", ""))
    config = model.config
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if key in config:
            raise UnsupportedError(f"{model.source}: configuration key {key!r} is set; no Gemma 3 caps its logits")
    if config.flag("use_bidirectional_attention"):
        raise UnsupportedError(f"{model.source}: use_bidirectional_attention is true; Gemma 3 runs as a decoder only")
    period = config.integer("sliding_window_pattern", 6)
    sliding = model.kinds([(i + 1) % period != 0 for i in range(model.layers)])
    policies = model.policies(sliding)
    scale = config.number("query_pre_attn_scalar", 256.0) ** -0.5
    bias = config.flag("attention_bias")
    ropes = cache(lambda: _ropes(model))
    layers = []
    for i in range(model.layers):
        name = model.name(i)
        slides = sliding[i]
        attention = model.attention(i, lambda slides=slides: ropes()[slides], policies[i],  # type: ignore[misc]
                                    bias=bias, output_bias=bias, scale=scale, head_norms=True)
        feed_forward = model.feed_forward(i)
        layers.append(Layer(
            attention, feed_forward, model.part_norm(f"{name}.input_layernorm", attention),
            model.part_norm(f"{name}.pre_feedforward_layernorm", feed_forward),
            after_attention=model.part_norm(f"{name}.post_attention_layernorm", attention),
            after_feed_forward=model.part_norm(f"{name}.post_feedforward_layernorm", feed_forward)))
    return model.finish(layers, tied=True, known=_KNOWN_EXTRA,
                        embedding_scale=_root(model.hidden, model.embedding.weight))


def _ropes(model: Decoder) -> tuple[Rope, Rope]:
    """Of layers that see everything, and of those that slide."""
    by_kind = model.config.section("rope_parameters")
    if by_kind is not None and by_kind.nested():
        return (model.rope(base=1_000_000.0, kind="full_attention"),
                model.rope(base=10_000.0, kind="sliding_attention"))
    return (model.rope(base=1_000_000.0),
            model.rope(base=10_000.0, base_key="rope_local_base_freq", scaled=False))


def _root(hidden: int, table: Stored) -> float:
    root = np.array([hidden**0.5], np.float32)
    number = table.number if isinstance(table, Dense) else None
    if number == BF16:
        return float(bf16_to_float32(float32_to_bf16(root))[0])
    return float(root.astype(np.float16)[0]) if number == FP16 else float(root[0])
