"""GPTQ against the algorithm written out column by column and number by number, and against what it promises."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.quantize.gptq import Gptq, inverse_factor, quantize_layer
from edgewise.compress.quantize.ranges import codes_of, grid_of, values_of
from edgewise.compress.quantize.rtn import Rtn
from edgewise.compress.quantize.rtn import quantize_layer as rounded
from edgewise.core.errors import InvalidValueError, collect_notices
from edgewise.core.numbers import QuantFormat, quantize

RNG = np.random.default_rng(3)
ROWS, INPUTS = 5, 96
WEIGHT = RNG.standard_t(4, (ROWS, INPUTS)).astype(np.float32)
SAMPLES = RNG.standard_normal((400, INPUTS)) @ (np.eye(INPUTS) + 0.35 * RNG.standard_normal((INPUTS, INPUTS)))
HESSIAN = SAMPLES.T @ SAMPLES
FORMATS = ("int4/g32/fp16/min", "int3/g32", "int4/g16/fp32/int", "int4/axis", "int8/tensor", "int2/g64/fp16/min",
           "nf4/g32", "fp4/g32/e8m0", "int3/g40/fp16")


def unblocked(weight, hessian, fmt, config, mask=None):
    """Algorithm 1 without blocks: one row, one column and one later column at a time; the inverse is taken as such,
    and its rows are eliminated one after the other (equations 2 and 3 of the paper) instead of being factored."""
    rows, inputs = weight.shape
    w = weight.astype(np.float64).copy()
    h = hessian.astype(np.float64).copy()
    unseen = np.diag(h) == 0
    mean = np.diag(h).mean()
    for j in range(inputs):
        h[j, j] = (mean if unseen[j] else h[j, j]) + config.damp * mean
    order = sorted(range(inputs), key=lambda j: -hessian[j, j]) if config.order else list(range(inputs))
    size = fmt.granularity.group if fmt.granularity.kind == "group" else inputs
    static = config.order or config.static_groups or fmt.granularity.kind == "tensor"
    remaining = list(order)
    inverse = np.linalg.inv(h)
    grids = {}
    if static:
        importance = np.diag(hessian) / np.diag(hessian).mean()
        made = rounded(weight, fmt, Rtn(config.search), importance=importance)
    result = np.empty_like(weight)
    while remaining:
        j = remaining[0]
        if not static and j % size == 0:
            members = range(j, min(j + size, inputs))
            # The importance of a column: 1 over its pivot, once all before it are eliminated.
            pivots, left = [], inverse.copy()
            for k in members:
                pivots.append(left[k, k])
                left = left - np.outer(left[:, k], left[k]) / left[k, k]
            weights = 1 / np.array(pivots)
            weights = (weights / weights.mean()).astype(np.float32)[:, None] if config.search else None
            grids[j // size] = grid_of(w[:, list(members)].T.astype(np.float32), fmt, weights, search=config.search)
        for i in range(rows):
            if static:
                second = made.zeros if made.zeros is not None else made.minima
                place = (0, 0) if fmt.granularity.kind == "tensor" else (i, j // size)
                scale, offset = made.scales[place], 0 if second is None else second[place]
            else:
                grid = grids[j // size]
                scale, offset = grid.scale[i], 0 if grid.offset is None else grid.offset[i]
            value = one(np.float32(w[i, j]), scale, offset, fmt)
            if mask is not None and mask[i, j]:
                value = np.float32(0)
            result[i, j] = value
            error = (w[i, j] - float(value)) / inverse[j, j]
            for k in remaining[1:]:
                w[i, k] -= error * inverse[j, k]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        remaining.pop(0)
    return result


def one(value, scale, offset, fmt):
    """One number rounded on a grid."""
    if fmt.element.kind != "int":
        code = fmt.element.encode(np.array([value / scale], np.float32))
        return np.float32(fmt.element.decode(code)[0] * scale)
    low, high = fmt.element.code_range
    if fmt.zero == "min":
        return np.float32(np.float32(np.clip(np.rint((value - offset) / scale), low, high) * scale) + offset)
    shift = offset if fmt.zero == "int" else 0
    return np.float32((np.clip(np.rint(value / scale) + shift, low, high) - shift) * scale)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("config", [Gptq(block=32), Gptq(block=24, search=False), Gptq(order=True),
                                    Gptq(static_groups=True, block=17)], ids=["blocks", "odd", "order", "static"])
def test_it_is_the_unblocked_algorithm(name, config):
    fmt = QuantFormat.parse(name)
    made = quantize_layer(WEIGHT, HESSIAN, fmt, config)
    np.testing.assert_array_equal(made.dense(), unblocked(WEIGHT, HESSIAN, fmt, config))


@pytest.mark.parametrize("block", [1, 7, 32, 96, 1000])
def test_blocks_change_nothing(block):
    fmt = QuantFormat.parse("int3/g32/fp16/min")
    whole = quantize_layer(WEIGHT, HESSIAN, fmt, Gptq(block=96))
    made = quantize_layer(WEIGHT, HESSIAN, fmt, Gptq(block=block))
    np.testing.assert_array_equal(made.codes, whole.codes)
    np.testing.assert_array_equal(made.scales, whole.scales)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("search", [True, False])
def test_without_correlations_it_is_rounding(name, search):
    fmt = QuantFormat.parse(name)
    diagonal = np.exp(RNG.standard_normal(INPUTS))
    made = quantize_layer(WEIGHT, np.diag(diagonal), fmt, Gptq(search=search, damp=0.0))
    plain = rounded(WEIGHT, fmt, Rtn(search), importance=diagonal)
    np.testing.assert_array_equal(made.codes, plain.codes)
    np.testing.assert_allclose(made.scales, plain.scales, rtol=1e-6)  # importance passes through the factor
    if not search:
        np.testing.assert_array_equal(made.scales, plain.scales)
        np.testing.assert_array_equal(made.codes, quantize(WEIGHT, fmt)[0])


def cost(made, weight=WEIGHT, hessian=HESSIAN):
    gap = made.dense().astype(np.float64) - weight
    return float(np.einsum("oi,ij,oj->", gap, hessian, gap))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("config", [Gptq(), Gptq(order=True), Gptq(static_groups=True), Gptq(search=False)],
                         ids=["default", "order", "static", "span"])
def test_the_product_is_closer_than_by_rounding(name, config):
    fmt = QuantFormat.parse(name)
    baseline = rounded(WEIGHT, fmt, Rtn(config.search), importance=np.diag(HESSIAN))
    assert cost(quantize_layer(WEIGHT, HESSIAN, fmt, config)) < cost(baseline)


def test_the_factor_is_of_the_inverse():
    factor = inverse_factor(HESSIAN, 0.01)
    damped = HESSIAN + 0.01 * np.diag(HESSIAN).mean() * np.eye(INPUTS)
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(INPUTS), atol=1e-9)
    assert (np.tril(factor, -1) == 0).all()
    assert (np.diag(factor) > 0).all()


def test_pruned_weights_are_zero_and_are_made_up_for():
    fmt = QuantFormat.parse("int4/g32")
    mask = np.zeros(WEIGHT.shape, bool)
    mask[:, 1::2] = RNG.random((ROWS, INPUTS // 2)) < 0.7
    made = quantize_layer(WEIGHT, HESSIAN, fmt, mask=mask)
    assert (made.dense()[mask] == 0).all()
    np.testing.assert_array_equal(made.dense(), unblocked(WEIGHT, HESSIAN, fmt, Gptq(), mask))
    without = rounded(np.where(mask, np.float32(0), WEIGHT), fmt, importance=np.diag(HESSIAN))
    assert cost(made) < 0.8 * cost(without)
    with_zero = quantize_layer(WEIGHT, HESSIAN, QuantFormat.parse("int4/g32/fp16/int"), mask=mask)
    assert (with_zero.dense()[mask] == 0).all()


def test_inputs_that_were_never_seen_are_rounded():
    hessian = HESSIAN.copy()
    hessian[[3, 40]] = 0
    hessian[:, [3, 40]] = 0
    fmt = QuantFormat.parse("int8/g32")
    made = quantize_layer(WEIGHT, hessian, fmt, Gptq(search=False))
    np.testing.assert_array_equal(made.dense()[:, 3], rounded(WEIGHT, fmt, Rtn(False)).dense()[:, 3])
    np.testing.assert_array_equal(made.dense(), unblocked(WEIGHT, hessian, fmt, Gptq(search=False)))


def test_few_samples_are_damped_and_said():
    thin = SAMPLES[:2].T @ SAMPLES[:2]
    with collect_notices() as notices:
        made = quantize_layer(WEIGHT, thin, QuantFormat.parse("int4/g32"), Gptq(damp=0.0))
    assert np.isfinite(made.dense()).all()
    assert any("not positive definite" in item.message for item in notices)


def test_inputs_are_not_modified_and_answers_repeat():
    weight, hessian = WEIGHT.copy(), HESSIAN.copy()
    fmt = QuantFormat.parse("int4/g32/fp16/min")
    first, second = (quantize_layer(weight, hessian, fmt) for _ in range(2))
    np.testing.assert_array_equal(weight, WEIGHT)
    np.testing.assert_array_equal(hessian, HESSIAN)
    np.testing.assert_array_equal(first.codes, second.codes)


@pytest.mark.parametrize("name", FORMATS)
def test_a_grid_is_never_worse_than_the_plain_one(name):
    fmt = QuantFormat.parse(name)
    values = RNG.standard_t(4, (32, 60)).astype(np.float32)
    weight = np.exp(RNG.standard_normal((32, 1))).astype(np.float32)

    def error(grid):
        return (((values_of(codes_of(values, grid, fmt), grid, fmt) - values)**2) * weight).sum(axis=0)

    plain, found = grid_of(values, fmt, weight, search=False), grid_of(values, fmt, weight)
    assert (error(found) <= error(plain) * (1 + 1e-5)).all()
    if fmt.scale.name != "e8m0":
        assert error(found).sum() < 0.97 * error(plain).sum()


@pytest.mark.parametrize(("change", "words"), [
    ({"weight": WEIGHT[0]}, "(out, in)"),
    ({"weight": np.where(WEIGHT[2, 5] == WEIGHT, np.nan, WEIGHT)}, r"element \(2, 5\)"),
    ({"hessian": HESSIAN[:5, :5]}, r"\(96, 96\)"),
    ({"hessian": np.where(HESSIAN[1, 2] == HESSIAN, np.nan, HESSIAN)}, "the Hessian has finite values"),
    ({"hessian": -HESSIAN}, "not negative"),
    ({"mask": np.zeros((2, 2), bool)}, "a mask is"),
    ({"mask": np.zeros(WEIGHT.shape, bool), "fmt": QuantFormat.parse("int4/g32/fp16/min")}, "no exact zero"),
])
def test_what_does_not_fit_is_refused(change, words):
    given = {"weight": WEIGHT, "hessian": HESSIAN, "fmt": QuantFormat.parse("int4/g32"), **change}
    mask = {"mask": given.pop("mask")} if "mask" in given else {}
    with pytest.raises(InvalidValueError, match=words):
        quantize_layer(given["weight"], given["hessian"], given["fmt"], **mask)


@pytest.mark.parametrize("settings", [{"damp": -1.0}, {"damp": float("nan")}, {"block": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidValueError):
        Gptq(**settings)
