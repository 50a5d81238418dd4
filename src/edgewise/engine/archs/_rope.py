"""Rotary position embedding: the inverse frequencies that a configuration asks for, its scaling included.

Su et al., "RoFormer", arXiv:2104.09864, equation 15: theta_i = base^(-2i/d), i = 0 .. d/2 - 1.

    linear   theta / factor (Chen et al., "Extending Context Window", arXiv:2306.15595)
    llama3   theta / factor below low_freq_factor turns in the original context, theta above high_freq_factor turns,
             a line between the two (Llama 3.1)
    yarn     the same idea in units of dimensions, with an attention factor (Peng et al., arXiv:2309.00071, section 3)
    dynamic  theta up to max_position_embeddings; beyond, the base would grow with the length of the text. Keys in the
             cache are rotated once, so that would make a token's logits depend on how the text was cut into steps;
             the context therefore ends at max_position_embeddings, and a notice says so.

Computed in float64 and rounded once, where transformers rounds each step to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import FormatError, UnsupportedError, notice
from edgewise.engine.archs._reading import Config
from edgewise.engine.plan import Rope

__all__ = ["rope_of"]

Float64 = NDArray[np.float64]
Scaling = Callable[[Float64, float, Config, int, int], tuple[Float64, float]]
"""(theta, base, its section of the configuration, context, original context) -> scaled theta, attention factor."""


def rope_of(config: Config, head_dim: int, context: int, *, base: float = 10_000.0, base_key: str = "rope_theta",
            divisors: NDArray[np.float32] | None = None, source: str = "", partial: bool = False, scaled: bool = True,
            kind: str | None = None, older_names: Mapping[str, str] | None = None) -> Rope:
    """The rotary embedding of heads of `head_dim`. context: max_position_embeddings; base: the family's default.

    Reads `rope_scaling` and `rope_theta` (base_key), or `rope_parameters` which holds both; of that, the section `kind`
    where it has one per kind of layer. scaled: False leaves any scaling out.
    partial: the family may rotate part of a head (`partial_rotary_factor`).
    divisors: (head_dim / 2,), by which frequencies are divided on top of that. older_names: of kinds of scaling.
    """
    scaling, newer = _sections(config, kind, source) if scaled else (None, None)
    base = config.number(base_key, base, above=1.0)
    for section in (newer, scaling):
        if section is not None:
            base = section.number("rope_theta", base, above=1.0)
    name = "default"
    if scaling is not None:
        names = {**{known: known for known in (*_KINDS, "longrope")}, **(older_names or {})}
        name = scaling.choice("rope_type" if "rope_type" in scaling else "type", names, "default")
    dims = _rotary_dims(config, scaling, head_dim, partial, source)
    original = context
    if scaling is not None:
        original = config.integer("original_max_position_embeddings",
                                  scaling.integer("original_max_position_embeddings", context))
    theta = base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    if name == "longrope":
        assert scaling is not None
        return _longrope(theta, scaling, context, original)
    theta, factor = _KINDS[name](theta, base, scaling or config, context, original)
    if divisors is not None:
        if not (np.isfinite(divisors) & (divisors > 0)).all():
            raise FormatError("divisors of rotary frequencies are finite and positive; some are not",
                              path=source or None, tensor="rope_freqs.weight")
        theta = theta / divisors
    return Rope(theta.astype(np.float32), factor)


def _sections(config: Config, kind: str | None, source: str) -> tuple[Config | None, Config | None]:
    """The section that scales, and `rope_parameters` (or its part for this kind of layer)."""
    newer = config.section("rope_parameters")
    if kind is not None:
        newer = None if newer is None else newer.section(kind)
        return newer, newer
    scaling = config.section("rope_scaling") or newer
    if scaling is not None and scaling.nested():
        raise UnsupportedError(f"{source + ': ' if source else ''}the rotary parameters differ by kind of layer "
                               f"({', '.join(scaling.nested())}); this family has one kind")
    return scaling, newer


def _rotary_dims(config: Config, scaling: Config | None, head_dim: int, partial: bool, source: str) -> int:
    """How many dimensions of a head turn."""
    factor = config.number("partial_rotary_factor", 1.0)
    if scaling is not None:
        factor = scaling.number("partial_rotary_factor", factor)
    if factor != 1.0 and not partial:
        raise UnsupportedError(f"{source + ': ' if source else ''}partial_rotary_factor is {factor:g}; this family "
                               "rotates whole heads (1.0)")
    dims = int(head_dim * factor)
    if dims % 2 or not 0 < dims <= head_dim:
        raise FormatError(f"rotary heads have an even size; head_dim is {head_dim}"
                          + (f", of which {factor:g} turns" if factor != 1.0 else ""), path=source or None)
    return dims


def _longrope(theta: Float64, scaling: Config, context: int, original: int) -> Rope:
    factor = scaling.number("factor", context / original)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    attention = scaling.number("attention_factor", attention)
    short, long = ((theta / scaling.numbers(key, len(theta))).astype(np.float32)
                   for key in ("short_factor", "long_factor"))
    return Rope(short, attention, Rope(long, attention), original)


def _plain(theta: Float64, base: float, scaling: Config, context: int, original: int) -> tuple[Float64, float]:
    return theta, 1.0


def _linear(theta: Float64, base: float, scaling: Config, context: int, original: int) -> tuple[Float64, float]:
    return theta / scaling.number("factor"), 1.0


def _dynamic(theta: Float64, base: float, scaling: Config, context: int, original: int) -> tuple[Float64, float]:
    factor = scaling.number("factor")
    if factor != 1.0:
        notice("ignored", f"rotary scaling 'dynamic' with factor {factor:g} acts beyond {context} positions only; the "
                          f"context ends there", where="rope_scaling")
    return theta, 1.0


def _llama3(theta: Float64, base: float, scaling: Config, context: int, original: int) -> tuple[Float64, float]:
    factor = scaling.number("factor")
    low = scaling.number("low_freq_factor")
    high = scaling.number("high_freq_factor", above=low)
    turns = original * theta / (2 * math.pi)  # full turns within the original context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * theta / factor + keep * theta, 1.0


def _yarn(theta: Float64, base: float, scaling: Config, context: int, original: int) -> tuple[Float64, float]:
    factor = scaling.number("factor", context / original)
    dims = 2 * len(theta)

    def dimension(turns: float) -> float:
        """The dimension that makes that many turns within the original context."""
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(scaling.number("beta_fast", 32.0))
    high = dimension(scaling.number("beta_slow", 1.0))
    if scaling.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    interpolate = np.clip((np.arange(len(theta)) - low) / (high - low), 0.0, 1.0)
    theta = theta / factor * interpolate + theta * (1 - interpolate)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "attention_factor" in scaling:
        return theta, scaling.number("attention_factor")
    mscale, mscale_all = (scaling.number(key, 0.0, above=-1.0) for key in ("mscale", "mscale_all_dim"))
    if mscale and mscale_all:  # zero counts as absent, as in transformers
        return theta, magnitude(mscale) / magnitude(mscale_all)
    return theta, magnitude(1.0)


_KINDS: dict[str, Scaling] = {
    "default": _plain, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
