"""Layers of which a decoded token reads only some inputs: which of them the engine runs so, and what it counted.

Zhang et al., "R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference", ICLR 2025, arXiv:2504.19449. A
prompt is dense; a token that was sampled reads, of every linear, the inputs above their thresholds, and sends the
others through a product of low rank where there is one. Weights lie input by input for that, once: of a prompt they are
put back into rows as they are used.
"""

from __future__ import annotations

from dataclasses import replace

from edgewise.core.errors import notice
from edgewise.core.storage import InputSparse
from edgewise.engine.build import linears_of
from edgewise.engine.packing import in_columns
from edgewise.engine.plan import Experts, FeedForward, Layer, Linear, Plan, layer_with, plan_with

__all__ = ["dense_plan", "is_input_sparse", "shapes_in", "with_input_sparsity"]


def is_input_sparse(plan: Plan) -> bool:
    """Whether some linear of a layer has thresholds."""
    return any(isinstance(linear.weight, InputSparse) for linear in linears_of(plan))


def _dense(linear: Linear) -> Linear:
    return replace(linear, weight=linear.weight.weight) if isinstance(linear.weight, InputSparse) else linear


def dense_plan(plan: Plan) -> Plan:
    """The plan without thresholds."""
    return plan_with(plan, _dense)


def with_input_sparsity(plan: Plan, source: str) -> Plan:
    """The plan as the engine runs it: a layer has thresholds in all linears, in a format that fits, or in none."""
    if not is_input_sparse(plan):
        return plan
    plain = 0

    def fitting(layer: Layer) -> Layer:
        nonlocal plain
        own = _linears(layer)
        if not any(isinstance(linear.weight, InputSparse) for linear in own):
            return layer
        if _runs(layer) and all(isinstance(linear.weight, InputSparse) and linear.activation == "int8"
                                and in_columns(linear.name, linear.weight.weight) for linear in own):
            return layer
        plain += 1
        return layer_with(layer, _dense)

    made = replace(plan, layers=tuple(fitting(layer) for layer in plan.layers))
    if plain:
        notice("fallback", f"{plain} of {len(plan.layers)} layers are decoded densely: input sparsity needs thresholds "
               "in all linears of a layer, weights of 4 or 8 bits in groups of 32 or more, inputs in int8, and a "
               "decoder without experts", where=source)
    return made


def shapes_in(layer: Layer) -> tuple[tuple[int, int], ...]:
    """(out, in) of q, k, v, o, gate, up and down, as the session counts what they read; (0, 0) where there is none."""
    attention, ffn = layer.attention, layer.feed_forward
    parts: list[Linear | None] = [None] * 4 if attention is None else [attention.q, attention.k, attention.v,
                                                                       attention.o]
    parts += [ffn.gate, ffn.up, ffn.down] if isinstance(ffn, FeedForward) else [None] * 3
    return tuple((0, 0) if part is None else (part.weight.shape[0], part.weight.shape[1]) for part in parts)


def _linears(layer: Layer) -> list[Linear]:
    found: list[Linear] = []

    def seen(linear: Linear) -> Linear:
        found.append(linear)
        return linear

    layer_with(layer, seen)
    return found


def _runs(layer: Layer) -> bool:
    attention = layer.attention
    return (not isinstance(layer.feed_forward, Experts) and layer.order == "pre" and layer.cross is None
            and layer.rounding is None
            and (attention is None or (attention.policy.kind != "full" and attention.bias is None)))
