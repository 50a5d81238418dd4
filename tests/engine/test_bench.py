"""The benchmark on a tiny model: what is run, what is counted, and where the joules come from. No time is asserted."""

from __future__ import annotations

import statistics

import pytest

from edgewise.core.device import Device, Tier, Unit
from edgewise.core.errors import ContextOverflowError, InvalidValueError, collect_notices
from edgewise.core.report import Report
from edgewise.engine.archs import plan_of
from edgewise.engine.bench import COLUMNS, BenchTest, Limits, bench, modelled_joules, time_tests
from edgewise.engine.loading import model_of
from edgewise.engine.workload import arithmetic, workload_of
from edgewise.measure.energy import EnergyMeter
from tiny_checkpoint import tiny_checkpoint, tiny_encoder

LIMITS = Limits(10e9, 400e9, 100e9)


def rows(report):
    table = report.tables[1]
    assert table.columns == COLUMNS
    return [dict(zip(COLUMNS, row, strict=True)) for row in table.rows]


def run(checkpoint=None, **options):
    settings = {"prompts": (16,), "generated": (4,), "threads": (1,), "repeats": 2, "limits": LIMITS, **options}
    with collect_notices() as notices:
        return bench(checkpoint or tiny_checkpoint(), **settings), notices


def test_rows_by_thread_count_depth_and_phase():
    report, _ = run(depths=(0, 32), threads=(1, 2))
    found = rows(report)
    assert [(row["threads"], row["test"]) for row in found] == [
        (threads, name) for threads in (1, 2) for name in ("pp16", "tg4", "pp16@32", "tg4@32")]
    assert all(row["low"] <= row["token/s"] <= row["high"] for row in found)
    model = dict(zip(report.tables[0].columns, report.tables[0].rows[0], strict=True))
    assert model["model"] == "tiny"
    assert model["kv"] == "fp16"
    assert Report.from_json(report.to_json()) == report


def test_bandwidth_and_shares_follow_from_the_speed():
    checkpoint = tiny_checkpoint()
    report, _ = run(checkpoint)
    prefill, decode = rows(report)
    plan, matrices = plan_of(checkpoint), model_of(checkpoint, threads=1, cache=False).packed.matrices
    step = workload_of(plan, matrices, depth=2)
    assert decode["GB/s"] == pytest.approx(decode["token/s"] * step.moved_bytes / 1e9)
    assert (decode["roof"], prefill["roof"]) == ("memory read", "fp32 peak")
    assert decode["share"] == pytest.approx(decode["GB/s"] * 1e9 / LIMITS.read_bytes_per_s)
    work = arithmetic(workload_of(plan, matrices, tokens=16))["fp32"]
    assert prefill["share"] == pytest.approx(prefill["token/s"] / 16 * work / LIMITS.fp32_ops_per_s)


def test_quantised_weights_are_held_against_the_integer_peak():
    prefill, _ = rows(run(format="int8/g32")[0])
    assert prefill["roof"] == "int8 peak"


def test_memory_is_told_apart():
    report, _ = run()
    assert report["peak memory"] >= report["anonymous memory"] > 0
    assert report["file pages"] > 0


class Session:
    """What `time_tests` asks of a session, written down."""

    def __init__(self) -> None:
        self.held, self.calls = 0, []

    def length(self, slot):
        return self.held

    def resumable(self, slot, length):
        return length

    def truncate(self, slot, length):
        assert length <= self.held
        self.held = length

    def prefill(self, slot, tokens):
        self.calls.append(("prefill", self.held, tuple(tokens)))
        self.held += len(tokens)

    def generate(self, slot, sampler, n, stop):
        self.calls.append(("generate", self.held, n))
        self.held += n - 1 if self.calls[-2][0] == "prefill" else n  # the token sampled last waits


def test_what_is_fed_is_what_is_counted():
    session, seen = Session(), []
    tests = [BenchTest("decode", 5, 8), BenchTest("prefill", 6)]
    timings = time_tests(session, 100, tests, repeats=2, warmup=1, after=lambda: seen.append(session.held))
    assert [len(t.seconds) for t in timings] == [2, 2]
    assert seen == [6, 14] * 3  # 8 of context, one that is sampled from, five fed
    first = session.calls[:4]
    assert [call[0] for call in first] == ["prefill", "prefill", "prefill", "generate"]
    prompt, context = first[0][2], first[1][2]
    # The prompt test held the first six tokens of the stream already; the context goes on from there.
    assert len(prompt) == 6
    assert first[1][1] + len(context) == 8
    assert session.calls[3:5] == [("generate", 9, 1), ("generate", 9, 5)]


def test_an_encoder_reads_prompts_only():
    report, notices = run(tiny_encoder(), depths=(0, 8))
    assert [row["test"] for row in rows(report)] == ["pp16"]
    assert any(item.kind == "ignored" and "encoder" in item.message for item in notices)


def test_a_counter_is_read(tmp_path):
    zone = tmp_path / "class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "energy_uj").write_text("1000")
    (zone / "max_energy_range_uj").write_text("10000000")

    class Ticking(EnergyMeter):
        def measure(self, call):
            def counted():
                call()
                (zone / "energy_uj").write_text(str(int((zone / "energy_uj").read_text()) + 8_000_000))

            return super().measure(counted)

    report, _ = run(meter=Ticking(tmp_path))
    prefill, decode = rows(report)
    assert (prefill["energy"], decode["energy"]) == ("measured", "measured")
    assert prefill["J/token"] == pytest.approx(8.0 / 16)
    assert decode["J/token"] == pytest.approx(8.0 / 4)


def test_without_a_counter_energy_is_unknown_and_the_reason_is_told(tmp_path):
    report, notices = run(meter=EnergyMeter(tmp_path))
    assert {(row["J/token"], row["energy"]) for row in rows(report)} == {(None, "unknown")}
    assert any("energy is unknown" in item.message and "RAPL" in item.message for item in notices)


def device(**changes):
    return Device(**{"name": "board", "tiers": (Tier("ram", j_per_byte=1e-10),),
                     "units": (Unit("cpu", j_per_op={"int8": 1e-12, "fp32": 4e-12}),), "idle_w": 2.0, **changes})


def test_a_device_table_models_energy_and_says_so(tmp_path):
    report, notices = run(meter=EnergyMeter(tmp_path), device=device())
    checkpoint = tiny_checkpoint()
    plan, matrices = plan_of(checkpoint), model_of(checkpoint, threads=1, cache=False).packed.matrices
    decode = rows(report)[1]
    step = workload_of(plan, matrices, depth=2)
    expected = 2.0 / decode["token/s"] + 1e-10 * step.moved_bytes + 4e-12 * 2 * step.macs
    assert (decode["energy"], decode["J/token"]) == ("modelled", pytest.approx(expected))
    assert any("energy is modelled" in item.message and "board" in item.message for item in notices)


@pytest.mark.parametrize("changes", [{"idle_w": None}, {"tiers": (Tier("ram"),)},
                                     {"units": (Unit("cpu", j_per_op={"int8": 1e-12}),)}])
def test_a_table_with_gaps_models_nothing(changes, tmp_path):
    report, notices = run(meter=EnergyMeter(tmp_path), device=device(**changes))
    assert {(row["J/token"], row["energy"]) for row in rows(report)} == {(None, "unknown")}
    assert any("has no" in item.message for item in notices)


def test_modelled_energy_splits_by_number_format():
    checkpoint = tiny_checkpoint()
    plan, matrices = plan_of(checkpoint), model_of(checkpoint, threads=1, cache=False).packed.matrices
    whole = workload_of(plan, matrices, int8=True)
    joules, _ = modelled_joules(whole, 0.5, device())
    work = arithmetic(whole)
    assert joules == pytest.approx(1.0 + 1e-10 * whole.moved_bytes + 1e-12 * work["int8"] + 4e-12 * work["fp32"])


def test_six_rounds_have_an_interval_and_fewer_the_range():
    class Meter(EnergyMeter):
        def __init__(self):
            super().__init__()
            self.seconds = iter([1.0, *[4 / speed for speed in (10, 20, 30, 40, 50, 60, 70)]])

        def measure(self, call):
            from edgewise.measure.energy import Energy

            call()
            return Energy(None, next(self.seconds), reason="a test")

    timing, = time_tests(Session(), 100, [BenchTest("prefill", 4)], repeats=7, warmup=1, meter=Meter())
    assert timing.speed.median == pytest.approx(40)
    assert timing.speed.interval == pytest.approx((10, 70))
    assert statistics.median(timing.seconds) == pytest.approx(0.1)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"prompts": (0,), "generated": ()}, InvalidValueError, "nothing to run"),
    ({"prompts": (300,)}, ContextOverflowError, "256"),
    ({"repeats": 0}, InvalidValueError, "repeats"),
    ({"depths": (-1,)}, InvalidValueError, "depth"),
])
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)
