"""T5, T5 1.1, mT5 and umT5 against `transformers`, on small random models."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import tiny_models
from reference import MUTATIONS, forward, mutations_of

from edgewise.core.errors import collect_notices
from edgewise.core.storage import Dense
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import model_of
from edgewise.engine.plan import RelativeBias
from edgewise.formats.ggml_blocks import encode

pytestmark = pytest.mark.slow

EXECUTOR, ENGINE = 1e-5, 2e-5  # of the largest logit, as for the other families
NAMES = list(tiny_models.ENCODER_DECODERS)


@lru_cache(maxsize=1)
def _case(name):
    """The model, ids of a text and of an answer, and the logits and states that transformers gives."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(2)
    model = tiny_models.build(name)
    ids = tiny_models.ids_of(model)
    answer = np.concatenate([[0], tiny_models.ids_of(model, 69, 2)])
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids)[None], decoder_input_ids=torch.tensor(answer)[None])
    return model, ids, answer, out.logits[0].numpy(), out.encoder_last_hidden_state[0].numpy()


def _miss(got, expected) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def _loaded(checkpoint, **options):
    with collect_notices():
        return model_of(checkpoint, cache=False, **{"kv": "fp32", "threads": 1, "context": 80, **options})


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (12, 20), (32, 1000), (16, 64), (32, 17), (6, 300)])
@pytest.mark.parametrize("both", [True, False])
def test_buckets_are_those_of_transformers(buckets, most, both):
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-2000, 2001)
    expected = T5Attention._relative_position_bucket(torch.tensor(distances), both, buckets, most).numpy()
    found = RelativeBias(np.zeros((buckets, 1), np.float32), most, both).buckets(distances)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_agrees_with_transformers_and_mistakes_do_not(name):
    model, ids, answer, logits, states = _case(name)
    with collect_notices() as notices:
        plan = plan_of(tiny_models.checkpoint_of(model))
    assert {n.kind for n in notices} <= {"info"}
    assert _miss(forward(plan.encoder, ids), states) < EXECUTOR
    assert _miss(forward(plan, ids, decoder_ids=answer), logits) < EXECUTOR
    wrong = mutations_of(plan)
    assert {"biases of other heads", "cross-attention scaled", "distances of one direction"} <= set(wrong)
    for mutation in wrong:
        found = forward(MUTATIONS[mutation](plan), ids, decoder_ids=answer)
        assert _miss(found, logits) > 20 * EXECUTOR, mutation
    for mutation in ("mask", "scale", "biases of other heads", "distances the other way", "feed-forward norm epsilon"):
        found = forward(MUTATIONS[mutation](plan.encoder), ids)
        assert _miss(found, states) > 20 * EXECUTOR, f"{mutation} of the encoder"


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    model, ids, answer, logits, states = _case(name)
    checkpoint = tiny_models.checkpoint_of(model)
    engine = _loaded(checkpoint)
    assert _miss(engine.states(ids), states) < ENGINE
    got = engine.forward(ids, answer)
    assert _miss(got, logits) < ENGINE
    for options in ({"batch": 1}, {"batch": 7, "threads": 2}, {"batch": 33, "threads": 3}):
        np.testing.assert_array_equal(_loaded(checkpoint, **options).forward(ids, answer), got, err_msg=str(options))


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_are_those_of_transformers(name):
    """With a penalty on what was said, so that a random model does not repeat one token for ever."""
    import torch

    model, ids, *_ = _case(name)
    engine = _loaded(tiny_models.checkpoint_of(model))
    model.generation_config.eos_token_id = None
    for penalty in (1.0, 1.6):
        expected = model.generate(torch.tensor(ids)[None], max_new_tokens=30, do_sample=False,
                                  repetition_penalty=penalty)[0].tolist()
        found = engine.generate([int(i) for i in ids], max_tokens=30, repetition_penalty=penalty).result().ids
        assert [0, *found] == expected
    assert len(set(found)) > 10


def test_weights_of_eight_bits_run():
    """Stored as Q8_0, tables of biases in float32: near to transformers, and nearer with float inputs."""
    model, ids, answer, logits, _ = _case("t5 1.1")
    checkpoint = tiny_models.checkpoint_of(model)
    quantised = replace(checkpoint, tensors={
        name: encode(tensor.dense(), "Q8_0") if len(tensor.shape) == 2 and "relative" not in name else tensor
        for name, tensor in checkpoint.tensors.items()})
    with collect_notices():
        plan = plan_of(quantised)
        expected = forward(plan, ids, decoder_ids=answer)
        usual = _miss(forward(plan, ids, decoder_ids=answer, activations="plan"), logits)
    assert 1e-3 < _miss(expected, logits) < usual
    exact = _loaded(quantised, activations="float32").forward(ids, answer)
    assert _miss(exact, expected) < ENGINE
    rounded = _loaded(quantised).forward(ids, answer)
    assert _miss(rounded, logits) < 1.5 * usual


@pytest.mark.parametrize("name", ["t5", "t5 1.1", "umt5"])
def test_the_folder_that_transformers_writes(name, tmp_path):
    from edgewise.formats import read_folder

    model, ids, answer, logits, _ = _case(name)
    checkpoint = read_folder(tiny_models.save(model, tmp_path / "model"))
    assert _miss(_loaded(checkpoint).forward(ids, answer), logits) < ENGINE


def test_the_folder_of_an_encoder_alone(tmp_path):
    import torch
    from transformers import T5EncoderModel

    from edgewise.formats import read_folder

    model, ids, *_ = _case("t5 1.1")
    alone = T5EncoderModel(deepcopy(model.config)).eval()
    alone.encoder.load_state_dict(model.encoder.state_dict())
    alone.shared.load_state_dict(model.shared.state_dict())
    with torch.no_grad():
        expected = alone(torch.tensor(ids)[None]).last_hidden_state[0].numpy()
    alone.save_pretrained(tmp_path / "alone", safe_serialization=True)
    engine = _loaded(read_folder(tmp_path / "alone"))
    assert engine.kind == "encoder"
    assert _miss(engine.states(ids), expected) < ENGINE


@pytest.mark.parametrize(("changes", "scaled"), [
    ({}, True), ({"tie_word_embeddings": True}, True), ({"tie_word_embeddings": False}, False),
    ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False)])
def test_older_and_newer_configurations_say_whether_logits_are_scaled(changes, scaled):
    checkpoint = tiny_models.checkpoint_of(_case("t5 1.1")[0])
    config = {k: v for k, v in checkpoint.config.items() if k not in ("tie_word_embeddings", "scale_decoder_outputs")}
    with collect_notices():
        plan = plan_of(replace(checkpoint, config={**config, **changes}))
    assert plan.logit_scale == (64**-0.5 if scaled else 1.0)
    assert isinstance(plan.head.weight, Dense)
    assert plan.head.weight is not plan.embedding.weight
