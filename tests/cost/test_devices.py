"""Device tables: every shipped number has a source; what is written is read back; wrong files say what is wrong."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from edgewise.core.device import Device, Link, Tier, Unit
from edgewise.core.errors import FormatError, SourceError
from edgewise.cost import devices


def test_the_handful_is_there():
    assert {"pi5", "pixel8", "iphone15pro", "jetson-orin-nano", "stm32f746", "cloud-x86-2core"} <= set(
        devices.list_devices())


@pytest.mark.parametrize("name", devices.list_devices())
def test_every_shipped_number_has_a_source_and_every_source_a_number(name):
    device = devices.load(name)
    numbers = device.numbers()
    assert numbers
    for path in numbers:
        assert device.source(path), f"{name}: {path} has no source"
    for path in device.sources:
        assert any(number == path or number.startswith(path + ".") for number in numbers), f"{name}: {path} is nothing"


@pytest.mark.parametrize("name", devices.list_devices())
def test_shipped_devices_can_be_priced(name):
    device = devices.load(name)
    assert device.tiers[0].capacity_bytes
    assert device.tiers[0].read_bytes_per_s
    assert all(unit.ops_per_s.get("int8") for unit in device.units)
    rates = [tier.read_bytes_per_s for tier in device.tiers if tier.read_bytes_per_s]
    assert rates == sorted(rates, reverse=True), "tiers go from the fastest to the slowest"


@pytest.mark.parametrize("suffix", [".toml", ".json"])
@pytest.mark.parametrize("name", devices.list_devices())
def test_round_trip_through_a_file(name, suffix, tmp_path):
    device = devices.load(name)
    path = tmp_path / f"copy{suffix}"
    devices.save(device, path)
    assert devices.load(path) == device


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=10)
positive = st.floats(1e-12, 1e18)
device_values = st.builds(
    Device, name=names, description=names, idle_w=st.none() | st.floats(0, 1e6),
    tiers=st.lists(st.builds(Tier, name=names, capacity_bytes=st.none() | st.integers(1, 2**50),
                             read_bytes_per_s=st.none() | positive, latency_s=st.none() | st.floats(0, 1)),
                   max_size=3, unique_by=lambda t: t.name).map(tuple),
    units=st.lists(st.builds(Unit, name=names, ops_per_s=st.dictionaries(names, positive, max_size=3),
                             cores=st.none() | st.integers(1, 64)), max_size=2, unique_by=lambda u: u.name).map(tuple),
    links=st.lists(st.builds(Link, name=names, bytes_per_s=st.none() | positive), max_size=1).map(tuple),
    sources=st.dictionaries(names, names, max_size=3))


@given(device=device_values)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_device_survives_toml(device, tmp_path):
    path = tmp_path / "d.toml"
    devices.save(device, path)
    assert devices.load(path) == device


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(SourceError, match=r"no device 'pi6'.*pi5.*edgewise device --out"):
        devices.load("pi6")


@pytest.mark.parametrize(("name", "text", "message"), [
    ("d.toml", "name = ", "not a readable table"),
    ("d.json", "[" * 100_000, "not a readable table"),
    ("d.toml", "name = 'x'\ncolour = 1", "unknown field 'colour'"),
    ("d.toml", "[[tiers]]\nname = 'ram'", "field 'name' is missing"),
    ("d.toml", "name = 'x'\n[[tiers]]\nname = 'ram'\ncapacity_bytes = -1", "positive"),
    ("d.toml", "name = 'x'\n[[units]]\nname = 'cpu'\nops_per_s = {int8 = 'fast'}", r"ops_per_s\.int8: expected float"),
    ("d.json", json.dumps([1]), "expected a table"),
    ("d.toml", "#" * 1_000_001, "at most 1,000,000 bytes"),
])
def test_wrong_files(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(FormatError, match=message) as caught:
        devices.load(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "d.toml"
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(FormatError, match="byte 8"):
        devices.load(path)
