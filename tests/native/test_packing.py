"""From a stored weight to its packed form: nothing is rounded, and what has no kernel is a notice."""

from __future__ import annotations

import numpy as np
import pytest
from plans import stored, weights

from edgewise.core.errors import collect_notices
from edgewise.core.numbers import FP16, NF4, Granularity, QuantFormat, quantize
from edgewise.core.storage import Dense, Factored, QuantizedTensor
from edgewise.engine.packing import layout_of, pack_all, recipe_of, unique
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
    "int4/g32/bf16", "fp4/g32/e8m0", "fp4/g16"])
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


@pytest.mark.parametrize("form", ["int4/g32/fp16/int", "int3/g16/fp16/int", "int6/axis/fp32/int"])
def test_a_zero_point_becomes_a_minimum(form):
    """(code - zero) * scale against scale * code + minimum: the product is rounded once more, to float32."""
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


def test_what_has_no_kernel_runs_as_floats_and_says_so():
    fmt = QuantFormat(NF4, Granularity("group", 32), FP16)
    codes, scales, _ = quantize(VALUES, fmt)
    left, right = Dense(weights(RNG, 35, 8)), Dense(weights(RNG, 8, 512))
    for weight in (QuantizedTensor(codes, scales, fmt), stored(VALUES, "int4/g8"), Factored(left, right)):
        with collect_notices() as notices:
            matrix = pack_all({"w": recipe_of("layer.w", weight)}, key=None).matrices["w"]
        assert [(n.kind, n.where) for n in notices] == [("fallback", "layer.w")]
        assert "16-bit floats" in notices[0].message
        assert np.array_equal(rows_of(matrix), weight.dense().astype(np.float16).astype(np.float32))


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
