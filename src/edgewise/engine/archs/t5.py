"""T5, T5 1.1 (FLAN-T5), mT5 and umT5: an encoder and a decoder that attends to it, biases by distance, RMSNorm.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", arXiv:1910.10683;
Xue et al., "mT5", arXiv:2010.11934; Chung et al., "UniMax" (umT5), arXiv:2304.09151. Scores are not scaled. T5 and mT5
have one table of biases for all layers of a stack, umT5 one for each (a GGUF file calls both t5). T5 with a tied
output layer, and umT5, scale what goes into it by hidden^-1/2; T5 1.1 and mT5 do not. Checkpoints of the encoder alone
run as encoders.
"""

from __future__ import annotations

from typing import Any

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import FormatError
from edgewise.engine.archs._reading import FUNCTIONS, Config, Function, Tensors
from edgewise.engine.plan import (
    Attention,
    AttentionPolicy,
    CrossAttention,
    FeedForward,
    Layer,
    Linear,
    Norm,
    Plan,
    RelativeBias,
)

__all__ = ["ARCHS", "plan"]

ARCHS = ("t5", "mt5", "umt5")

_KNOWN_EXTRA = {
    r"^(encoder|decoder)\.embed_tokens\.": "encoder and decoder share one embedding table",
    r"\.EncDecAttention\.relative_attention_bias\.": "attention to the encoder has no distances, and no use for biases",
}
_MOST_DISTANCE = 2**16


def plan(checkpoint: Checkpoint) -> Plan:
    """The Plan of an encoder-decoder, or of an encoder. Errors as `plan_of`."""
    return _Reader(checkpoint).plan()


class _Reader:
    """A checkpoint of this family, its sizes read and checked."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.arch, self.source = checkpoint.arch, checkpoint.source
        self.config, self.tensors = Config(checkpoint.config, self.source), Tensors(checkpoint)
        self.classes: Any = checkpoint.config.get("architectures")
        config = self.config
        self.hidden = config.integer("d_model", 512)
        self.vocab = config.integer("vocab_size", 32128)
        self.context = config.integer("n_positions", 512, most=2**20)
        self.heads = config.integer("num_heads", 8)
        self.head_dim = config.integer("d_kv", 64)
        self.width = config.integer("d_ff", 2048)
        self.eps = config.number("layer_norm_epsilon", 1e-6)
        self.table = config.integer("relative_attention_num_buckets", 32, least=4, most=2**16)
        self.most = config.integer("relative_attention_max_distance", 128, most=_MOST_DISTANCE)
        if self.most <= self.table // 2:
            raise FormatError(
                f"relative_attention_num_buckets {self.table} with relative_attention_max_distance {self.most}; "
                "expected a distance above half the number of buckets", path=self.source or None)
        self.function, self.gated = self._feed_forward()
        prefixes = ("shared", "decoder.embed_tokens", "encoder.embed_tokens")
        name = next((p for p in prefixes if f"{p}.weight" in self.tensors), "shared")
        self.embedding = self.tensors.linear(name, self.vocab, self.hidden, bias=False)

    def plan(self) -> Plan:
        alone = self.config.flag("is_encoder_decoder", True) is False or (
            isinstance(self.classes, list | tuple) and any(str(n).endswith("EncoderModel") for n in self.classes))
        encoder = Plan(self.arch, "encoder", self.hidden, self.vocab, self.context, self.embedding,
                       self._layers("encoder", "num_layers", 6), self._norm("encoder.final_layer_norm"))
        if alone:
            self.tensors.finish(_KNOWN_EXTRA)
            return encoder
        layers = self._layers("decoder", "num_decoder_layers", len(encoder.layers))
        head, scale = self._head()
        made = Plan(self.arch, "encoder-decoder", self.hidden, self.vocab, self.context, self.embedding, layers,
                    self._norm("decoder.final_layer_norm"), head, logit_scale=scale, encoder=encoder,
                    start=self._start())
        self.tensors.finish(_KNOWN_EXTRA)
        return made

    def _feed_forward(self) -> tuple[Function, bool]:
        """The function, and whether it gates. Where nothing is said, a gate means T5 1.1, whose function is GELU."""
        gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in self.tensors
        # "gated-gelu" has always been the formula with tanh.
        choices: dict[str, tuple[Function, bool]] = {
            **{name: (function, False) for name, function in FUNCTIONS.items()},
            **{f"gated-{name}": (function, True) for name, function in FUNCTIONS.items()},
            "gated-gelu": ("gelu_tanh", True)}
        return self.config.choice("feed_forward_proj", choices, "gated-gelu" if gated else "relu")

    def _norm(self, name: str) -> Norm:
        return Norm("rms", self.tensors.dense(f"{name}.weight", (self.hidden,)), self.eps)

    def _projections(self, name: str) -> tuple[Linear, Linear, Linear, Linear]:
        inner = self.heads * self.head_dim
        q, k, v = (self.tensors.linear(f"{name}.{part}", inner, self.hidden, bias=False) for part in "qkv")
        return q, k, v, self.tensors.linear(f"{name}.o", self.hidden, inner, bias=False)

    def _layers(self, stack: str, key: str, default: int) -> tuple[Layer, ...]:
        count = self.config.integer(key, default, most=max(len(self.tensors), 1))
        decoder = stack == "decoder"
        policy = AttentionPolicy("causal" if decoder else "full")
        bias: RelativeBias | None = None
        layers = []
        for i in range(count):
            name = f"{stack}.block.{i}.layer"
            linears = self._projections(f"{name}.0.SelfAttention")
            table = f"{name}.0.SelfAttention.relative_attention_bias.weight"
            if bias is None or self.arch == "umt5" or table in self.tensors:
                bias = RelativeBias(self.tensors.dense(table, (self.table, self.heads)), self.most, not decoder)
            cross = None
            if decoder:
                cross = CrossAttention(*self._projections(f"{name}.1.EncDecAttention"),
                                       self._norm(f"{name}.1.layer_norm"), self.heads, self.heads, self.head_dim, 1.0)
            layers.append(Layer(
                Attention(*linears, self.heads, self.heads, self.head_dim, 1.0, policy=policy, bias=bias),
                self._part(f"{name}.{2 if decoder else 1}.DenseReluDense"), self._norm(f"{name}.0.layer_norm"),
                self._norm(f"{name}.{2 if decoder else 1}.layer_norm"), cross=cross))
        return tuple(layers)

    def _part(self, name: str) -> FeedForward:
        down = self.tensors.linear(f"{name}.wo", self.hidden, self.width, bias=False)
        first, *second = (self.tensors.linear(f"{name}.{part}", self.width, self.hidden, bias=False)
                          for part in (("wi_0", "wi_1") if self.gated else ("wi",)))
        return FeedForward(second[0], down, first, self.function) if second else FeedForward(
            first, down, None, self.function)

    def _head(self) -> tuple[Linear, float]:
        """The output layer, and what logits are multiplied by. A tensor of its own counts, whatever the keys say."""
        own = "lm_head.weight" in self.tensors
        head = self.tensors.linear("lm_head", self.vocab, self.hidden, bias=False) if own else Linear(
            self.embedding.name, self.embedding.weight, None, self.embedding.activation)
        # New configurations say it; in older ones the output layer that is tied is the one that is scaled.
        tied = self.config.flag("tie_word_embeddings", True)
        scaled = self.arch != "mt5" and self.config.flag("scale_decoder_outputs", tied)
        return head, self.hidden**-0.5 if scaled else 1.0

    def _start(self) -> int:
        key = "decoder_start_token_id" if "decoder_start_token_id" in self.config else "pad_token_id"
        return self.config.integer(key, 0, least=0, most=self.vocab - 1)
