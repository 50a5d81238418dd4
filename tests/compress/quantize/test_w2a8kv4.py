"""AccLLM's weights: rounding with a frozen mask against a loop over columns, storage, a folder in the engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgewise.compress.prune.semi_structured import pruned_of, sparsegpt
from edgewise.compress.quantize.w2a8kv4 import AccLlm, accllm, mask_of, quantize_kept
from edgewise.compress.walk import Group
from edgewise.core.errors import InvalidValueError, collect_notices
from edgewise.core.numbers import QuantFormat
from edgewise.core.stats import InputStats
from edgewise.core.storage import Dense, Sparse
from edgewise.engine.loading import model_of
from edgewise.engine.packing import recipe_of
from edgewise.fit.dispatch import calibration_of, quantized
from edgewise.fit.methods import method_of
from edgewise.formats.folder import read_folder
from edgewise.formats.folder_writer import write_folder
from tiny_checkpoint import tiny_checkpoint

W2 = QuantFormat.parse("int2/g32/fp16/min")


def case(seed, rows=16, inputs=96):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, 24)) @ rng.standard_normal((24, inputs)) + rng.standard_normal((400, inputs))
    return rng.standard_normal((rows, inputs)).astype(np.float32), x.astype(np.float32)


def transcription(weight, mask, hessian, levels, group, damp=0.01):
    """Column by column with the inverse of what is left of H: the kept weights of a group of inputs lie on the grid of
    their extremes as the group is reached and its pruned weights are made up for; every error goes on."""
    size = len(hessian)
    h = hessian + damp * np.mean(np.diag(hessian)) * np.eye(size)
    w, out = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    low = step = None
    for j in range(size):
        if j % group == 0:
            ahead = w.copy()
            for k in range(j, min(j + group, size)):  # what is pruned of the group goes first
                inverse = np.linalg.inv(h[k:, k:])
                ahead[:, k:] -= np.outer(np.where(mask[:, k], ahead[:, k], 0) / inverse[0, 0], inverse[0])
            kept = np.ma.array(ahead[:, j:j + group].astype(np.float32), mask=mask[:, j:j + group])
            low = kept.min(axis=1).data.astype(np.float16).astype(np.float32)
            span = (kept.max(axis=1).data - kept.min(axis=1).data) / np.float32(levels)
            step = span.astype(np.float16).astype(np.float32)
        code = np.clip(np.rint((w[:, j].astype(np.float32) - low) / step), 0, levels)
        out[:, j] = np.where(mask[:, j], 0, code * step + low)
        inverse = np.linalg.inv(h[j:, j:])
        w[:, j:] -= np.outer((w[:, j] - out[:, j]) / inverse[0, 0], inverse[0])
    return out


@pytest.mark.parametrize(("bits", "group", "block"), [(2, 32, 32), (2, 96, 8), (3, 16, 32), (4, 48, 4)])
def test_against_the_transcription(bits, group, block):
    weight, x = case(0)
    hessian = x.T.astype(np.float64) @ x
    mask = sparsegpt(weight, hessian)[1]
    fmt = QuantFormat.parse(f"int{bits}/g{group}/fp16/min")
    found = quantize_kept(weight, mask, fmt, hessian, AccLlm(search=False, block=block))
    expected = transcription(weight, mask, hessian, 2**bits - 1, group)
    np.testing.assert_allclose(found.dense(), expected, atol=2e-5)
    assert not found.dense()[mask].any()


@pytest.mark.parametrize("text", ["int2/g32/fp16/min", "int3/g32/fp16/min", "int4/g32/fp16", "int4/axis/fp16/min",
                                  "int2/g32/fp16/int"])
@pytest.mark.parametrize("score", ["sparsegpt", "wanda", "magnitude"])
def test_the_mask_holds_and_feedback_helps(score, text):
    weight, x = case(1)
    hessian = x.T.astype(np.float64) @ x
    config = AccLlm(score=score)
    pruned, mask = mask_of(weight, hessian, config)
    before = weight.copy()
    fmt = QuantFormat.parse(text)
    found = {"feedback": quantize_kept(weight, mask, fmt, hessian, config),
             "by itself": quantize_kept(pruned, mask, fmt, None, config)}
    np.testing.assert_array_equal(weight, before)
    errors = {}
    for name, made in found.items():
        dense = made.dense()
        assert not dense[mask].any()
        assert made.n_m == (2, 4)
        assert made.values.shape == (16, 48)
        errors[name] = float(np.square((dense - weight) @ x.T).sum())
    assert errors["feedback"] < errors["by itself"]


def test_a_weight_that_is_sparse_and_on_the_grid_stays():
    rng = np.random.default_rng(2)
    values = rng.integers(0, 4, (8, 64)).astype(np.float32) * 0.5 - 0.75
    values[:, ::16], values[:, 1::16] = -0.75, 0.75  # the extremes of each group
    mask = np.tile([False, False, True, True], (8, 16))
    weight = np.where(mask, 0, values)
    hessian = np.eye(64) + 0.1
    for given in (None, hessian):
        assert np.array_equal(quantize_kept(weight, mask, QuantFormat.parse("int2/g16/fp16/min"), given,
                                            AccLlm(search=False)).dense(), weight)


def test_bits_are_those_of_kept_codes_places_and_grids():
    weight, _ = case(3, rows=64, inputs=128)
    made = quantize_kept(weight, pruned_of(np.abs(weight)), QuantFormat.parse("int2/g64/fp16/min"))
    # two bits for half of the weights, two bits of place for each, and 32 bits for each 64 inputs
    assert made.nbytes * 8 / weight.size == 1 + 1 + 0.5


def test_what_does_not_fit_says_so():
    weight, _ = case(0)
    mask = pruned_of(np.abs(weight))
    for text in ("nf4/g32", "int2/g36/fp16/min"):
        with pytest.raises(InvalidValueError, match=r"int2/g64|divide 96"):
            quantize_kept(weight, mask, QuantFormat.parse(text))
    with pytest.raises(InvalidValueError, match="mask"):
        quantize_kept(weight, mask[:, :4], W2)
    with pytest.raises(InvalidValueError, match="keeps 4"):
        quantize_kept(weight, np.zeros_like(mask), W2)
    with pytest.raises(InvalidValueError, match="score"):
        AccLlm(score="best")


def test_linears_that_read_the_same_are_as_if_alone():
    (a, x), (b, _) = case(4), case(5, rows=8)
    stats = InputStats.from_samples(x, gram=True)
    tensors = {"a.weight": Dense(a), "b.weight": Dense(b)}
    made = accllm(W2, AccLlm())(Group("attention", ("a.weight", "b.weight")), tensors, stats)
    for name in tensors:
        alone = accllm(W2, AccLlm())(Group("attention", (name,)), tensors, stats)[name]
        assert isinstance(made[name], Sparse)
        np.testing.assert_array_equal(made[name].dense(), alone.dense())


def test_a_folder_runs_compressed_in_the_engine(tmp_path):
    checkpoint = tiny_checkpoint(hidden=64, width=128, layers=2)
    rng = np.random.default_rng(0)
    sample = calibration_of(checkpoint, rng.integers(4, 260, 4096), 4)
    row = replace(method_of("accllm"), format="int2/g32/fp16/min")
    with collect_notices():
        made = quantized(checkpoint, row, QuantFormat.parse(row.format), row.settings(), sample)
        write_folder(made, tmp_path / "m")
        read = read_folder(tmp_path / "m")
        model = model_of(read, threads=1, cache=False)
    assert model.kv == "int4"
    linears = [name for name in read.tensors if name.endswith("_proj.weight")]
    assert linears
    for name in linears:
        stored = read.tensors[name]
        assert isinstance(stored, Sparse)
        np.testing.assert_array_equal(stored.dense(), made.tensors[name].dense())
        assert recipe_of(name, stored).kind == "two of four int2/g16/fp16/min"
    ids = rng.integers(4, 260, 40)
    dense = made.with_tensors({name: Dense(made.tensors[name].dense()) for name in made.tensors}, made.lineage[-1])
    with collect_notices():
        exact = model_of(dense, threads=1, cache=False, kv="fp32").forward(ids)
        found = model_of(read, threads=1, cache=False, kv="fp32", activations="float32").forward(ids)
    np.testing.assert_allclose(found, exact, atol=2e-3 * np.abs(exact).max())
