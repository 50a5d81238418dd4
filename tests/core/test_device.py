"""Devices are numbers with their sources, and go to JSON and back."""

from __future__ import annotations

import json

import pytest

from edgewise.core.device import Device, Link, Tier, Unit
from edgewise.core.errors import InvalidValueError

BOARD = Device(
    "board", (Tier("sram", 320_000, 1.6e9), Tier("flash", 1_000_000, 4e7, latency_s=1e-6, j_per_byte=1e-9)),
    (Unit("cpu", {"int8": 2e8, "fp32": 1e8}, {"int8": 1e-10}, cores=1, instructions="armv7e-m"),),
    (Link("uart", 11_520.0),), 0.05, "a board", {"tiers.sram": "datasheet", "idle_w": "measured", "units": "estimated"},
)


def test_json_round_trip():
    assert Device.from_json(json.loads(json.dumps(BOARD.to_json()))) == BOARD


def test_numbers_and_sources_by_path():
    numbers = BOARD.numbers()
    assert numbers["tiers.sram.capacity_bytes"] == 320_000
    assert numbers["units.cpu.ops_per_s.int8"] == 2e8
    assert numbers["idle_w"] == 0.05
    assert BOARD.source("tiers.sram.capacity_bytes") == "datasheet"
    assert BOARD.source("units.cpu.ops_per_s.int8") == "estimated"
    assert BOARD.source("tiers.flash.read_bytes_per_s") is None


def test_parts_by_name():
    assert BOARD.tier("flash").capacity_bytes == 1_000_000
    assert BOARD.unit("cpu").cores == 1
    assert BOARD.link("uart").bytes_per_s == 11_520
    with pytest.raises(InvalidValueError, match="no tier 'dram'; it has sram, flash"):
        BOARD.tier("dram")


@pytest.mark.parametrize(("data", "message"), [
    ({}, "Device: field 'name' is missing"),
    ({"name": "x", "colour": 1}, "Device: unknown field 'colour'"),
    ({"name": 3}, r"Device\.name: expected str; given 3"),
    ({"name": "x", "tiers": [{"name": "ram", "capacity_bytes": "8GB"}]},
     r"Device\.tiers\[0\]\.capacity_bytes: expected int; given '8GB'"),
    ({"name": "x", "tiers": {"ram": 1}}, r"Device\.tiers: expected a list"),
    ({"name": "x", "tiers": [{"name": "ram", "capacity_bytes": 0}]}, "positive"),
    ({"name": "x", "units": [{"name": "cpu", "ops_per_s": {"int8": -1}}]}, "positive"),
    ({"name": "x", "links": [{"name": "l", "latency_s": -1}]}, "not negative"),
    ({"name": "x", "tiers": [{"name": "a"}, {"name": "a"}]}, "two tiers of one name"),
    ({"name": "x", "idle_w": float("nan")}, "not negative"),
    ([], "Device: expected a table"),
])
def test_wrong_data_is_refused_with_its_path(data, message):
    with pytest.raises(InvalidValueError, match=message):
        Device.from_json(data)


def test_one_line_repr():
    assert repr(BOARD) == "Device(board: sram 3.2e+05 B, flash 1e+06 B; cpu)"
