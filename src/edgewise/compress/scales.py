"""Scales that move from what produces the inputs of a group to the group's weights, and leave its results as they are.

    y = W x = (W diag(s)) (x / s):  column j of W is multiplied by s_j, the producer's channel that it reads divided.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.walk import Group
from edgewise.core.errors import InvalidValueError, UnsupportedError
from edgewise.core.storage import Dense, Stored

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
    producer = np.asarray(tensors[group.producer].dense(), np.float64)
    made = {group.producer: producer / (by_channel if producer.ndim == 1 else by_channel[:, None])}
    bias = group.producer.removesuffix("weight") + "bias"
    if bias in tensors:
        made[bias] = np.asarray(tensors[bias].dense(), np.float64) / by_channel
    for name in group.names:
        made[name] = np.asarray(tensors[name].dense(), np.float64) * s
    return {name: Dense(values.astype(np.float32)) for name, values in made.items()}
