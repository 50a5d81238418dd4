"""A Plan and its packed weights become a native Model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from edgewise.core.activation import StaticActivation
from edgewise.core.errors import UnsupportedError
from edgewise.core.storage import Dense, Factored, InputSparse, Sparse, Stored, Sum
from edgewise.engine.packing import PackedWeights
from edgewise.engine.plan import Attention, Experts, FeedForward, Layer, Linear, Norm, Plan
from edgewise.native import _core  # type: ignore[attr-defined]

__all__ = ["build_model", "linears_of", "low_rank_of", "packed_parts", "phases_of"]


def packed_parts(plan: Plan) -> dict[int, tuple[tuple[str, Stored], ...]]:
    """By id() of a weight that runs as its parts, these with what is added to its name: a product of two matrices, or
    a weight plus such a product, where a layer's attention and feed-forward multiply it."""
    found: dict[int, tuple[tuple[str, Stored], ...]] = {}
    for each in (plan, plan.encoder):
        for layer in () if each is None else each.layers:
            # What reads the same input lies in columns as a whole, or not at all.
            phases = [phase for phase in phases_of(layer)
                      if not any(isinstance(linear.weight, InputSparse) for linear in phase)]
            for linear in (linear for phase in phases for linear in phase):
                parts = _parts_of(linear.weight)
                if parts and linear.activation != "static":
                    found[id(linear.weight)] = parts
    return found


def phases_of(layer: Layer) -> list[tuple[Linear, ...]]:
    """The linears of attention and of a feed-forward without experts, those that are multiplied at a time together."""
    attention, ffn, phases = layer.attention, layer.feed_forward, list[tuple[Linear, ...]]()
    if attention is not None:
        phases += [(attention.q, attention.k, attention.v), (attention.o,)]
    if isinstance(ffn, FeedForward):
        phases += [(ffn.up,) if ffn.gate is None else (ffn.up, ffn.gate), (ffn.down,)]
    return phases


def _parts_of(weight: Stored) -> tuple[tuple[str, Stored], ...]:
    if isinstance(weight, Factored):
        pair = (weight.left, weight.right)
        return () if any(isinstance(part, Factored | Sum) for part in pair) else tuple(
            zip((".left", ".right"), pair, strict=True))
    if isinstance(weight, Sum) and len(weight.parts) == 2 and isinstance(weight.parts[1], Factored):
        first, rest = weight.parts[0], _parts_of(weight.parts[1])
        sparse = any(isinstance(part, Sparse) and part.encoding == "csr" for _, part in rest)
        return () if isinstance(first, Factored | Sum) or not rest or sparse else (("", first), *rest)
    return ()


def linears_of(plan: Plan) -> Iterator[Linear]:
    """Every linear of the plan, the embedding table first, the head last; of an encoder-decoder, those of both."""
    yield plan.embedding
    if plan.encoder is not None:
        yield from linears_of(plan.encoder)
    for layer in plan.layers:
        attention = layer.attention
        if attention is not None:
            yield from (attention.q, attention.k, attention.v, attention.o)
        if layer.cross is not None:
            yield from (layer.cross.q, layer.cross.k, layer.cross.v, layer.cross.o)
        if isinstance(layer.feed_forward, Experts):
            yield layer.feed_forward.router
            if layer.feed_forward.shared_gate is not None:
                yield layer.feed_forward.shared_gate
        for feed_forward in layer.feed_forwards:
            if feed_forward.gate is not None:
                yield feed_forward.gate
            yield from (feed_forward.up, feed_forward.down)
    if plan.head is not None:
        yield plan.head


def low_rank_of(linear: Linear) -> tuple[tuple[str, Stored], ...]:
    """The factors that the inputs of a linear which are not read go through, with their names."""
    weight = linear.weight
    if not isinstance(weight, InputSparse) or weight.low_rank is None:
        return ()
    return ((f"{linear.key}.low_rank.left", weight.low_rank.left),
            (f"{linear.key}.low_rank.right", weight.low_rank.right))


def build_model(plan: Plan, packed: PackedWeights, names: dict[int, str]) -> Any:
    """names: the packed name of each stored object, by id(). Of an encoder-decoder, the decoder."""

    def matrix(stored: Stored) -> Any:
        return packed.matrices[names[id(stored)]]

    def native(stored: Stored, source: Linear, bias: Any) -> Any:
        """In the form it was packed in: as a whole, or as its parts."""
        if id(stored) not in names and isinstance(stored, Factored):
            return native(stored.left, source, bias).factored(native(stored.right, source, None))
        if id(stored) not in names and isinstance(stored, Sum):
            weight, term = stored.parts
            return native(weight, source, bias).corrected(native(term, source, None))
        return _core.Linear(matrix(stored), bias, source.activation == "int8")

    def linear(source: Linear) -> Any:
        made = native(source.weight, source, None if source.bias is None else _floats(source.bias))
        if isinstance(source.weight, InputSparse):
            factors = [_core.Linear(matrix(factor), None, not isinstance(factor, Dense))
                       for _, factor in low_rank_of(source)]
            made.choose(_floats(source.weight.threshold), *reversed(factors))
        if source.activation == "static":
            assert source.input is not None
            try:
                made.on_grid(_grid(source.input), _grid(source.output))
            except ValueError as error:
                raise UnsupportedError(f"{source.name}: {error}") from error
        return made

    model = _core.Model(plan.hidden, plan.vocab, plan.context)
    model.set_embedding(_core.Linear(matrix(plan.embedding.weight)), plan.embedding_scale)
    if plan.head is not None:
        model.set_head(linear(plan.head), plan.logit_scale)
    if plan.final_norm is not None:
        model.set_final_norm(_norm(plan.final_norm))
    if plan.embedding_norm is not None:
        model.set_embedding_norm(_norm(plan.embedding_norm))
    if plan.position_embedding is not None:
        model.set_positions(_floats(plan.position_embedding), plan.position_offset)
    if plan.token_type_embedding is not None:
        model.set_token_types(_floats(plan.token_type_embedding))
    ropes: dict[int, int] = {}
    biases: dict[int, Any] = {}
    for layer in plan.layers:
        bias = None if layer.attention is None else layer.attention.bias
        if bias is not None and id(bias) not in biases:
            biases[id(bias)] = _core.RelativeBias(bias.by_distance(bias.most))
        _add_layer(model, layer, linear, ropes, None if bias is None else biases[id(bias)])
    return model


def _add_layer(model: Any, layer: Layer, linear: Any, ropes: dict[int, int], bias: Any) -> None:
    attention, feed_forward, cross = layer.attention, layer.feed_forward, layer.cross
    rope = -1
    if attention is not None and attention.rope is not None:
        if id(attention.rope) not in ropes:
            ropes[id(attention.rope)] = model.add_rope(
                _floats(attention.rope.inverse_frequency), attention.rope.attention_factor)
        rope = ropes[id(attention.rope)]
    model.add_layer(
        **_attention(attention, linear), rope=rope,
        **_feed_forward(feed_forward, linear), attention_norm=_norm_or_none(layer.attention_norm),
        feed_forward_norm=_norm_or_none(layer.feed_forward_norm),
        function=layer.feed_forwards[0].function if layer.feed_forwards else "silu", post_norm=layer.order == "post",
        after_attention=_norm_or_none(layer.after_attention),
        after_feed_forward=_norm_or_none(layer.after_feed_forward), bias=bias,
        cross=None if cross is None else _core.Cross(
            linear(cross.q), linear(cross.k), linear(cross.v), linear(cross.o), _norm(cross.norm), cross.heads,
            cross.kv_heads, cross.head_dim, cross.scale))
    if layer.rounding is not None:
        names = ("attention_in", "query", "key", "value", "score", "probability", "attended", "feed_forward_in",
                 "sigmoid", "act")
        try:
            model.round_layer(**{name: _grid(getattr(layer.rounding, name)) for name in names})
        except ValueError as error:
            where = "" if attention is None else attention.q.name.partition(".self_attn.")[0]
            raise UnsupportedError(f"{where}: {error}") from error


def _grid(grid: StaticActivation | None) -> Any:
    return None if grid is None else _core.Grid(grid.scale, grid.zero, grid.bits)


def _attention(part: Attention | None, linear: Any) -> dict[str, Any]:
    if part is None:
        return {"q": None, "k": None, "v": None, "o": None, "heads": 0, "kv_heads": 0, "head_dim": 0, "scale": 1.0,
                "visible": "causal", "window": 0}
    return {"q": linear(part.q), "k": linear(part.k), "v": linear(part.v), "o": linear(part.o), "heads": part.heads,
            "kv_heads": part.kv_heads, "head_dim": part.head_dim, "scale": part.scale, "visible": part.policy.kind,
            "window": part.policy.window, "sinks": part.policy.sinks, "q_norm": _norm_or_none(part.q_norm),
            "k_norm": _norm_or_none(part.k_norm), "value_dim": part.value_width,
            "turns": None if part.turns is None else np.ascontiguousarray(part.turns, np.uint16)}


def _feed_forward(part: FeedForward | Experts | None, linear: Any) -> dict[str, Any]:
    if part is None:
        return {"gate": None, "up": None, "down": None}
    if isinstance(part, FeedForward):
        return {"gate": None if part.gate is None else linear(part.gate), "up": linear(part.up),
                "down": linear(part.down)}
    native = _core.Experts(linear(part.router), None if part.shared_gate is None else linear(part.shared_gate),
                           len(part.experts), part.top_k, part.normalise)
    for expert in part.experts if part.shared is None else (*part.experts, part.shared):
        native.add(None if expert.gate is None else linear(expert.gate), linear(expert.up), linear(expert.down),
                   expert.function)
    return {"gate": None, "up": None, "down": None, "experts": native}


def _norm_or_none(norm: Norm | None) -> Any:
    return None if norm is None else _norm(norm)


def _norm(norm: Norm) -> Any:
    return _core.Norm(norm.kind, _floats(norm.weight), None if norm.bias is None else _floats(norm.bias), norm.eps)


def _floats(values: Any) -> Any:
    return np.ascontiguousarray(values, np.float32)
