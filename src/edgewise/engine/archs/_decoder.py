"""What decoders share: sizes, attention projections, gated feed-forwards, the tied or untied output layer.

A family reads a `Decoder`, builds its layers with it, and hands them to `finish`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import FormatError, UnsupportedError
from edgewise.core.shapes import LAYER_SHAPES, LayerShape, shapes_of
from edgewise.core.values import dataclass
from edgewise.engine.archs._reading import FUNCTIONS, Config, Function, Tensors
from edgewise.engine.archs._rope import rope_of
from edgewise.engine.plan import Attention, AttentionPolicy, FeedForward, Layer, Linear, Norm, Plan, Rope

__all__ = ["Decoder"]

_KNOWN_EXTRA = {
    r"rotary_emb\.inv_freq$": "rotary frequencies are computed from the configuration, not read",
}


@dataclass(frozen=True, eq=False)
class Decoder:
    """A checkpoint of a decoder, its sizes read and checked. head_dim: of a whole head, which scores are scaled by."""

    arch: str
    source: str
    config: Config
    tensors: Tensors
    hidden: int
    vocab: int
    context: int
    head_dim: int
    shapes: tuple[LayerShape, ...]
    eps: float
    function: Function
    prefix: str
    embedding: Linear
    norm_offset: float

    @classmethod
    def read(cls, checkpoint: Checkpoint, *, context: int, eps: float = 1e-6, kv_heads: int | None = None,
             head_dim: int | None = None, function: str = "silu", function_key: str = "hidden_act",
             norm_offset: float = 0.0, prefixes: Sequence[str] = ("model.", "")) -> Decoder:
        """context .. function: what transformers assumes for this family where a configuration leaves a key out.

        kv_heads: None for as many as there are query heads. norm_offset: added to the weight of every norm.
        """
        source = checkpoint.source
        config, tensors = Config(checkpoint.config, source), Tensors(checkpoint)
        hidden = config.integer("hidden_size")
        count = config.layers(tensors)
        vocab = config.integer("vocab_size")
        given = shapes_of(checkpoint.config, source)
        if given is not None:
            size = config.integer("head_dim", head_dim)
        else:
            heads = config.per_layer("num_attention_heads", count)
            keys = heads
            if kv_heads is not None or "num_key_value_heads" in config:
                keys = config.per_layer("num_key_value_heads", count, kv_heads)
            for queries, own in zip(heads, keys, strict=True):
                if queries % own:
                    raise FormatError(f"num_attention_heads {queries} is not a multiple of num_key_value_heads {own}",
                                      path=source or None)
            size = config.integer("head_dim", head_dim or hidden // heads[0] or None)
            widths = config.per_layer("intermediate_size", count)
            given = tuple(LayerShape(queries, own, size, size, width) for queries, own, width
                          in zip(heads, keys, widths, strict=True))
        prefix = tensors.prefix(prefixes, "embed_tokens.weight")
        return cls(
            checkpoint.arch, source, config, tensors, hidden, vocab,
            config.integer("max_position_embeddings", context), size, given, config.number("rms_norm_eps", eps),
            config.choice(function_key, FUNCTIONS, function), prefix,
            tensors.linear(f"{prefix}embed_tokens", vocab, hidden, bias=False), norm_offset)

    @property
    def layers(self) -> int:
        return len(self.shapes)

    def name(self, layer: int) -> str:
        """What the names of a layer's tensors begin with, without the dot."""
        return f"{self.prefix}layers.{layer}"

    def norm(self, name: str, size: int | None = None) -> Norm:
        """The RMSNorm `name`, over the hidden size unless another is given."""
        weight = self.tensors.dense(f"{name}.weight", (size or self.hidden,))
        return Norm("rms", weight + np.float32(self.norm_offset) if self.norm_offset else weight, self.eps)

    def projections(self, layer: int, *, bias: bool | None, output_bias: bool | None
                    ) -> tuple[Linear, Linear, Linear, Linear]:
        """q, k, v and o of a layer. bias, output_bias: asked for, not wanted, or None: where they are there."""
        name, hidden, shape = f"{self.name(layer)}.self_attn", self.hidden, self.shapes[layer]
        q, k, v = (self.tensors.linear(f"{name}.{part}_proj", rows, hidden, bias=bias) for part, rows in (
            ("q", shape.heads * shape.key_dim), ("k", shape.kv_heads * shape.key_dim),
            ("v", shape.kv_heads * shape.value_dim)))
        return q, k, v, self.tensors.linear(f"{name}.o_proj", hidden, shape.heads * shape.value_dim, bias=output_bias)

    def attention(self, layer: int, rope: Callable[[], Rope], policy: AttentionPolicy, *, bias: bool | None,
                  output_bias: bool | None, scale: float | None = None, head_norms: bool = False) -> Attention | None:
        """The attention of a layer, or None where it has none. rope: asked for after the weights. scale: by default
        head_dim^-1/2. head_norms: queries and keys have norms of each head."""
        shape = self.shapes[layer]
        if not shape.heads:
            return None
        linears = self.projections(layer, bias=bias, output_bias=output_bias)
        turning = rope()
        known = len(turning.inverse_frequency)
        turns: NDArray[np.uint16] | None = None
        if shape.pairs is not None or shape.key_dim != self.head_dim:
            if head_norms or 2 * known != self.head_dim:
                why = "its heads are normed as a whole" if head_norms else "a part of its heads is not turned"
                raise UnsupportedError(f"{self.source}: {LAYER_SHAPES}[{layer}] cuts pairs from the heads of "
                                       f"{self.arch}, which cannot be: {why}; keep key_dim {self.head_dim} there")
            if shape.pairs is None or max(max(own) for own in shape.pairs) >= known:
                raise FormatError(f"configuration key '{LAYER_SHAPES}[{layer}]': pairs says which of the {known} "
                                  f"rotary frequencies a head of {shape.key_dim} dimensions keeps; given "
                                  f"{str(shape.pairs)[:60]}", path=self.source or None)
            turns = np.array(shape.pairs, np.uint16)
        q_norm, k_norm = (self.norm(f"{self.name(layer)}.self_attn.{part}_norm", self.head_dim) if head_norms else None
                          for part in ("q", "k"))
        return Attention(*linears, shape.heads, shape.kv_heads, shape.key_dim,
                         self.head_dim**-0.5 if scale is None else scale, turning, policy, q_norm, k_norm,
                         value_dim=shape.value_dim, turns=turns)

    def part_norm(self, name: str, part: object) -> Norm | None:
        """The norm before a part, where the part is there."""
        return None if part is None else self.norm(name)

    def feed_forward(self, layer: int, *, bias: bool | None = False) -> FeedForward | None:
        """The gated feed-forward of a layer, or None where it has none."""
        width = self.shapes[layer].width
        return self.gated(f"{self.name(layer)}.mlp", width, bias=bias) if width else None

    def equal(self) -> None:
        """Raises UnsupportedError where the configuration cuts layers of a family whose weights lie in one."""
        if LAYER_SHAPES in self.config:
            raise UnsupportedError(f"{self.source}: {LAYER_SHAPES} is not read for {self.arch}; it is for families "
                                   "with q, k, v, gate and up in weights of their own, without experts")

    def gated(self, name: str, width: int, *, parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
              bias: bool | None = False) -> FeedForward:
        """The feed-forward under `name`; parts: how it calls gate, up and down."""
        gate, up = (self.tensors.linear(f"{name}.{part}", width, self.hidden, bias=bias) for part in parts[:2])
        down = self.tensors.linear(f"{name}.{parts[2]}", self.hidden, width, bias=bias)
        return FeedForward(up, down, gate, self.function)

    def experts(self, key: str, default: int) -> int:
        """How many experts a layer has; at most the number of tensors, as an absurd one must not cost memory."""
        return self.config.integer(key, default, most=max(len(self.tensors), 1))

    def rope(self, **options: Any) -> Rope:
        """As `rope_of`, with what the decoder knows. For after the first weights: head_dim is then a true one."""
        divisors: NDArray[np.float32] | None = None
        if "rope_freqs.weight" in self.tensors:  # what GGUF files of Llama 3 hold instead of its rotary scaling
            divisors = self.tensors.dense("rope_freqs.weight", (self.head_dim // 2,))
        return rope_of(self.config, self.head_dim, self.context, divisors=divisors, source=self.source, **options)

    def kinds(self, default: Sequence[bool]) -> list[bool]:
        """Per layer: does it slide? `layer_types` of the configuration, or the family's default."""
        named = self.config.names("layer_types", self.layers)
        if named is None:
            return list(default)
        return [self.config.pick(f"layer_types[{i}]", kind, {"full_attention": False, "sliding_attention": True})
                for i, kind in enumerate(named)]

    def policies(self, sliding: Sequence[bool]) -> list[AttentionPolicy]:
        """Per layer: causal, or the sliding window of the configuration."""
        if not any(sliding):
            return [AttentionPolicy("causal")] * self.layers
        window = AttentionPolicy("sliding", self.config.integer("sliding_window"))
        return [window if slides else AttentionPolicy("causal") for slides in sliding]

    def finish(self, layers: Sequence[Layer], *, tied: bool | None = None, known: dict[str, str] | None = None,
               embedding_scale: float = 1.0) -> Plan:
        """The Plan of these layers, with the final norm and the output layer; tells of tensors nobody asked for.

        tied: the family's default; None: tied where neither key nor tensor says otherwise.
        """
        final_norm = self.norm(f"{self.prefix}norm")
        head = self._head(tied)
        self.tensors.finish(_KNOWN_EXTRA | (known or {}))
        return Plan(self.arch, "decoder", self.hidden, self.vocab, self.context, self.embedding, tuple(layers),
                    final_norm, head, embedding_scale=embedding_scale)

    def _head(self, tied: bool | None) -> Linear:
        name = f"{self.prefix.removesuffix('model.')}lm_head"
        name = name if f"{name}.weight" in self.tensors else "lm_head"
        if tied is None:
            tied = f"{name}.weight" not in self.tensors
        if self.config.flag("tie_word_embeddings", "tie_word_embeddings" not in self.config and tied):
            return Linear(self.embedding.name, self.embedding.weight, None, self.embedding.activation)
        return self.tensors.linear(name, self.vocab, self.hidden, bias=False)
