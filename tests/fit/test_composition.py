"""The search over pipelines: one seed, one result; killed, it goes on; never worse than bits alone; all is reported."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgewise import load
from edgewise.core.budget import Budget
from edgewise.core.errors import BudgetError, InvalidValueError, MissingExtraError, collect_notices
from edgewise.core.numbers import QuantFormat
from edgewise.core.report import Report
from edgewise.engine.loading import model_of
from edgewise.fit import compose, composition
from edgewise.fit.candidates import LADDER
from edgewise.fit.composed import front_of_trials
from edgewise.fit.composition import Space, ranked
from edgewise.fit.steps import PER_WEIGHT, PipelineStep
from edgewise.fit.trial import Trial
from edgewise.formats.folder import read_folder
from tiny_checkpoint import tiny_checkpoint

pytest.importorskip("optuna")
IDS = np.random.default_rng(0).integers(4, 260, 16_000).astype(np.int32)
MEMORY = 700_000


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def composed(budget=Budget(memory_bytes=MEMORY), **options):  # noqa: B008
    """(FitResult, notices)"""
    with collect_notices() as notices:
        result = compose(tiny_checkpoint(hidden=128, width=256), budget, text_from=IDS, threads=1, **{
            "context": 128, "trials": 6, "orders": 2, "methods": ("rtn",), **options})
    return result, notices


def table(result, title):
    return next(table for table in result.report.tables if table.title.startswith(title))


def scores(result):
    """What was measured of each trial but for its time."""
    return [(row[0], row[2], row[5]) for row in table(result, "Pareto").rows]


@pytest.mark.slow
def test_the_folder_is_what_was_chosen_and_the_report_tells_every_step(tmp_path):
    result, _ = composed(steps=("width", "sparsity", "bits"), out=tmp_path / "out", orders=3)
    model = load(tmp_path / "out", threads=1)
    assert model.memory.total_bytes == result.report["memory_bytes"] <= MEMORY
    ids = IDS[:100]
    assert np.array_equal(model.forward(ids), model_of(result.checkpoint, threads=1, cache=False).forward(ids))
    step = read_folder(tmp_path / "out").lineage[-1]
    assert (step.name, step.seed, step.config["trials"]) == ("compose", 0, 6)
    steps = table(result, "Steps of the chosen")
    assert len(steps.rows) == len(step.config["pipeline"])
    assert [row[1] for row in steps.rows[1:]] == [row[2] for row in steps.rows[:-1]]  # bytes before are those after
    assert steps.rows[-1][2] == model.memory.weights_bytes
    assert all(row[-1] > 0 for row in steps.rows)
    orders = table(result, "The same steps in other orders")
    assert len(orders.rows) == 2
    assert len({row[1] for row in orders.rows}) == 1
    assert [row[-1] for row in orders.rows].count("as searched") == 1
    beside = Report.from_json(json.loads((tmp_path / "out" / "fit.json").read_text()))
    assert beside.to_json() == result.report.to_json()
    assert (tmp_path / "out" / "fit.svg").read_text().count("<circle") == len(table(result, "Pareto").rows)
    assert Budget(memory_bytes=MEMORY).check(result.report) == ()


@pytest.mark.slow
def test_it_is_never_worse_than_bits_alone_on_the_text_of_the_search():
    result, _ = composed()
    rows = {row[5]: row for row in table(result, "Pareto").rows}
    (chosen,) = (row for row in rows.values() if row[4] == "chosen")
    assert chosen[2] <= rows["bits (rtn, per weight)"][2]
    assert chosen[2] == min(row[2] for row in rows.values() if row[0] <= MEMORY / 1e6)
    assert result.report["mean KL of bits alone"] >= 0


@pytest.mark.slow
def test_one_seed_one_result_and_another_seed_another():
    first, again, other = (composed(seed=seed, trials=9)[0] for seed in (1, 1, 2))
    assert scores(first) == scores(again)
    assert first.checkpoint.lineage == again.checkpoint.lineage
    assert scores(other) != scores(first)


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole, _ = composed(trials=9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    real, count = composition.Evaluator.trial, []

    def killed(self, pipeline):
        count.append(pipeline)
        if len(count) == 7:
            raise KeyboardInterrupt
        return real(self, pipeline)

    monkeypatch.setattr(composition.Evaluator, "trial", killed)
    with pytest.raises(KeyboardInterrupt):
        composed(trials=9)
    (log,) = (tmp_path / "other").rglob("trials.jsonl")
    with log.open("a") as file:
        file.write('{"params": {"use wid')  # what a kill leaves of a line
    result, notices = composed(trials=9, resume=True)
    assert len(count) == 7 + 3
    assert scores(result) == scores(whole)
    assert not [item for item in notices if "discarded" in item.message]
    _, notices = composed(trials=1)
    assert any("discarded" in item.message for item in notices)


@pytest.mark.slow
def test_an_impossible_budget_says_what_was_tried_and_how_much_is_needed(tmp_path):
    with pytest.raises(BudgetError, match=r"none of 4 pipelines keeps.*bits: .*the least memory is") as caught:
        composed(Budget(memory_bytes=200_000), trials=4, out=tmp_path / "out")
    assert "width > bits: " in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(BudgetError, match="quality"):
        composed(Budget(memory_bytes=MEMORY, quality=0.99999999), trials=2)


def test_a_step_that_fails_is_a_trial_with_a_reason(monkeypatch):
    monkeypatch.setitem(composition._SHARES, "width", {"sparsity": (0.99,), "method": ("units",)})
    result, _ = composed(steps=("width", "bits"), trials=3)
    missing = table(result, "Trials without a score")
    assert missing.rows[0][1] == "failed"
    assert "sparsity" in missing.rows[0][2]
    assert result.report["trials failed"] >= 1


@pytest.mark.slow
def test_a_quality_alone_takes_the_least_memory():
    result, _ = composed(Budget(quality=0.8), trials=4)
    assert result.report["quality"] >= 0.8
    chosen = next(row for row in table(result, "Pareto").rows if row[4] == "chosen")
    assert chosen[0] == min(row[0] for row in table(result, "Pareto").rows if not row[-1])


def test_without_bits_shapes_alone_are_searched():
    result, _ = composed(Budget(memory_bytes=10**8), steps=("width", "depth"), trials=4, orders=0)
    assert "bits" not in result.report["pipeline"]
    assert not any(table.title.startswith("The same steps") for table in result.report.tables)


def test_unusable_questions_are_refused(monkeypatch):
    for options, message in (({"steps": ("height",)}, "steps are of width"), ({"steps": ()}, "given none"),
                             ({"trials": 0}, "at least 1"), ({"workers": 0}, "at least 1"),
                             ({"orders": -1}, "at least 0")):
        with pytest.raises(InvalidValueError, match=message):
            composed(**options)
    with pytest.raises(InvalidValueError, match="needs a limit"):
        composed(Budget())
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"edgewise\[search\]"):
        composed()


# ---- what is proposed

SPACE = Space(("width", "depth", "rank", "sparsity", "bits"), 10, tuple(map(QuantFormat.parse, LADDER)), "gptq")


def test_places_order_the_steps_and_a_format_for_each_weight_is_only_last():
    def ask(places):
        def one(name, of):
            if name in places:
                return places[name]
            return of.choices[-1] if hasattr(of, "choices") else 0.5

        return one

    first = SPACE.proposed(ask({"use depth": False, "use rank": False, "place width": 0.9, "place sparsity": 0.2,
                                "place bits": 0.4}))
    assert [each.kind for each in first] == ["sparsity", "bits", "width"]
    assert first[1]["format"] == "int2/g32/fp16/min"
    last = SPACE.proposed(ask({f"use {kind}": False for kind in SPACE.kinds}))
    assert last == (PipelineStep("bits", (("format", PER_WEIGHT), ("method", "gptq"))),)


def test_the_first_trials_are_bits_alone_and_each_step_before_bits():
    found = [SPACE.proposed(lambda name, of, start=start: start[name]) for start in SPACE.starts()]
    assert [tuple(step.kind for step in pipeline) for pipeline in found] == [
        ("bits",), ("width", "bits"), ("depth", "bits"), ("rank", "bits"), ("sparsity", "bits")]
    assert all(pipeline[-1]["format"] == PER_WEIGHT for pipeline in found)
    assert SPACE.choices("depth")["sparsity"] == (0.1, 0.2)


def test_a_front_is_what_no_other_beats():
    trials = [Trial((), outcome, kl=kl, memory_bytes=size) for outcome, size, kl in (
        ("ok", 10, 0.5), ("ok", 12, 0.5), ("ok", 20, 0.1), ("over", 15, 0.3), ("failed", None, None))]
    assert [trial.memory_bytes for trial in front_of_trials(trials)] == [10, 15, 20]
    assert [trial.memory_bytes for trial in ranked(trials, Budget(memory_bytes=20))] == [20, 10, 12]
    assert [trial.memory_bytes for trial in ranked(trials, Budget(quality=0.5))] == [10, 12, 20]
