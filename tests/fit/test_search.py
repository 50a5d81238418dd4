"""fit: budgets are kept, what is written is what was measured, and what cannot be met is said with numbers."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from edgewise import load
from edgewise.compress.lowrank.factored import LowRank, factors_of
from edgewise.compress.prune.masks import Prune, by_magnitude, stored_of
from edgewise.core.budget import Budget
from edgewise.core.checkpoint import Step
from edgewise.core.errors import BudgetError, InvalidValueError, UnsupportedError, collect_notices
from edgewise.core.numbers import FP32
from edgewise.core.report import Report
from edgewise.core.storage import Factored, QuantizedTensor, Sparse
from edgewise.engine.loading import model_of
from edgewise.fit import fit, search
from edgewise.formats.folder import read_folder
from edgewise.measure.quality import divergence
from tiny_checkpoint import tiny_checkpoint, tiny_encoder

IDS = np.random.default_rng(1).integers(4, 260, 3000).astype(np.int32)
FORMATS = ("int8/g32", "int4/g32/fp16/min", "int2/g32/fp16/min")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tiny(**options):
    return tiny_checkpoint(hidden=96, width=192, heads=3, kv_heads=1, **options)


def fitted(budget, checkpoint=None, **options):
    """(FitResult, notices)"""
    with collect_notices() as notices:
        result = fit(checkpoint or tiny(), budget, text_from=IDS, threads=1, formats=FORMATS, **options)
    return result, notices


def parts(total: int) -> tuple[int, int]:
    """Weights of the tiny model as stored, and a budget that is `total` percent of weights, KV and scratch."""
    model = model_of(tiny(), threads=1)
    return model.memory.weights_bytes, model.memory.total_bytes * total // 100


@pytest.mark.parametrize("percent", [95, 70, 62])
def test_memory_is_kept_by_the_model_in_memory_and_from_its_folder(percent, tmp_path):
    _, memory = parts(percent)
    result, _ = fitted(Budget(memory_bytes=memory), out=tmp_path / "out")
    model = load(tmp_path / "out", threads=1)
    assert model.memory.total_bytes <= memory
    assert result.report["memory_bytes"] == model.memory.total_bytes
    assert 0 < result.report["quality"] <= 1
    assert Budget(memory_bytes=memory).check(result.report) == ()


def test_the_folder_answers_as_the_model_in_memory_to_the_bit(tmp_path):
    result, _ = fitted(Budget(memory_bytes=parts(65)[1]), out=tmp_path / "out")
    ids = IDS[:100]
    here, there = model_of(result.checkpoint, threads=1), load(tmp_path / "out", threads=1)
    assert (there.kv, there.context) == (here.kv, here.context)
    assert np.array_equal(here.forward(ids), there.forward(ids))
    source = model_of(tiny(), threads=1)
    assert not np.array_equal(source.forward(ids), there.forward(ids))


def test_the_source_is_not_changed():
    checkpoint = tiny()
    before = {name: tensor.dense().copy() for name, tensor in checkpoint.tensors.items()}
    fitted(Budget(memory_bytes=parts(65)[1]), checkpoint)
    assert all(np.array_equal(checkpoint.tensors[name].dense(), values) for name, values in before.items())


def test_the_same_question_has_the_same_answer():
    answers = [fitted(Budget(memory_bytes=parts(62)[1]))[0].checkpoint.lineage for _ in range(2)]
    assert answers[0] == answers[1]


def test_quality_alone_takes_the_least_memory_that_reaches_it():
    sizes = []
    for quality in (0.99, 0.9, 0.5):
        result, _ = fitted(Budget(quality=quality))
        assert result.report["quality"] >= quality
        sizes.append(result.report["memory_bytes"])
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[2]


def test_reported_quality_is_that_of_the_model():
    result, _ = fitted(Budget(memory_bytes=parts(60)[1]))
    source, model = model_of(tiny(), threads=1, kv="bf16"), model_of(result.checkpoint, threads=1)
    low, high = result.report.quantities[0].spread
    assert low <= result.report["quality"] <= high
    with collect_notices():
        apart = divergence(source.forward, model.forward, IDS, window=128)
    assert 0.3 * apart.kl < -np.log(result.report["quality"]) < 3 * apart.kl


def test_storage_is_kept_by_the_folder(tmp_path):
    storage = 260_000
    result, _ = fitted(Budget(storage_bytes=storage), out=tmp_path / "out")
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    assert result.report["storage_bytes"] <= storage
    reports = sum((tmp_path / "out" / name).stat().st_size for name in ("fit.json", "fit.svg"))
    assert on_disk - reports == result.report["storage_bytes"]


def test_an_impossible_memory_names_the_smallest_that_is_possible():
    with pytest.raises(BudgetError, match="least memory") as caught:
        fitted(Budget(memory_bytes=100_000))
    least = float(re.search(r"least memory is ([\d.]+) MB", str(caught.value))[1])
    result, notices = fitted(Budget(memory_bytes=round(least * 1e6) + 50_000))
    assert result.report["memory_bytes"] <= least * 1e6 + 50_000
    del notices


def test_an_impossible_quality_says_what_was_reached():
    with pytest.raises(BudgetError, match=r"reaches quality 0\.\d+, measured"):
        fitted(Budget(memory_bytes=parts(60)[1], quality=0.9999999))


def test_an_impossible_storage_names_the_smallest():
    with pytest.raises(BudgetError, match="least storage is"):
        fitted(Budget(storage_bytes=1000))


def test_context_is_kept_and_clamped():
    result, _ = fitted(Budget(memory_bytes=parts(80)[1]), context=96)
    assert result.checkpoint.config["edgewise_run"]["context"] == 96
    assert model_of(result.checkpoint, threads=1).context == 96
    result, notices = fitted(Budget(memory_bytes=parts(99)[1]), context=1000)
    assert result.checkpoint.config["edgewise_run"]["context"] == 256
    assert any(item.kind == "clamp" and "256 positions" in item.message for item in notices)


def test_what_a_user_asks_for_at_load_wins(tmp_path):
    fitted(Budget(memory_bytes=parts(80)[1]), context=64, out=tmp_path / "out")
    assert load(tmp_path / "out", threads=1).context == 64
    assert load(tmp_path / "out", threads=1, context=128).context == 128
    assert load(tmp_path / "out", threads=1, kv="fp32").kv == "fp32"


def test_lineage_tells_formats_and_text(tmp_path):
    result, _ = fitted(Budget(memory_bytes=parts(65)[1]), out=tmp_path / "out")
    step = read_folder(tmp_path / "out").lineage[-1]
    assert step.name == "fit"
    kinds = ("query", "key", "value", "output", "gate", "up", "down")
    assert step.config["formats"].keys() == {"embedding", *(f"{layer} {kind}" for layer in (0, 1) for kind in kinds)}
    assert step.config["method"] == "rtn"  # the text is too short for another
    assert len(step.config["text_sha256"]) == 64
    assert step == result.checkpoint.lineage[-1]


def test_reports_lie_beside_the_model_and_the_folder_can_be_made_again(tmp_path):
    for _ in range(2):
        result, _ = fitted(Budget(memory_bytes=parts(65)[1]), out=tmp_path / "out")
    data = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert Report.from_json(data).to_json() == result.report.to_json()
    svg = (tmp_path / "out" / "fit.svg").read_text()
    assert svg.startswith("<svg")
    assert "Pareto" in svg
    assert [table.title.split(",")[0].split(" at")[0] for table in result.report.tables] == [
        "Before and after", "Formats by class", "Format of every weight", "Pareto front"]
    assert sum(row[-1] == "chosen" for row in result.report.tables[3].rows) == 1


def test_a_foreign_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidValueError, match=r"thesis\.txt"):
        fitted(Budget(memory_bytes=1), out=tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_full_search_measures_every_weight(monkeypatch):
    asked = []
    real = search.rates_of
    monkeypatch.setattr(search, "rates_of", lambda *given: asked.append(len(given[2])) or real(*given))
    for kind in ("quick", "full"):
        result, _ = fitted(Budget(memory_bytes=parts(65)[1]), tiny(layers=6), search=kind)
        assert len(result.report.tables[2].rows) == 7
    assert asked == [1 + 7 * 5, 1 + 7 * 6]


LONG = np.random.default_rng(2).integers(4, 260, 20_000).astype(np.int32)


def few_bits(methods, **options):
    with collect_notices() as notices:
        result = fit(tiny(), Budget(memory_bytes=parts(60)[1]), text_from=LONG, threads=1, formats=(
            "int3/g32/fp16/min", "int2/g32/fp16/min"), methods=methods, **options)
    return result, notices


def test_gptq_is_tried_and_kept_where_it_is_closer():
    off, _ = few_bits(("rtn",))
    on, _ = few_bits(("rtn", "gptq"))
    assert off.report["method"] == "rounding to nearest"
    assert on.report["method"].startswith("GPTQ: KL ")
    assert on.checkpoint.lineage[-1].config["method"] == "gptq"
    assert on.report["memory_bytes"] == off.report["memory_bytes"]
    assert on.report["quality"] > off.report["quality"]
    for name, stored in off.checkpoint.tensors.items():
        assert getattr(stored, "format", None) == getattr(on.checkpoint.tensors[name], "format", None)


def test_gptq_is_left_where_rounding_is_closer(monkeypatch):
    off, _ = few_bits(("rtn",))

    def worse(checkpoint, formats, windows, threads, progress):
        return {name: QuantizedTensor(np.zeros_like(made.codes), made.scales, made.format, minima=made.minima)
                for name, made in ((name, off.checkpoint.tensors[name]) for name in formats)}

    monkeypatch.setattr(search, "by_gptq", worse)
    on, _ = few_bits(("rtn", "gptq"))
    assert on.report["method"].startswith("rounding to nearest: KL ")
    assert on.report["quality"] == off.report["quality"]


def test_the_choice_is_within_its_bound_and_predictions_are_stated():
    result, _ = few_bits(("rtn",))
    assert result.report["allocation"] == "exact"
    assert result.report["quality predicted"] <= result.report["quality bound"] <= 1
    assert result.report["memory predicted"] == result.report["memory_bytes"]
    assert result.report["tokens_per_s predicted"] > 0


def test_unusable_questions_are_refused():
    with pytest.raises(InvalidValueError, match="needs a limit"):
        fitted(Budget())
    with pytest.raises(InvalidValueError, match="given also joules"):
        fitted(Budget(memory_bytes=10, joules=1.0))
    with pytest.raises(InvalidValueError, match="methods are rtn, or rtn and gptq; given gptq"):
        fitted(Budget(memory_bytes=10), methods=("gptq",))
    with pytest.raises(InvalidValueError, match="search is quick or full"):
        fitted(Budget(memory_bytes=10), search="deep")
    with pytest.raises(InvalidValueError, match="at least one position"):
        fitted(Budget(memory_bytes=10), context=0)
    with pytest.raises(UnsupportedError, match="encoder"):
        fitted(Budget(memory_bytes=10), tiny_encoder())


def test_a_text_is_known_by_its_hash(tmp_path):
    (tmp_path / "text.txt").write_text("A leaf is a part of a plant. " * 100)
    with collect_notices():
        result = fit(tiny(), Budget(memory_bytes=parts(80)[1]), text_from=str(tmp_path / "text.txt"), threads=1,
                     formats=FORMATS)
    assert "SHA-256" in result.report["text"]
    assert "text.txt" in result.report["text"]


def shaped():
    """Factored attention, and two of four weights elsewhere."""
    source = tiny_checkpoint(hidden=128, width=256)
    tensors = dict(source.tensors)
    for name, stored in source.tensors.items():
        if "self_attn.q_proj" in name or "o_proj" in name:
            tensors[name] = factors_of(stored.dense(), None, LowRank(0.8))
        elif ".mlp." in name:
            tensors[name] = stored_of(*by_magnitude(stored.dense(), Prune(pattern="2:4")), "2:4", FP32)
    return source.with_tensors(tensors, Step("shaped"))


@pytest.mark.parametrize("methods", [("rtn",), ("rtn", "gptq")])
def test_a_model_of_factors_and_kept_values_is_fitted_in_its_parts(methods, tmp_path):
    source = shaped()
    storage = source.nbytes * 15 // 100 + search.beside_bytes(source)
    with collect_notices():
        result = fit(source, Budget(storage_bytes=storage), text_from=LONG, threads=1, out=tmp_path / "out",
                     methods=methods)
    model = load(tmp_path / "out", threads=1)
    assert result.report["storage_bytes"] <= storage
    ids = IDS[:100]
    assert np.array_equal(model.forward(ids), model_of(result.checkpoint, threads=1, cache=False).forward(ids))
    product = result.checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(product, Factored)
    assert isinstance(product.left, QuantizedTensor)
    kept = result.checkpoint.tensors["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(kept, Sparse)
    assert isinstance(kept.values, QuantizedTensor)
    assert np.array_equal(kept.index, source.tensors["model.layers.0.mlp.down_proj.weight"].index)
