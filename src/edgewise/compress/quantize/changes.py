"""Each method as a change of a walk: from a group of linears and what they read to what replaces them.

A change is made by a function of the QuantFormat and the method's settings. What a method cannot be applied to (experts
see some of the tokens only, so that nothing is known about their inputs) is rounded to nearest, with a notice; routers
decide between experts and stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.quantize import awq as awq_method
from edgewise.compress.quantize import gptq as gptq_method
from edgewise.compress.quantize import llm_int8 as llm_int8_method
from edgewise.compress.quantize import lorc as lorc_method
from edgewise.compress.quantize import rtn as rtn_method
from edgewise.compress.quantize import smoothquant as smoothquant_method
from edgewise.compress.scales import rescaled, shared
from edgewise.compress.walk import Change, Group
from edgewise.core.errors import InvalidValueError, notice
from edgewise.core.numbers import QuantFormat
from edgewise.core.stats import InputStats
from edgewise.core.storage import Stored

__all__ = ["KEPT", "awq", "gptq", "importance_of", "llm_int8", "lorc", "rtn", "smoothquant"]

Float32 = NDArray[np.float32]
KEPT = re.compile(r"\.(router|gate|shared_expert_gate)\.weight$")
"""Weights of a layer that no method rounds: they choose between experts."""


def importance_of(stats: InputStats) -> NDArray[np.float64]:
    """Mean square of each input, (in,), positive: one that the sample never used still counts for something."""
    squares = stats.mean_square
    return np.asarray(squares + 1e-3 * squares.mean() + 1e-30)


def rtn(fmt: QuantFormat, config: rtn_method.Rtn) -> Change:
    """Round to nearest, each column's error weighed by its inputs where statistics are given."""
    def change(group: Group, tensors: Mapping[str, Stored], stats: InputStats | None) -> dict[str, Stored]:
        importance = None if stats is None else importance_of(stats)
        return _each(group, tensors, lambda weight: rtn_method.quantize_layer(weight, fmt, config,
                                                                              importance=importance))

    return change


def gptq(fmt: QuantFormat | Mapping[str, QuantFormat], config: gptq_method.Gptq) -> Change:
    """GPTQ. The linears of a group share the Hessian, and those of one format are worked on as one matrix.

    fmt: of all weights, or of each by name; one that is not named stays as it is.
    """
    def change(group: Group, tensors: Mapping[str, Stored], stats: InputStats | None) -> dict[str, Stored]:
        together: dict[QuantFormat, list[str]] = {}
        for name in group.names:
            wanted = fmt if isinstance(fmt, QuantFormat) else fmt.get(name)
            if wanted is not None and not KEPT.search(name):
                together.setdefault(wanted, []).append(name)
        made: dict[str, Stored] = {}
        for each, names in together.items():
            part = replace(group, names=tuple(names))
            if stats is None or stats.gram is None:
                made |= _rounded(part, tensors, each, "GPTQ")
            elif each.granularity.kind == "tensor":
                gram = stats.gram
                made |= _each(part, tensors,
                              lambda weight, each=each, gram=gram: gptq_method.quantize_layer(  # type: ignore[misc]
                                  weight, gram, each, config))
            else:
                made |= _stacked(part, tensors, stats.gram, each, config)
        return made

    return change


def _stacked(group: Group, tensors: Mapping[str, Stored], gram: NDArray[np.float64], fmt: QuantFormat,
             config: gptq_method.Gptq) -> dict[str, Stored]:
    names, weights = _weights(group, tensors)
    with _named(group):
        made = gptq_method.quantize_layer(np.concatenate(weights), gram, fmt, config)
    ends = np.cumsum([0, *(len(weight) for weight in weights)])
    return {name: made.rows(int(start), int(stop))
            for name, start, stop in zip(names, ends[:-1], ends[1:], strict=True)}


def awq(fmt: QuantFormat, config: awq_method.Awq) -> Change:
    """AWQ: scales where something upstream can take them, then clipping."""
    def change(group: Group, tensors: Mapping[str, Stored], stats: InputStats | None) -> dict[str, Stored]:
        if stats is None or stats.gram is None:
            return _rounded(group, tensors, fmt, "AWQ")
        gram = stats.gram
        names, weights = _weights(group, tensors)
        if not names:
            return {}
        made: dict[str, Stored] = {}
        if group.producer is not None and len(names) == len(group.names):
            with _named(group):
                scale, _ = awq_method.scales_of(weights, np.sqrt(stats.mean_square), gram, fmt, config,
                                                shared=lambda sizes: shared(sizes, group))
            made = dict(rescaled(group, tensors, scale))
            gram = gram / np.outer(scale, scale)
        scaled = {**tensors, **made} if made else tensors
        return {**made, **_each(group, scaled, lambda weight: awq_method.clipped_layer(weight, gram, fmt, config))}

    return change


def smoothquant(fmt: QuantFormat, config: smoothquant_method.SmoothQuant) -> Change:
    """SmoothQuant: the ranges of activations moved into the weights, which are then rounded to nearest."""
    def change(group: Group, tensors: Mapping[str, Stored], stats: InputStats | None) -> dict[str, Stored]:
        if stats is None:
            return _rounded(group, tensors, fmt, "SmoothQuant")
        names, weights = _weights(group, tensors)
        made: dict[str, Stored] = {}
        if group.producer is not None and names and len(names) == len(group.names) and (
                config.all_pairs or group.site in ("attention", "feed_forward")):
            with _named(group):
                scale = shared(smoothquant_method.scales_of(weights, stats.absmax, config), group)
            made = dict(rescaled(group, tensors, scale))
        plain = rtn_method.Rtn(search=False)
        scaled = {**tensors, **made} if made else tensors
        return {**made, **_each(group, scaled, lambda weight: rtn_method.quantize_layer(weight, fmt, plain))}

    return change


def llm_int8(fmt: QuantFormat, config: llm_int8_method.LlmInt8) -> Change:
    """LLM.int8(): outlier inputs apart, in half precision."""
    def change(group: Group, tensors: Mapping[str, Stored], stats: InputStats | None) -> dict[str, Stored]:
        if stats is None:
            return _rounded(group, tensors, fmt, "LLM.int8")
        peaks = stats.absmax
        return _each(group, tensors, lambda weight: llm_int8_method.quantize_layer(weight, peaks, fmt, config))

    return change


def lorc(fmt: QuantFormat, config: lorc_method.Lorc) -> Change:
    """LoRC: rounding, and its residual to a low rank."""
    def change(group: Group, tensors: Mapping[str, Stored], stats: InputStats | None) -> dict[str, Stored]:
        importance = None if stats is None else importance_of(stats)
        return _each(group, tensors, lambda weight: lorc_method.compensated(weight, fmt, config,
                                                                            importance=importance))

    return change


# ---- shared -------------------------------------------------------------------------------------------------------

def _weights(group: Group, tensors: Mapping[str, Stored]) -> tuple[list[str], list[Float32]]:
    """Names and values of the weights of a group that are rounded."""
    names = [name for name in group.names if not KEPT.search(name)]
    return names, [np.asarray(tensors[name].dense(), np.float32) for name in names]


def _each(group: Group, tensors: Mapping[str, Stored], method: Callable[[Float32], Stored]) -> dict[str, Stored]:
    made: dict[str, Stored] = {}
    for name, weight in zip(*_weights(group, tensors), strict=True):
        with _named(name):
            made[name] = method(weight)
    return made


def _rounded(group: Group, tensors: Mapping[str, Stored], fmt: QuantFormat, method: str) -> dict[str, Stored]:
    notice("fallback", f"nothing is known about the inputs of {group.names[0]}"
           f"{' and others' if len(group.names) > 1 else ''}, which {method} needs; rounded to nearest",
           where="quantize")
    return _each(group, tensors, lambda weight: rtn_method.quantize_layer(weight, fmt))


class _named:
    """An error inside the block says which weight it is about."""

    def __init__(self, what: object) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, InvalidValueError) and str(self._what) not in str(error):
            raise InvalidValueError(f"{self._what}: {error}") from error
