"""R-Sparse on a model: through a folder into the engine, the share that is read, the search, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.lowrank.r_sparse import RSparse
from edgewise.core.errors import InvalidValueError, UnsupportedError, collect_notices
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import InputSparse, QuantizedTensor
from edgewise.engine.bench import bench
from edgewise.engine.loading import load, model_of
from edgewise.engine.r_sparse import decoded_perplexity, prepare, quantize, search, with_alphas
from edgewise.fit import quantize as quantize_model
from edgewise.formats.folder import read_folder
from tiny_checkpoint import tiny_checkpoint, tiny_encoder

INT4 = QuantFormat.parse("int4/g32/fp16/min")
TEXT = np.random.default_rng(0).integers(4, 260, 6000)
LINEAR = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def source():
    return tiny_checkpoint(context=512)


def test_a_folder_that_the_engine_decodes_sparsely(source, tmp_path):
    with collect_notices():
        report = quantize_model(source, "r-sparse", out=tmp_path / "m", calibrate=TEXT, windows=4, threads=1,
                                settings={"alpha": "0.9", "tokens": "256"})
    assert report["inputs read"] == pytest.approx(0.45, abs=0.05)
    assert 0 < report["quality"] < 1
    made = read_folder(tmp_path / "m")
    stored = made.tensors[LINEAR]
    assert isinstance(stored, InputSparse)
    assert isinstance(stored.weight, QuantizedTensor)
    assert stored.weight.format == INT4
    assert stored.low_rank is not None
    model = load(tmp_path / "m", threads=1)
    assert model.input_sparse
    assert model.inputs_read() is None
    ids = model.generate([5, 6, 7], max_tokens=9, ignore_eos=True).result().ids
    assert len(ids) == 9
    share = model.inputs_read()
    assert share == pytest.approx(0.45, abs=0.1)
    dense = load(tmp_path / "m", threads=1, input_sparsity=False)
    assert not dense.input_sparse
    # A prompt reads everything: it is the model without thresholds.
    assert np.array_equal(model.forward(TEXT[:40]), dense.forward(TEXT[:40]))
    with collect_notices():
        told = bench(tmp_path / "m", prompts=[16], generated=[8], repeats=1, warmup=0, threads=[1])
    assert told["weights read by a decoded token, 1 thread"] == pytest.approx(0.45, abs=0.1)


def test_how_much_is_read_follows_the_sparsity(source):
    prepared = prepare(source, TEXT[:300], INT4, RSparse(tokens=256))
    found = []
    for sparsity in (0.3, 0.5, 0.7):
        config = RSparse(sparsity=sparsity, alpha=1.0)
        model = model_of(with_alphas(prepared, dict.fromkeys(prepared.inputs, 1.0), config), threads=1, context=256,
                         cache=False)
        loss = decoded_perplexity(model, [TEXT[2000:2200]])
        assert model.inputs_read() == pytest.approx(1 - sparsity, abs=0.05)
        found.append((sparsity, loss))
    exact = model_of(prepared.checkpoint, threads=1, context=256, cache=False)
    assert np.isfinite([loss for _, loss in found]).all()
    assert decoded_perplexity(exact, [TEXT[2000:2200]]) > 0


def test_a_prompt_before_what_is_decoded_is_dense(source):
    prepared = prepare(source, TEXT[:300], INT4, RSparse(tokens=256))
    model = model_of(with_alphas(prepared, dict.fromkeys(prepared.inputs, 0.9), RSparse()), threads=1, context=256,
                     cache=False)
    decoded_perplexity(model, [TEXT[:100]], dense_share=0.9)
    assert model.session.tokens_decoded == 9
    assert not model.session.decoding


def test_the_search_is_no_worse_than_where_it_begins_and_deterministic(source):
    config = RSparse(tokens=128, generations=2, population=8, search_tokens=64)
    prepared = prepare(source, TEXT[:300], INT4, config)
    ids = TEXT[300:364]
    found = []
    for _ in range(2):
        with collect_notices() as notices:
            found.append(search(prepared, ids, config))
        assert notices[0].where == "r-sparse"
    assert found[0] == found[1]
    losses = []
    for alphas in (found[0], dict.fromkeys(prepared.inputs, 0.95), dict.fromkeys(prepared.inputs, 1.0)):
        model = model_of(with_alphas(prepared, alphas, config), threads=1, context=64, cache=False)
        losses.append(decoded_perplexity(model, [ids]))
    assert losses[0] <= min(losses[1:]) * (1 + 1e-6)
    made = quantize(source, TEXT[:300], INT4, config)
    assert made.lineage[-1].config["alphas"].keys() == found[0].keys()


def test_what_is_in_the_format_is_left_as_it_is(source):
    once = quantize(source, TEXT[:64], INT4, RSparse(tokens=64))
    twice = quantize(once, TEXT[:64], INT4, RSparse(tokens=64))
    assert np.array_equal(once.tensors[LINEAR].dense(), twice.tensors[LINEAR].dense())


def test_refuses(source):
    with pytest.raises(UnsupportedError, match="is an encoder"):
        quantize(tiny_encoder(), TEXT[:64], INT4)
    with pytest.raises(UnsupportedError, match="take int4/g32/fp16/min"):
        quantize(source, TEXT[:64], QuantFormat.parse("int3/g32"))
    with pytest.raises(InvalidValueError, match="at least 16 tokens"):
        quantize(source, TEXT[:9], INT4)
    with pytest.raises(InvalidValueError, match="a search needs"):
        quantize(source, TEXT[:64], INT4, RSparse(tokens=64, generations=1))
