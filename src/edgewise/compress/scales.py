"""Scales that move from what produces the inputs of a group to the group's weights, and leave its results as they are.

    y = W x = (W diag(s)) (x / s):  column j of W is multiplied by s_j, the producer's channel that it reads divided.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.walk import Group
from edgewise.core.errors import InvalidValueError, UnsupportedError
from edgewise.core.numbers import NumberFormat, round_to
from edgewise.core.storage import Dense, QuantizedTensor, Stored

__all__ = ["rescaled", "shared"]


def shared(values: NDArray[np.float64], group: Group) -> NDArray[np.float64]:
    """(in,) -> (in,): the largest value among the inputs that come from one channel, for each of them."""
    if group.origin is None:
        return values
    top = np.full(int(group.origin.max()) + 1, -np.inf)
    np.maximum.at(top, group.origin, values)
    return np.asarray(top[group.origin], np.float64)


def rescaled(group: Group, tensors: Mapping[str, Stored], scale: NDArray[np.floating]) -> dict[str, Stored]:
    """The group's weights with columns times `scale`, the producer and its bias over it, as float32.

    A producer that is quantised already, with scales of its own in each row, stays so: its scales are divided.
    scale: (in,) positive, the same for inputs that come from one channel of the producer.
    """
    s = np.asarray(scale, np.float64)
    if group.producer is None or group.origin is None:
        raise UnsupportedError(f"{group} has no producer that a scale could be taken from")
    if s.shape != group.origin.shape or not (np.isfinite(s).all() and (s > 0).all()):
        raise InvalidValueError(f"scales of {group} are {group.origin.shape} positive numbers; given shape {s.shape} "
                                f"from {s.min(initial=np.inf):.3g} to {s.max(initial=-np.inf):.3g}")
    by_channel = np.ones(tensors[group.producer].shape[0])
    by_channel[group.origin] = s
    if not np.array_equal(by_channel[group.origin], s):
        raise InvalidValueError(f"scales of {group} differ between inputs that come from one channel")
    made: dict[str, NDArray[np.float64]] = {}
    source, kept = tensors[group.producer], dict[str, Stored]()
    if isinstance(source, QuantizedTensor) and source.format.granularity.kind != "tensor":
        kept[group.producer] = _divided(source, by_channel)
    else:
        producer = np.asarray(source.dense(), np.float64)
        made[group.producer] = producer / (by_channel if producer.ndim == 1 else by_channel[:, None])
    bias = group.producer.removesuffix("weight") + "bias"
    if bias in tensors:
        made[bias] = np.asarray(tensors[bias].dense(), np.float64) / by_channel
    for name in group.names:
        made[name] = np.asarray(tensors[name].dense(), np.float64) * s
    return {**kept, **{name: Dense(values.astype(np.float32)) for name, values in made.items()}}


def _divided(source: QuantizedTensor, by: NDArray[np.float64]) -> QuantizedTensor:
    """Rows over `by`, (out,): the codes stay, since a row's rounding does not depend on its size."""
    number = source.format.scale
    if not isinstance(number, NumberFormat) or (number.kind == "float" and number.mantissa_bits == 0):
        raise UnsupportedError(f"scales in {number} cannot be divided; take a format with fp16 scales, such as "
                               "int4/g32/fp16")

    def over(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return round_to((values / by[:, None]).astype(np.float32), number)

    return QuantizedTensor(source.codes, over(source.scales), source.format, zeros=source.zeros,
                           minima=None if source.minima is None else over(source.minima))
