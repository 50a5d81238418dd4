"""A trial says what each step cost and lost as the engine measures it, keeps the budget, and never raises."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from edgewise.core.budget import Budget
from edgewise.core.errors import collect_notices
from edgewise.core.numbers import QuantFormat
from edgewise.engine.loading import model_of
from edgewise.fit import fit
from edgewise.fit.candidates import LADDER
from edgewise.fit.memo import Memo
from edgewise.fit.sensitivity import sample_of
from edgewise.fit.steps import PER_WEIGHT, PipelineStep
from edgewise.fit.trial import Evaluator, Problem, Trial
from edgewise.measure.quality import kl_divergence
from tiny_checkpoint import tiny_checkpoint

IDS = np.random.default_rng(0).integers(4, 260, 16_000).astype(np.int32)
SOURCE = tiny_checkpoint(hidden=128, width=256)
MEMORY = 750_000


def step(kind, **settings):
    return PipelineStep(kind, tuple(settings.items()))


WIDTH = step("width", method="units", sparsity=0.2)
SPARSE = step("sparsity", method="wanda", where="feed_forward")
PER = step("bits", method="gptq", format=PER_WEIGHT)
INT4 = step("bits", method="gptq", format="int4/g32/fp16/min")


def problem_of(budget=Budget(memory_bytes=MEMORY), ids=IDS, **changes):  # noqa: B008
    sample = sample_of(ids, context=256, tokens=512, calibrated=8192)
    return replace(Problem(SOURCE, budget, sample, "ids", "x" * 64, tuple(map(QuantFormat.parse, LADDER)),
                           ("rtn", "gptq"), 128, 1), **changes)


@pytest.fixture
def evaluator(tmp_path):
    (tmp_path / "made").mkdir()
    return Evaluator(problem_of(), Memo(tmp_path / "made", 10**9))


def test_a_trial_measures_what_the_engine_answers(evaluator):
    with collect_notices():
        trial = evaluator.trial((WIDTH, SPARSE, PER))
        made, again = evaluator.made((WIDTH, SPARSE, PER))
    assert trial.outcome == "ok"
    assert trial == again
    model = model_of(made, threads=1, cache=False)
    assert model.memory.total_bytes <= trial.memory_bytes <= MEMORY
    assert (model.kv, model.context) == (trial.kv, trial.context) == (trial.kv, 128)
    source = model_of(SOURCE, threads=1, kv="bf16")
    slow = np.mean([kl_divergence(source.forward(ids), model.forward(ids)) for ids in evaluator.problem.sample.search])
    assert trial.kl == pytest.approx(slow, rel=1e-3)
    assert [cost.step for cost in trial.steps] == [WIDTH, SPARSE, PER]
    assert trial.steps[-1].weights_bytes == model.memory.weights_bytes < trial.steps[0].weights_bytes
    assert trial.steps[0].weights_bytes < evaluator.source_bytes[0]
    assert [cost.kl > 0 for cost in trial.steps] == [True] * 3
    assert trial.seconds == pytest.approx(sum(cost.seconds for cost in trial.steps))
    assert Trial.from_json(json.loads(json.dumps(trial.to_json()))) == trial


def test_bits_alone_are_what_fit_makes(evaluator):
    with collect_notices():
        made, trial = evaluator.made((PER,))
        plain = fit(SOURCE, Budget(memory_bytes=MEMORY), text_from=IDS, threads=1, context=128)
    assert trial.kl is not None
    assert made.lineage[-1].config["formats"] == plain.checkpoint.lineage[-1].config["formats"]
    assert all(np.array_equal(made.tensors[name].dense(), plain.checkpoint.tensors[name].dense())
               for name in made.tensors)


def test_what_pipelines_begin_with_is_made_once(evaluator, monkeypatch):
    first = evaluator.trial((WIDTH, SPARSE, INT4))
    asked = []
    import edgewise.fit.trial as room

    real = room.applied
    monkeypatch.setattr(room, "applied", lambda *given, **more: asked.append(given[2].kind) or real(*given, **more))
    second = evaluator.trial((WIDTH, SPARSE, PER))
    assert asked == []
    assert [cost.reused for cost in second.steps] == [True, True, False]
    assert second.steps[0].kl == first.steps[0].kl
    other = evaluator.trial((SPARSE, WIDTH, INT4))
    assert asked == ["sparsity", "width", "bits"]
    # Without what was kept the same comes out.
    fresh = Evaluator(evaluator.problem, Memo(evaluator.memo.folder, 0)).trial((SPARSE, WIDTH, INT4))
    assert fresh.kl == other.kl


def test_threads_of_a_blas_change_nothing(tmp_path):
    pipeline = (SPARSE, step("rank", method="svd-llm", share=0.9, where="feed_forward"),
                step("width", method="modegpt", sparsity=0.2))
    found = []
    for threads in (1, 2):
        (tmp_path / str(threads)).mkdir()
        with threadpool_limits(threads, "blas"), collect_notices():
            found.append(Evaluator(problem_of(), Memo(tmp_path / str(threads), 10**9)).trial(pipeline))
    assert len(found[0].steps) == len(pipeline), found[0].reason
    assert [cost.kl for cost in found[0].steps] == [cost.kl for cost in found[1].steps]


def test_over_the_budget_and_failures_are_outcomes_with_reasons(tmp_path, evaluator):
    (tmp_path / "small").mkdir()
    memo = Memo(tmp_path / "small", 10**9)
    over = Evaluator(problem_of(Budget(memory_bytes=100_000)), memo).trial((WIDTH, PER))
    assert over.outcome == "over"
    assert "the least memory is" in over.reason
    assert over.kl is None
    assert over.steps[0].step == WIDTH
    for pipeline, reason in (((PER, WIDTH), "last step"), ((step("width", method="magic", sparsity=0.1),), "no method"),
                             ((step("width", method="units", sparsity=0.99),), "sparsity"),
                             ((step("bits", method="rtn", format="int4/g48/fp16"),), "whole groups")):
        failed = evaluator.trial(pipeline)
        assert failed.outcome == "failed"
        assert reason in failed.reason
    short = Evaluator(problem_of(ids=IDS[:2600]), memo).trial((SPARSE, PER))
    assert short.outcome == "failed"
    assert "longer text" in short.reason


def test_a_quality_alone_takes_the_least_memory_that_it_allows(tmp_path):
    (tmp_path / "made").mkdir()
    memo, sizes = Memo(tmp_path / "made", 10**9), []
    for quality in (0.99, 0.8):
        trial = Evaluator(problem_of(Budget(quality=quality)), memo).trial((PER,))
        assert trial.outcome == "ok"
        assert math.exp(-trial.kl) >= quality
        sizes.append(trial.memory_bytes)
    assert sizes[1] < sizes[0]
    assert Evaluator(problem_of(Budget(quality=0.9999)), memo).trial((SPARSE, PER)).outcome == "over"


def test_a_problem_travels(tmp_path):
    problem = problem_of()
    problem.save(tmp_path)
    there = Problem.load(tmp_path, SOURCE, 1)
    assert there.key == problem.key
    assert np.array_equal(there.sample.calibration, problem.sample.calibration)
    assert replace(problem, context=64).key != problem.key
    assert replace(problem, threads=2).key == problem.key
