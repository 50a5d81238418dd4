"""The thermal body against the exponential that it solves, and a governor that acts only when it must."""

from __future__ import annotations

import math

import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.cost.thermal import Body, sustain


@pytest.mark.parametrize("step_s", [0.1, 1.0, 7.0])
def test_constant_power_follows_the_exponential(step_s):
    body = Body(limit_c=1000.0)
    found = sustain([30.0] * 4, body, step_s=step_s)
    tau = body.resistance_k_per_w * body.capacity_j_per_k
    for run, celsius in enumerate(found.celsius, 1):
        rise = (body.idle_w + body.dynamic_w) * body.resistance_k_per_w
        assert celsius == pytest.approx(body.ambient_c + rise * (1 - math.exp(-30 * run / tau)))
    assert found.clocks == (pytest.approx(1.0),) * 4


def test_speed_drops_after_a_knee_and_temperature_stays_at_the_limit():
    body = Body()
    found = sustain([20.0] * 30, body)
    assert found.knee is not None
    assert found.knee > 0
    assert found.clocks[-1] < 0.8
    assert max(found.celsius) < body.limit_c + 1.0


def test_infinite_capacity_and_rest_take_the_knee_away():
    assert sustain([20.0] * 30, Body(capacity_j_per_k=math.inf)).knee is None
    assert sustain([20.0] * 30, Body(), cool_s=600.0).knee is None


def test_refusals():
    with pytest.raises(InvalidValueError, match="capacity"):
        Body(capacity_j_per_k=0.0)
