"""From a stored weight to its packed form: nothing is rounded, and what has no kernel is a notice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plans import stored, weights

from edgewise.core.errors import InvalidValueError, collect_notices
from edgewise.core.numbers import FP16, NF4, Granularity, QuantFormat, quantize
from edgewise.core.storage import Dense, Factored, QuantizedTensor, Sparse
from edgewise.core.storage import rows_of as rows_of_stored
from edgewise.engine.packing import layout_of, pack_all, packed_nbytes, recipe_of, unique
from edgewise.native import _core

RNG = np.random.default_rng(0)
VALUES = weights(RNG, 35, 512)


def rows_of(matrix) -> np.ndarray:
    out = np.empty((matrix.rows, matrix.cols), np.float32)
    for i in range(matrix.rows):
        matrix.row(i, out[i])
    return out


@pytest.mark.parametrize("form", [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "MXFP4",
    "int2/g32", "int3/g32", "int4/g32", "int5/g32", "int6/g32", "int8/g32", "int4/g16", "int4/g64", "int4/g128/fp32",
    "int4/axis", "int8/axis/fp32", "int8/tensor", "int2/g16/fp16/min", "int4/g32/fp16/min", "int6/g64/fp16/min",
    "int4/g32/bf16", "fp4/g32/e8m0", "fp4/g16", "int1/g32", "int1/g128", "int7/g64", "int7/g32/fp16/min",
    "int8/axis/fp32/min", "ternary/g64", "int2/g64/fp16/int", "int4/g128/fp16/int", "int3/g16/fp16/int",
    "int8/tensor/fp16/int", "int2/g64", "int2/g128/fp16/min", "int3/g64/fp16/min"])
def test_values_are_what_was_stored(form):
    weight = stored(VALUES, form)
    with collect_notices() as notices:
        recipe = recipe_of("w", weight)
        packed = pack_all({"w": recipe}, key=None)
    assert notices == []
    matrix = packed.matrices["w"]
    assert (matrix.rows, matrix.cols, matrix.nbytes) == (35, 512, recipe.nbytes)
    assert np.array_equal(rows_of(matrix), weight.dense())  # the sign of a zero aside
    assert packed.nbytes == layout_of({"w": recipe})[1]
    assert not packed.cached


@pytest.mark.parametrize(("rows", "cols"), [(35, 512), (16, 33), (1, 1), (33, 7)])
def test_a_table_is_packed_row_by_row(rows, cols):
    """What nothing multiplies: rows lie as they are stored, and what the cache holds of it has another key."""
    weight = stored(np.ascontiguousarray(VALUES[:rows, :cols]), "F32")
    table, panels = recipe_of("w", weight, table=True), recipe_of("w", weight)
    assert (table.nbytes, table.kind != panels.kind) == (panels.nbytes, True)
    packed = pack_all({"w": table}, key=None)
    assert np.array_equal(rows_of(packed.matrices["w"]), weight.dense())
    data = np.zeros(table.nbytes, np.uint8)
    table.write(data)
    assert np.array_equal(data.view(np.float32)[:rows * cols].reshape(rows, cols), weight.dense())


@pytest.mark.parametrize("form", ["int4/g32/fp32/int", "int3/g16/bf16/int", "int8/axis/fp32/int"])
def test_a_zero_point_beside_a_scale_in_single_precision(form):
    """(code - zero) * scale against scale * code - zero * scale: each product is rounded, to float32."""
    weight = stored(VALUES, form)
    matrix = pack_all({"w": recipe_of("w", weight)}, key=None).matrices["w"]
    largest = np.abs(weight.scales).max() * 2.0 ** weight.format.element.bits
    assert np.abs(rows_of(matrix) - weight.dense()).max() <= 2.0**-23 * largest


@pytest.mark.parametrize("cols", [33, 48, 100, 300])
@pytest.mark.parametrize("form", ["int4/g32", "int8/axis", "int3/g16/fp16/min", "int6/g64"])
def test_columns_that_are_not_whole_groups(form, cols):
    weight = stored(np.ascontiguousarray(VALUES[:, :cols]), form)
    matrix = pack_all({"w": recipe_of("w", weight)}, key=None).matrices["w"]
    assert np.array_equal(rows_of(matrix), weight.dense())


def test_nf4_is_a_table_of_integers_and_says_so():
    fmt = QuantFormat(NF4, Granularity("group", 64), FP16)
    codes, scales, _ = quantize(VALUES, fmt)
    weight = QuantizedTensor(codes, scales, fmt)
    with collect_notices() as notices:
        matrix = pack_all({"w": recipe_of("layer.w", weight)}, key=None).matrices["w"]
    assert [(n.kind, n.where) for n in notices] == [("info", "layer.w")]
    assert "0.37 %" in notices[0].message
    table = np.rint(np.array(NF4.codebook) * 127) / 127
    assert np.abs(table - NF4.codebook).max() <= 0.00375
    expected = table[codes] * np.repeat(scales, 64, axis=1)
    assert np.abs(rows_of(matrix) - expected).max() <= 2.0**-22 * np.abs(expected).max()


def sparse(form: str, cols: int = 512) -> Sparse:
    """VALUES of which the larger two of every four are kept, in a format."""
    values = VALUES[:, :cols].reshape(35, -1, 4)
    places = np.sort(np.argsort(-np.abs(values), axis=2)[:, :, :2], axis=2)
    kept = np.take_along_axis(values, places, axis=2).reshape(35, -1)
    return Sparse("n_m", places.reshape(35, -1).astype(np.uint8), stored(kept, form), (35, cols), n_m=(2, 4))


@pytest.mark.parametrize("form", ["int2/g16", "int2/g64/fp16/min", "int2/g64/fp16/int", "int3/g32", "int4/g64",
                                  "int8/g64", "int5/g128", "int8/axis/fp32", "ternary/tensor", "int4/g512/bf16"])
@pytest.mark.parametrize("cols", [512, 452])
def test_two_of_four_stay_two_of_four(form, cols):
    weight = sparse(form, cols)
    with collect_notices() as notices:
        recipe = recipe_of("w", weight)
        matrix = pack_all({"w": recipe}, key=None).matrices["w"]
    assert notices == []
    assert np.array_equal(rows_of(matrix), weight.dense())


def test_two_of_four_in_the_format_itself():
    """Codes of all inputs, zero where dropped: the same bytes as kept codes beside their places."""
    weight = sparse("int4/g32/fp16")
    codes = np.zeros((35, 128, 4), np.int8)
    np.put_along_axis(codes, weight.index.reshape(35, 128, 2).astype(np.int64),
                      weight.values.codes.reshape(35, 128, 2), axis=2)
    fmt = replace(QuantFormat.parse("int4/g64/fp16"), n_m=(2, 4))
    whole = QuantizedTensor(codes.reshape(35, 512), weight.values.scales, fmt)
    recipe, other = recipe_of("w", whole), recipe_of("w", weight)
    assert recipe.nbytes == other.nbytes == packed_nbytes(fmt, (35, 512))
    matrix = pack_all({"w": recipe}, key=None).matrices["w"]
    assert np.array_equal(rows_of(matrix), weight.dense())
    codes[3, 5] = [1, 2, 3, 0]
    with pytest.raises(InvalidValueError, match="more than two codes"):
        pack_all({"w": recipe_of("w", QuantizedTensor(codes.reshape(35, 512), weight.values.scales, fmt))}, key=None)


def test_one_of_two_is_two_of_four():
    places = RNG.integers(0, 2, (35, 256)).astype(np.uint8)
    weight = Sparse("n_m", places, stored(VALUES[:, :256], "int4/g32"), (35, 512), n_m=(1, 2))
    matrix = pack_all({"w": recipe_of("w", weight)}, key=None).matrices["w"]
    assert np.array_equal(rows_of(matrix), weight.dense())


@pytest.mark.parametrize(("form", "bits"), [("int2/g64", 1.875), ("int4/g64", 2.875), ("int8/g64", 4.875)])
def test_bytes_of_two_of_four(form, bits):
    """Half of the codes, three bits for each pair of places, a scale for 128 inputs."""
    values = weights(RNG, 64, 256)
    places = np.tile(np.array([0, 2], np.uint8), (64, 128))
    weight = Sparse("n_m", places, stored(values, form), (64, 512), n_m=(2, 4))
    assert recipe_of("w", weight).nbytes * 8 == bits * 64 * 512


def test_rows_of_a_sparse_weight_stay_sparse():
    weight = sparse("int4/g32")
    part = rows_of_stored(weight, slice(3, 20))
    assert isinstance(part, Sparse)
    assert np.array_equal(part.dense(), weight.dense()[3:20])


def test_what_has_no_kernel_runs_as_floats_and_says_so():
    left, right = Dense(weights(RNG, 35, 8)), Dense(weights(RNG, 8, 512))
    for weight in (stored(VALUES, "posit8_0/g32"), stored(VALUES, "int4/g8"), Factored(left, right)):
        with collect_notices() as notices:
            matrix = pack_all({"w": recipe_of("layer.w", weight)}, key=None).matrices["w"]
        assert [(n.kind, n.where) for n in notices] == [("fallback", "layer.w")]
        assert "16-bit floats" in notices[0].message
        assert np.array_equal(rows_of(matrix), weight.dense().astype(np.float16).astype(np.float32))


def test_kept_floats_run_among_their_zeros_as_they_are():
    csr = Sparse("csr", np.zeros(35, np.int32), Dense(VALUES[:1, :35]), (35, 512), row_starts=np.arange(36))
    dense = Sparse("n_m", np.zeros((35, 128), np.uint8), Dense(VALUES[:, :128]), (35, 512), n_m=(1, 4))
    for weight in (csr, dense):
        with collect_notices() as notices:
            matrix = pack_all({"w": recipe_of("layer.w", weight)}, key=None).matrices["w"]
        assert [(n.kind, n.where) for n in notices] == [("info", "layer.w")]
        assert "among their zeros" in notices[0].message
        assert np.array_equal(rows_of(matrix), weight.dense())


def test_packed_sizes_are_those_of_the_codes():
    """Interleaving adds nothing to whole panels of whole blocks."""
    values = weights(RNG, 64, 512)
    for form in ("F16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "MXFP4", "int3/g32", "int4/g128"):
        weight = stored(values, form)
        sub_scales = {"Q4_K": 64 * 2 * 4, "Q6_K": 0}.get(form, 0)  # six-bit scales take a byte each
        assert recipe_of("w", weight).nbytes == weight.nbytes + sub_scales, form


def test_one_stored_weight_is_packed_once():
    one, other = stored(VALUES, "Q8_0"), stored(VALUES, "Q8_0")
    found = unique([("embedding", one), ("x", other), ("head", one)])
    assert list(found) == ["embedding", "x"]
    with pytest.raises(AssertionError, match="two weights are called x"):
        unique([("x", one), ("x", other)])


def test_weights_lie_on_pages_and_outlive_the_packing():
    recipes = {name: recipe_of(name, stored(VALUES, "Q4_0")) for name in ("a", "b", "c")}
    offsets, total = layout_of(recipes)
    assert all(at % 4096 == 0 for at in offsets.values())
    assert total % 4096 == 0
    matrices = dict(pack_all(recipes, key=None).matrices)
    expected = stored(VALUES, "Q4_0").dense()
    for name in offsets:
        assert np.array_equal(rows_of(matrices[name]), expected)


def test_every_block_type_has_a_kernel():
    from edgewise.formats.ggml_blocks import READ

    for name in READ:
        native = _core.PackedFormat.of_blocks(name)
        assert native.nbytes(16, 256) > 0
        assert native.quantised == (name not in ("F32", "F16", "BF16"))
