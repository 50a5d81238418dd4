"""Temperature and clock from a fake sysfs tree."""

from __future__ import annotations

from edgewise.measure.thermal import thermal_state


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_hottest_zone_and_the_slowest_core(tmp_path):
    for i, milli in enumerate((41000, 67500)):
        write(tmp_path / f"class/thermal/thermal_zone{i}/temp", f"{milli}\n")
    for i, clock in enumerate((3_000_000, 1_500_000)):
        directory = tmp_path / f"devices/system/cpu/cpu{i}"
        write(directory / "cpufreq/scaling_cur_freq", str(clock))
        write(directory / "cpufreq/cpuinfo_max_freq", "3000000")
        write(directory / "thermal_throttle/package_throttle_count", "4")
    found = thermal_state(tmp_path)
    assert (found.celsius, found.clock_share, found.throttled, found.reason) == (67.5, 0.5, 4, "")


def test_what_is_not_there_is_told(tmp_path):
    write(tmp_path / "class/thermal/thermal_zone0/temp", "no number")
    found = thermal_state(tmp_path)
    assert (found.celsius, found.clock_share, found.throttled) == (None, None, None)
    assert "thermal zone" in found.reason
    assert "cpufreq" in found.reason
