"""The runner on recipes made for the test: seeds, verdicts from numbers, files, resumption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgewise.core.errors import InvalidValueError, collect_notices, notice
from edgewise.core.recipe import Claim, Recipe
from edgewise.core.report import Quantity, Report
from edgewise.papers.methods import methods_markdown, widest
from edgewise.papers.runner import read_results, recipe_of, run_recipe, slugs, write_results
from edgewise.papers.verdicts import judge


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def toy(calls=None, fail_at=None):
    """Metrics: always 2, the seed itself, nothing, and with ablation 7."""
    def run(settings, seed, ablate):
        if seed == fail_at:
            raise RuntimeError("interrupted")
        if calls is not None:
            calls.append((dict(settings), seed, ablate))
        notice("info", f"seed {seed} ran")
        metrics = [Quantity("two", 2.0), Quantity("seed", float(seed)), Quantity("absent", None), Quantity("word", "x")]
        return Report("toy", tuple([*metrics, Quantity("off", 7.0)] if ablate else metrics))

    claims = (Claim("two is two", "Table 1", "two", 2.0), Claim("seeds are at most one", "§2", "seed", 1.0, "at-most"),
              Claim("two is three", "§3", "two", 3.0), Claim("absent rises", "§4", "absent", 1.0, "trend"),
              Claim("unheard of", "§5", "nothing", 1.0), Claim("off is large", "§6", "off", 5.0, "at-least", 0.0, True))
    return Recipe("arXiv:0", claims, {"smoke": {"n": 1}, "small": {"n": 5, "seeds": 3}}, seed=0, run=run, title="Toy")


def outcomes(report):
    return [verdict.outcome for verdict in report.verdicts]


def test_verdicts_follow_from_the_metrics_of_every_seed(tmp_path):
    calls = []
    report = run_recipe("toy", toy(calls), b"", scale="small")
    assert calls == [({"n": 5}, seed, False) for seed in (0, 1, 2)]
    assert outcomes(report) == ["reproduced", "partly", "not-reproduced", *["not-checkable"] * 3]
    assert "2 of 3 seeds agree" in report.verdicts[1].reason
    assert "could not be measured here" in report.verdicts[3].reason
    assert "does not measure" in report.verdicts[4].reason
    assert "--ablate" in report.verdicts[5].reason
    seed = next(q for q in report.quantities if q.name == "seed")
    assert (seed.value, seed.spread) == (1.0, (0.0, 2.0))
    claims = report.tables[0]
    assert claims.rows[1] == ("seeds are at most one", "§2", "seed", "at-most", 1.0, 0.0, 1.0, 0.0, 2.0, "partly")
    assert report.environment["command"] == "edgewise reproduce toy --scale small"
    assert [item.message for item in report.notices] == [f"seed {i} ran" for i in range(3)]


def test_ablation_is_measured_when_asked_for():
    report = run_recipe("toy", toy(), b"", scale="smoke", ablate=True, seed=4)
    assert outcomes(report)[5] == "reproduced"
    assert report["seed"] == 4.0
    assert report.environment["command"].endswith("--scale smoke --seed 4 --ablate")


@pytest.mark.parametrize(("kind", "value", "tolerance", "measured", "outcome"), [
    ("equal", 1.0, 0.1, [1.05, 0.95], "reproduced"), ("equal", 1.0, 0.1, [1.2, 1.0], "partly"),
    ("at-least", 3.0, 0.0, [2.0, 2.5], "not-reproduced"), ("order", 0.0, 0.5, [0.6], "reproduced"),
    ("order", 0.0, 0.5, [0.4], "not-reproduced"), ("trend", -1.0, 0.0, [-0.1, 0.1], "partly"),
    ("at-most", 3.0, 0.0, [None], "not-checkable"), ("at-most", 3.0, 0.0, [None, 2.0], "reproduced"),
    ("equal", 1.0, 0.1, [float("nan")], "not-reproduced"),
])
def test_judging(kind, value, tolerance, measured, outcome):
    claim = Claim("c", "w", "m", value, kind, tolerance)
    assert judge(claim, [{"m": m} for m in measured], ablated=False).verdict.outcome == outcome


def test_a_cause_stands_beside_what_does_not_hold_alone():
    holds, fails = (Claim("two", "§1", "two", said, why_not="Too few steps.") for said in (2.0, 3.0))
    assert "Too few steps." not in judge(holds, [{"two": 2.0}], ablated=False).verdict.reason
    assert judge(fails, [{"two": 2.0}], ablated=False).verdict.reason.endswith("agree. Too few steps.")


def test_an_interrupted_run_goes_on_where_it_stopped():
    calls = []
    with pytest.raises(RuntimeError):
        run_recipe("toy", toy(calls, fail_at=2), b"code", scale="small")
    with collect_notices() as notices:
        report = run_recipe("toy", toy(calls), b"code", scale="small")
    assert [seed for _, seed, _ in calls] == [0, 1, 2]
    assert sum("was run before" in item.message for item in notices) == 2
    assert [item.message for item in report.notices] == [f"seed {i} ran" for i in range(3)]
    calls.clear()
    run_recipe("toy", toy(calls), b"code", scale="small")
    assert len(calls) == 3  # what was complete is not kept


@pytest.mark.parametrize("change", ["code", "settings", "afresh", "ablate"])
def test_kept_runs_are_those_of_the_same_recipe(change):
    calls = []
    with pytest.raises(RuntimeError):
        run_recipe("toy", toy(calls, fail_at=2), b"code", scale="small")
    calls.clear()
    recipe = toy(calls)
    if change == "settings":
        recipe = replace(recipe, scales={"small": {"n": 6, "seeds": 3}})
    run_recipe("toy", recipe, b"other" if change == "code" else b"code", scale="small", resume=change != "afresh",
               ablate=change == "ablate")
    assert len(calls) == 3


def test_a_kept_file_that_is_damaged_is_run_again(tmp_path):
    calls = []
    with pytest.raises(RuntimeError):
        run_recipe("toy", toy(calls, fail_at=1), b"", scale="small")
    for path in (tmp_path / "cache").rglob("0.json"):
        path.write_text("{")
    with collect_notices() as notices:
        run_recipe("toy", toy(calls), b"", scale="small")
    assert any(item.kind == "ignored" for item in notices)
    assert [seed for _, seed, _ in calls] == [0, 0, 1, 2]


def test_files_hold_every_scale(tmp_path):
    out = tmp_path / "results"
    small = run_recipe("toy", toy(), b"", scale="small", out=out)
    run_recipe("toy", toy(), b"", scale="smoke", out=out)
    ablated = run_recipe("toy", toy(), b"", scale="small", ablate=True, out=out)
    found = read_results(out / "toy.json")
    assert found.keys() == {"smoke", "small", "small, ablated"}
    assert found["small"] == Report.from_json(small.to_json())
    assert widest(found) == ("small, ablated", Report.from_json(ablated.to_json()))
    data = json.loads((out / "toy.json").read_text())
    assert data["scales"]["small"]["seeds"] == 3
    text = (out / "toy.md").read_text()
    assert text.count("## Verdicts") == 3
    assert "two is three" in text


def test_a_file_that_is_no_result_is_left_alone(tmp_path):
    (tmp_path / "toy.json").write_text("[]")
    with pytest.raises(InvalidValueError, match="not a file of results"):
        write_results(tmp_path, "toy", toy(), run_recipe("toy", toy(), b"", scale="smoke"))
    assert (tmp_path / "toy.json").read_text() == "[]"


def test_a_result_names_no_directory_of_the_machine(tmp_path):
    recipe = toy()

    def run(settings, seed, ablate):
        notice("info", "read", where=str(tmp_path / "cache/edgewise/models/x"))
        return Report("toy", (Quantity("two", 2.0),), environment={"home": f"{Path.home()}/model", "rate": "1/2"})

    report = run_recipe("toy", replace(recipe, run=run), b"", scale="smoke", out=tmp_path / "out")
    assert report.notices[0].where == "CACHE/models/x"
    assert report.environment["home"] == "HOME/model"
    assert str(tmp_path) not in (tmp_path / "out/toy.json").read_text()


def test_refusals():
    with pytest.raises(InvalidValueError, match="no recipe"):
        recipe_of("perpetual-motion")
    with pytest.raises(InvalidValueError, match="no scale"):
        run_recipe("toy", toy(), b"", scale="paper")
    with pytest.raises(InvalidValueError, match="nothing to run"):
        run_recipe("toy", replace(toy(), run=None), b"", scale="smoke")


@pytest.mark.parametrize("slug", slugs())
def test_every_recipe_is_complete(slug):
    recipe = recipe_of(slug)
    assert recipe.title
    assert recipe.paper
    assert {"smoke", "small"} <= recipe.scales.keys()
    assert recipe.scales["small"].get("seeds", 1) >= 3
    assert any(claim.ablation for claim in recipe.claims), "a recipe has an ablation"
    assert len({claim.text for claim in recipe.claims}) == len(recipe.claims)
    named = {key for settings in recipe.scales.values() for key in settings} - {"seeds"}
    assert named <= recipe.sources.keys(), "every choice says where it comes from"


def test_results_are_of_recipes_and_fill_the_table(root, tmp_path):
    for path in (root / "docs/results").glob("*.json"):
        if "slug" in json.loads(path.read_text("utf-8")):
            assert path.stem in slugs()
    text = methods_markdown(root / "docs/results")
    assert all(f"| {slug} |" in text for slug in slugs())
    assert methods_markdown(tmp_path).count("no result yet") == len(slugs())


def test_the_method_table_is_up_to_date(root):
    assert (root / "docs/methods.md").read_text("utf-8") == methods_markdown(root / "docs/results"), (
        "run: python docs/methods.py")
