"""BERT, RoBERTa and XLM-RoBERTa encoders: learned positions, full attention, LayerNorm after each part.

Devlin et al., "BERT", arXiv:1810.04805; Liu et al., "RoBERTa", arXiv:1907.11692 (positions start after the padding
index); Conneau et al., "XLM-R", arXiv:1911.02116. The pooler and the heads of training tasks are not run.
"""

from __future__ import annotations

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import FormatError, UnsupportedError
from edgewise.engine.archs._reading import FUNCTIONS, Config, Tensors
from edgewise.engine.plan import Attention, AttentionPolicy, FeedForward, Layer, Norm, Plan

__all__ = ["ARCHS", "plan"]

ARCHS = ("bert", "roberta", "xlm-roberta")

_KNOWN_EXTRA = {
    r"(^|\.)embeddings\.(position_ids|token_type_ids)$": "buffers of position and type numbers are not needed",
    r"(^|\.)pooler\.": "the pooler is not run; hidden states are what comes out",
    r"^(cls|lm_head|classifier|qa_outputs)\.": "the head of a training task is not run",
}


def plan(checkpoint: Checkpoint) -> Plan:
    """The Plan of an encoder. Errors as `plan_of`."""
    source = checkpoint.source
    config, tensors = Config(checkpoint.config, source), Tensors(checkpoint)
    config.choice("position_embedding_type", {"absolute": None}, "absolute")
    for key in ("is_decoder", "add_cross_attention"):
        if config.flag(key):
            raise UnsupportedError(f"{source + ': ' if source else ''}configuration key {key!r} is true; the engine "
                                   f"runs this family as an encoder only (false)")
    hidden = config.integer("hidden_size")
    count = config.layers(tensors)
    vocab = config.integer("vocab_size")
    positions = config.integer("max_position_embeddings", 512)
    types = config.integer("type_vocab_size", 2)
    eps = config.number("layer_norm_eps", 1e-12)
    function = config.choice("hidden_act", FUNCTIONS, "gelu")
    heads = config.per_layer("num_attention_heads", count)
    widths = config.per_layer("intermediate_size", count)
    if hidden % heads[0]:
        raise FormatError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads[0]}",
                          path=source or None)
    head_dim = config.integer("head_dim", hidden // heads[0])
    offset = 0 if checkpoint.arch == "bert" else config.integer("pad_token_id", 1, least=0) + 1
    if positions <= offset:
        raise FormatError(f"max_position_embeddings is {positions}, but the first position of this model is {offset}",
                          path=source or None)

    own = "bert." if checkpoint.arch == "bert" else "roberta."
    prefix = tensors.prefix((own, ""), "embeddings.word_embeddings.weight")

    def norm(name: str) -> Norm:
        # Checkpoints converted from TensorFlow call weight and bias gamma and beta.
        return Norm("layer", tensors.dense(f"{name}.weight", (hidden,), older=f"{name}.gamma"), eps,
                    tensors.dense(f"{name}.bias", (hidden,), older=f"{name}.beta"))

    layers = []
    for i in range(count):
        name = f"{prefix}encoder.layer.{i}"
        inner = heads[i] * head_dim
        q, k, v = (tensors.linear(f"{name}.attention.self.{part}", inner, hidden, bias=True)
                   for part in ("query", "key", "value"))
        o = tensors.linear(f"{name}.attention.output.dense", hidden, inner, bias=True)
        attention = Attention(q, k, v, o, heads[i], heads[i], head_dim, head_dim**-0.5,
                              policy=AttentionPolicy("full"))
        up = tensors.linear(f"{name}.intermediate.dense", widths[i], hidden, bias=True)
        down = tensors.linear(f"{name}.output.dense", hidden, widths[i], bias=True)
        layers.append(Layer(attention, FeedForward(up, down, None, function),
                            norm(f"{name}.attention.output.LayerNorm"), norm(f"{name}.output.LayerNorm"), "post"))
    result = Plan(
        checkpoint.arch, "encoder", hidden, vocab, positions - offset,
        tensors.linear(f"{prefix}embeddings.word_embeddings", vocab, hidden, bias=False), tuple(layers),
        position_embedding=tensors.dense(f"{prefix}embeddings.position_embeddings.weight", (positions, hidden)),
        position_offset=offset,
        token_type_embedding=tensors.dense(f"{prefix}embeddings.token_type_embeddings.weight", (types, hidden)),
        embedding_norm=norm(f"{prefix}embeddings.LayerNorm"))
    tensors.finish(_KNOWN_EXTRA)
    return result
