"""Energy counters on a made-up sysfs."""

from __future__ import annotations

import pytest

from edgewise.measure.energy import EnergyMeter


def rapl(root, name, energy, limit=1_000_000):
    zone = root / "class/powercap" / name
    zone.mkdir(parents=True)
    (zone / "energy_uj").write_text(f"{energy}\n")
    (zone / "max_energy_range_uj").write_text(f"{limit}\n")
    return zone / "energy_uj"


def battery(root, status="Discharging", **files):
    supply = root / "class/power_supply/BAT0"
    supply.mkdir(parents=True)
    for name, value in {"type": "Battery", "status": status, **files}.items():
        (supply / name).write_text(f"{value}\n")
    return supply


def test_packages_add_up_and_parts_do_not_count_twice(tmp_path):
    first, second = rapl(tmp_path, "intel-rapl:0", 100), rapl(tmp_path, "intel-rapl:1", 999_990)
    part = rapl(tmp_path, "intel-rapl:0:0", 5)

    def work():
        first.write_text("2600100")  # 2.6 J
        second.write_text("499990")  # wrapped: 500,001 µJ further
        part.write_text("9999")

    meter = EnergyMeter(tmp_path)
    assert (meter.source, meter.reason) == ("rapl", "")
    first_limit = first.parent / "max_energy_range_uj"
    first_limit.write_text("10000000")
    energy = EnergyMeter(tmp_path).measure(work)
    assert energy.joules == pytest.approx(2.6 + 0.500001)
    assert energy.source == "rapl"
    assert energy.seconds > 0


def test_battery_power_times_seconds(tmp_path):
    supply = battery(tmp_path, power_now=6_000_000)
    meter = EnergyMeter(tmp_path)
    assert (meter.source, meter.power_w()) == ("battery", 6.0)
    energy = meter.measure(lambda: (supply / "power_now").write_text("8000000"))
    assert energy.joules == pytest.approx(7.0 * energy.seconds)


def test_battery_of_current_and_voltage(tmp_path):
    battery(tmp_path, current_now=-500_000, voltage_now=4_000_000)
    assert EnergyMeter(tmp_path).power_w() == pytest.approx(2.0)


def test_charging_says_nothing_about_the_load(tmp_path):
    battery(tmp_path, status="Charging", power_now=6_000_000)
    energy = EnergyMeter(tmp_path).measure(lambda: None)
    assert energy.joules is None
    assert "charger" in energy.reason


def test_nothing_there_is_unknown_with_the_reason_and_the_call_still_runs(tmp_path):
    ran = []
    meter = EnergyMeter(tmp_path)
    energy = meter.measure(lambda: ran.append(1))
    assert ran == [1]
    assert (energy.joules, meter.source, meter.power_w()) == (None, "", None)
    assert "no RAPL counters" in energy.reason
    assert "no battery" in energy.reason


def test_unreadable_counters_are_unknown(tmp_path):
    counter = rapl(tmp_path, "intel-rapl:0", 1)
    counter.unlink()
    counter.mkdir()  # reading it fails whoever runs the tests
    meter = EnergyMeter(tmp_path)
    assert meter.source == ""
    assert "not readable" in meter.reason


def test_a_mains_supply_is_no_battery(tmp_path):
    battery(tmp_path, type="Mains", power_now=1)
    assert EnergyMeter(tmp_path).source == ""
