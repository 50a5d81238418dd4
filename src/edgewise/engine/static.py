"""Activations on grids that a model's folder fixes: which site of a plan each of them is, and what they ask of it.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
section 2; sites and widths as MobileQuant (EMNLP Findings 2024) has them, named as in core/activation.py.

A linear with a grid for its input multiplies codes of 8 bits with codes of its weight and adds them up in 32 bits:

    sum = SUM (w - w0)(x - x0) + b,   b = rint(bias / (s_w s_x))
    code = clamp(floor(sum m / 2^k + 1/2) + r + y0, 0, 2^bits - 1),   m / 2^k = s_w s_x / s_y

m has at most 31 bits, k is one number for all rows of the linear, and r = rint((bias - b s_w s_x) / s_y) is what a
fine output grid still sees of the bias. Rounding half up, the 31 bits, and r put a code at most one away from what a
division in floats and rounding to even would give. Attention does the same with query times key (times its own scale)
and probability times value; its exponentials, norms, rotations, and the functions of gates are made in float32 between
two grids, as the residual stream is, whose terms are codes of 16 bits times their scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgewise.core.activation import StaticActivation
from edgewise.core.errors import UnsupportedError, notice
from edgewise.core.storage import QuantizedTensor
from edgewise.engine.plan import FeedForward, Layer, Linear, Plan, Rounding

__all__ = ["with_static"]

Sites = Mapping[str, StaticActivation]
_BITS = (2, 3, 4, 8)
_ATTENTION = {"query": "self_attn.query", "key": "self_attn.key", "value": "self_attn.v_proj.output",
              "score": "self_attn.softmax_in", "probability": "self_attn.softmax_out",
              "attended": "self_attn.o_proj.input"}
_OTHERS = {"attention_in": "input_layernorm.input", "feed_forward_in": "post_attention_layernorm.input",
           "sigmoid": "mlp.sigmoid", "act": "mlp.act"}


def with_static(plan: Plan, sites: Sites) -> Plan:
    """The plan with every site on its grid. Raises UnsupportedError for what integers cannot run."""
    if not sites:
        return plan
    if plan.kind != "decoder":
        raise UnsupportedError(f"static activations run in decoders; {plan.arch} is an {plan.kind}")
    taken: set[str] = set()
    layers = tuple(_layer_with(layer, sites, taken) for layer in plan.layers)
    left = sorted(set(sites) - taken)
    if left:
        raise UnsupportedError(f"quantization_config.activations names {len(left)} sites that {plan.arch} does not "
                               f"have, the first {left[0]!r}; sites are those of core/activation.py")
    fixed = sum(name.endswith(".input") for name in taken)
    notice("info", f"static activations: {fixed} inputs, {len(taken)} sites in all, multiplied as integers",
           where="load")
    return replace(plan, layers=layers)


def _layer_with(layer: Layer, sites: Sites, taken: set[str]) -> Layer:
    attention, ffn = layer.attention, layer.feed_forward
    first = attention.q if attention is not None else layer.feed_forwards[0].up
    home = first.name.partition(".self_attn.")[0].partition(".mlp.")[0]
    if not any(name.startswith(f"{home}.") for name in sites):
        return layer
    if not isinstance(ffn, FeedForward) or attention is None or layer.order != "pre" or layer.cross is not None:
        raise UnsupportedError(f"{home}: static activations run in layers that have both parts, each normed before, "
                               "and no experts")

    def site(name: str) -> StaticActivation | None:
        found = sites.get(f"{home}.{name}")
        if found is not None:
            taken.add(f"{home}.{name}")
        return found

    def linear(source: Linear) -> Linear:
        path = source.name.removesuffix(".weight")
        given, result = sites.get(f"{path}.input"), sites.get(f"{path}.output")
        taken.update(name for name in (f"{path}.input", f"{path}.output") if name in sites)
        if given is None and result is None:
            return source
        if given is None:
            raise UnsupportedError(f"{path} has a grid for its output and none for its input, which integers need; "
                                   f"name {path}.input as well")
        if given.bits > 8:
            raise UnsupportedError(f"{path}.input has {given.bits} bits; the inputs of a linear have at most 8")
        weight = source.weight
        fmt = weight.format if isinstance(weight, QuantizedTensor) else None
        fits = (fmt is not None and fmt.element.kind == "int" and fmt.element.bits in _BITS and fmt.n_m is None
                and fmt.granularity.groups(weight.shape[1]) == 1 and fmt.zero != "min")
        if not fits:
            raise UnsupportedError(f"{path} has static activations, but its weight is {weight!r}: products of integers "
                                   "take 2, 3, 4 or 8 bits with one scale per row or per tensor, such as int4/axis or "
                                   "int8/tensor, with zero points or without; quantise it so, or drop its sites")
        return replace(source, activation="static", input=given, output=result)

    rounding = Rounding(**{name: site(at) for name, at in (_ATTENTION | _OTHERS).items()})
    parts = {name: getattr(rounding, name) for name in _ATTENTION}
    inside = {name for name in ("query", "key", "score", "probability") if parts[name] is not None}
    if inside and None in parts.values():
        lacking = next(_ATTENTION[name] for name, found in parts.items() if found is None)
        raise UnsupportedError(f"{home}.self_attn rounds {', '.join(sorted(inside))}, but {home}.{lacking} is not "
                               "named: attention is made of integers with all of its sites, or of floats with none")
    if not inside:
        rounding = replace(rounding, value=None, attended=None)
    if any(found is not None and found.bits > 8 for found in (rounding.query, rounding.key, rounding.value)):
        raise UnsupportedError(f"{home}.self_attn: query, key and value have at most 8 bits")
    if rounding.sigmoid is not None and ffn.function != "silu":
        raise UnsupportedError(f"{home}.mlp.sigmoid is a site of silu; the function here is {ffn.function}")
    attention = replace(attention, q=linear(attention.q), k=linear(attention.k), v=linear(attention.v),
                        o=linear(attention.o))
    ffn = replace(ffn, gate=None if ffn.gate is None else linear(ffn.gate), up=linear(ffn.up), down=linear(ffn.down))
    for group in ((attention.q, attention.k, attention.v), tuple(part for part in (ffn.gate, ffn.up) if part)):
        grids = {part.input for part in group}
        if len(grids) > 1:
            raise UnsupportedError(f"{', '.join(part.name.removesuffix('.weight') for part in group)} read one tensor; "
                                   f"their inputs have one grid, given {grids}")
    return replace(layer, attention=attention, feed_forward=ffn, rounding=rounding)
