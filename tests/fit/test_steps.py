"""Each step does what its method does, keeps what earlier ones gave, and costs the same bytes in any order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgewise.core.errors import InvalidValueError, collect_notices
from edgewise.core.storage import Dense, Factored, QuantizedTensor, Sparse
from edgewise.engine.loading import model_of
from edgewise.fit.dispatch import Calibration
from edgewise.fit.prune import pruned
from edgewise.fit.pruners import pruner_of
from edgewise.fit.steps import PipelineStep, applied, form_after, form_at_start, key_of, pipeline_text
from tiny_checkpoint import tiny_checkpoint

RNG = np.random.default_rng(0)
SAMPLE = Calibration(RNG.integers(4, 260, (8, 128)).astype(np.int32), RNG.integers(4, 260, (2, 128)).astype(np.int32),
                     "ids", "x" * 64)
SOURCE = tiny_checkpoint(hidden=128, width=256)


def step(kind, **settings):
    return PipelineStep(kind, tuple(settings.items()))


WIDTH = step("width", method="units", sparsity=0.2)
DEPTH = step("depth", method="shortgpt", sparsity=0.5)
RANK = step("rank", method="svd-llm", share=0.8, where="all")
SPARSE = step("sparsity", method="wanda", where="feed_forward")
BITS = step("bits", method="gptq", format="int4/g32/fp16/min")


def run(*steps):
    made, form = SOURCE, form_at_start(SOURCE)
    with collect_notices() as notices:
        for each in steps:
            made, form = applied(made, form, each, SAMPLE, threads=1)
    assert not [item for item in notices if item.kind == "fallback"]
    return made


def weights(made):
    return {name: stored for name in made.tensors if "_proj" in name and (stored := made.tensors[name]) is not None}


def storage(stored):
    """The form of a weight, without its shape."""
    if isinstance(stored, Factored):
        return "factored", storage(stored.left), storage(stored.right)
    if isinstance(stored, Sparse):
        return "2:4", storage(stored.values)
    return str(stored.format.element.name) if isinstance(stored, QuantizedTensor) else stored.number.name


@pytest.mark.parametrize("kinds", [(RANK, SPARSE, BITS), (WIDTH, BITS), (WIDTH, RANK), (DEPTH, SPARSE, BITS)])
def test_the_same_steps_cost_the_same_bytes_in_any_order_and_lose_differently(kinds):
    ids = SAMPLE.check[0]
    exact = model_of(SOURCE, threads=1, cache=False).forward(ids)
    sizes, forms, errors = set(), set(), []
    for order in itertools.permutations(kinds):
        made = run(*order)
        sizes.add(made.nbytes)
        forms.add(str([storage(stored) for stored in weights(made).values()]))
        model = model_of(made, threads=1, cache=False)
        sizes.add(-model.memory.weights_bytes)
        errors.append(float(np.linalg.norm(model.forward(ids) - exact)))
    assert len(sizes) == 2
    assert len(forms) == 1
    if kinds != (DEPTH, SPARSE, BITS):  # which layer goes is the same here, and the others keep their weights
        assert len(set(errors)) > 1


def test_a_width_step_is_the_pruner():
    made = run(WIDTH)
    row = pruner_of("units")
    plain = pruned(SOURCE, row, row.settings({"sparsity": 0.2}), SAMPLE)
    assert all(np.array_equal(made.tensors[name].dense(), plain.tensors[name].dense()) for name in plain.tensors)


def test_where_says_which_weights():
    made = weights(run(step("rank", method="svd-llm", share=0.8, where="attention"), SPARSE))
    for name, stored in made.items():
        assert isinstance(stored, Sparse) == (".mlp." in name)
        assert isinstance(stored, Factored) == (".self_attn." in name)


def test_what_is_factored_is_thinned_out_and_rounded_in_its_factors():
    made = weights(run(RANK, step("sparsity", method="sparsegpt", where="all"), BITS))
    assert {storage(stored) for stored in made.values()} == {("factored", ("2:4", "uint4"), ("2:4", "uint4"))}


def test_a_layer_less_keeps_the_form_of_the_others():
    made = run(BITS, DEPTH)
    assert made.config["num_hidden_layers"] == 1
    assert all(isinstance(stored, QuantizedTensor) for stored in weights(made).values())


def test_later_floats_are_put_back_in_their_form():
    form = form_after(form_after(form_after(form_at_start(SOURCE), RANK), SPARSE), BITS)
    made = form.of(Dense(RNG.standard_normal((128, 256)).astype(np.float32)), "down")
    assert isinstance(made, Factored)
    assert isinstance(made.left, Sparse)
    assert isinstance(made.left.values, QuantizedTensor)
    assert form.of(made, "down").left is made.left
    assert isinstance(form.of(Dense(RNG.standard_normal((128, 128)).astype(np.float32)), "output").left,
                      QuantizedTensor)


def test_rounding_by_gptq_is_closer_than_to_nearest_in_any_form():
    ids = SAMPLE.check[0]
    for before in ((), (RANK,), (SPARSE,)):
        exact = model_of(run(*before), threads=1, cache=False).forward(ids)
        near, by_gptq = (np.linalg.norm(model_of(run(*before, step("bits", method=method, format="int3/g32/fp16/min")),
                                                 threads=1, cache=False).forward(ids) - exact)
                         for method in ("rtn", "gptq"))
        assert by_gptq < near


def test_a_step_that_cannot_be_says_why():
    with pytest.raises(InvalidValueError, match=r"q_proj.*128.*48|whole groups"):
        run(step("bits", method="rtn", format="int4/g48/fp16"))
    with pytest.raises(InvalidValueError, match="rtn or gptq"):
        run(step("bits", method="magic", format="int4/g32"))
    with pytest.raises(InvalidValueError, match="magnitude, wanda or sparsegpt"):
        run(step("sparsity", method="magic", where="all"))
    with pytest.raises(InvalidValueError, match="a step is one of width"):
        step("height")


def test_a_step_is_its_settings_whatever_their_order():
    assert step("width", method="units", sparsity=0.2) == step("width", sparsity=0.2, method="units")
    assert PipelineStep.from_json(RANK.to_json()) == RANK
    assert key_of((WIDTH, BITS)) != key_of((BITS, WIDTH))
    assert pipeline_text((WIDTH, BITS)) == "width > bits"
    assert RANK.label == "rank (svd-llm, 80 %)"
