"""Every family in the native engine against `transformers`, on small random models; see test_archs.py for the plans."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
from reference import forward

from edgewise.core.errors import collect_notices
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import model_of
from edgewise.engine.memory import kv_bytes, scratch_bytes
from edgewise.engine.plan import for_context

pytestmark = pytest.mark.slow

TOLERANCE = 2e-5  # largest difference over the largest logit: both sides round each step to float32
NAMES = [name for name in tiny_models.DECODERS if not name.startswith(("llama", "mistral"))]


def loaded(checkpoint, **options):
    with collect_notices():
        return model_of(checkpoint, kv="fp32", cache=False,
                        **{"threads": 1, "context": tiny_models.POSITIONS, **options})


def _miss(got, expected) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", ["llama", *NAMES])
def test_logits_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(2)
    model = tiny_models.build(name)
    checkpoint = tiny_models.checkpoint_of(model)
    ids = tiny_models.ids_of(model)
    engine = loaded(checkpoint)
    got = engine.forward(ids)
    assert len(ids) >= 64
    assert _miss(got, tiny_models.torch_output(model, ids)) < TOLERANCE
    # The same bits whatever the batch and the number of threads.
    for options in ({"batch": 1}, {"batch": 7, "threads": 2}, {"batch": 33, "threads": 3}, {"batch": 1, "threads": 2}):
        np.testing.assert_array_equal(loaded(checkpoint, **options).forward(ids), got, err_msg=str(options))


@pytest.mark.parametrize("name", NAMES)
def test_quantised_weights_run_as_the_plan_says(name):
    """Requantised to 8 bits: the reference with the same rounding of weights and inputs is the judge."""
    model = tiny_models.build(name)
    checkpoint = tiny_models.checkpoint_of(model)
    ids = tiny_models.ids_of(model)
    engine = loaded(checkpoint, format="int8/g32/fp16", threads=2)
    from edgewise.core.numbers import QuantFormat
    from edgewise.engine.loading import requantised

    with collect_notices():
        plan = requantised(plan_of(checkpoint), QuantFormat.parse("int8/g32/fp16"))
        expected = forward(plan, ids, activations="plan")
    exact = forward(plan_of(checkpoint), ids)
    # Rounding of inputs is a step function: a difference in the last bit now and then moves one of them a whole step.
    assert _miss(engine.forward(ids), expected) < 0.25 * _miss(exact, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 20, 80])
def test_scratch_is_what_was_foretold(name, batch):
    checkpoint = tiny_models.checkpoint_of(tiny_models.build(name))
    engine = loaded(checkpoint, batch=batch, threads=2)
    with collect_notices():
        plan = for_context(plan_of(checkpoint), engine.context)
    assert engine.memory.scratch_bytes == scratch_bytes(plan, engine.context, batch, 2)
    assert engine.memory.kv_bytes == kv_bytes(plan, "fp32", engine.context)


def test_the_context_chooses_between_long_and_short_factors():
    """transformers looks at the length of the text, the engine at the context that it is loaded with."""
    model = tiny_models.build("phi3 long")  # short up to 64 positions
    checkpoint = tiny_models.checkpoint_of(model)
    ids = tiny_models.ids_of(model, 40)
    expected = tiny_models.torch_output(model, ids)
    assert _miss(loaded(checkpoint, context=64).forward(ids), expected) < TOLERANCE
    long = loaded(checkpoint, context=80).forward(ids)
    assert _miss(long, expected) > 1000 * TOLERANCE
    with collect_notices():
        assert _miss(long, forward(plan_of(checkpoint), ids, context=80)) < TOLERANCE


def test_parts_of_one_weight_are_packed_apart_and_share_its_statistics():
    checkpoint = tiny_models.checkpoint_of(tiny_models.build("phi3"))
    engine = loaded(checkpoint)
    stats = engine.calibrate([list(range(3, 60))])
    assert "model.layers.1.self_attn.qkv_proj.weight" in stats
    assert "model.layers.1.self_attn.qkv_proj.weight[64:96]" in engine.packed.matrices
    assert len(stats) == 3 * 4


def test_what_a_router_reads_is_captured_and_what_single_experts_see_is_not():
    """An expert sees some of the tokens only; its statistics would be of them."""
    checkpoint = tiny_models.checkpoint_of(tiny_models.build("qwen2 moe"))
    stats = loaded(checkpoint).calibrate([list(range(3, 60))])
    assert {"model.layers.0.mlp.gate.weight", "model.layers.0.mlp.shared_expert_gate.weight"} <= set(stats)
    assert not [name for name in stats if "experts." in name]


def test_a_token_alone_and_in_any_company_gets_the_same_bits():
    """Slots of several sequences in one pass: experts are grouped across them."""
    checkpoint = tiny_models.checkpoint_of(tiny_models.build("qwen2 moe"))
    texts = [tiny_models.ids_of(tiny_models.build("qwen2 moe"), 5, seed).astype(np.int32) for seed in range(4)]
    alone = [loaded(checkpoint).forward(ids)[-1] for ids in texts]
    engine = loaded(checkpoint, slots=4, threads=2, batch=20)
    tokens = np.concatenate(texts)
    engine.session.forward(tokens, np.repeat(np.arange(4, dtype=np.int32), 5))
    np.testing.assert_array_equal(engine.session.logits(np.arange(4, 20, 5, dtype=np.int32)), np.stack(alone))


def test_weights_of_every_kind_among_the_experts():
    """8-bit experts with a 16-bit and a 4-bit one between them: inputs of both kinds in one pass."""
    from dataclasses import replace

    from edgewise.core.numbers import FP16
    from edgewise.core.storage import Dense
    from edgewise.formats.ggml_blocks import encode

    checkpoint = tiny_models.checkpoint_of(tiny_models.build("mixtral"))
    tensors = dict(checkpoint.tensors)
    for name, tensor in tensors.items():
        if "experts." in name:
            values = tensor.dense()
            half = "experts.1." in name or name.endswith("0.w3.weight")
            tensors[name] = (Dense(values.astype(np.float16), FP16) if half
                             else encode(values, "Q4_0" if "experts.2." in name else "Q8_0"))
    mixed = replace(checkpoint, tensors=tensors)
    ids = tiny_models.ids_of(tiny_models.build("mixtral"))
    got = loaded(mixed).forward(ids)
    with collect_notices():
        exact, expected = forward(plan_of(mixed), ids), forward(plan_of(mixed), ids, activations="plan")
    assert _miss(got, expected) < 0.25 * _miss(exact, expected)
    np.testing.assert_array_equal(loaded(mixed, batch=1, threads=2).forward(ids), got)
