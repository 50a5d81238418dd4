"""Packed products are the products, at the extremes and where lower slices borrow."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.cost.packed_multiply import DSP_8X2, DSP_8X4, DSP_8X8, SIMD_4X4, Packing, packed_matmul

PACKINGS = {"4x4": (SIMD_4X4, 2, 511), "8x2": (DSP_8X2, 3, 7), "8x4": (DSP_8X4, 2, 7), "8x8": (DSP_8X8, 2, 7)}


@pytest.mark.parametrize("name", PACKINGS)
def test_products_are_exact_and_fewer(name):
    packing, share, spill = PACKINGS[name]
    assert packing.spill == spill
    rng = np.random.default_rng(0)
    x = rng.integers(-2 ** (packing.x_bits - 1), 2 ** (packing.x_bits - 1), (40, 1200))
    w = rng.integers(-2 ** (packing.w_bits - 1), 2 ** (packing.w_bits - 1), (2520, 1200))
    result, multiplications = packed_matmul(x, w, packing)  # 100,800 dot products
    assert np.array_equal(result, x @ w.T)
    assert multiplications * share == x.shape[0] * w.size


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("slot", [0, 1])
def test_a_slice_holds_as_many_products_as_it_says_and_no_more(name, slot):
    packing, share, spill = PACKINGS[name]
    w = np.ones((share, spill + 1), np.int64)
    w[slot] = -(2 ** (packing.w_bits - 1))
    x = np.full((1, spill + 1), -(2 ** (packing.x_bits - 1)))
    words = packing.pack(w.T)
    for count, fits in ((spill, True), (spill + 1, slot != 0)):  # the lowest slice is one of the narrowest
        sums = packing.unpack(np.array((x[0, :count] * words[:count]).sum()))
        if fits and count == spill:
            assert np.array_equal(sums, w[:, :count] @ x[0, :count])
        elif not fits:
            assert not np.array_equal(sums, w[:, :count] @ x[0, :count])


def test_a_slice_that_is_too_narrow_is_wrong_without_spills():
    naive = Packing(4, 4, (0, 8), 32)  # lanes of 8 bits: room for one product
    assert naive.spill == 1
    x, w = np.full((1, 3), -8), np.full((2, 3), -8)
    assert np.array_equal(packed_matmul(x, w, naive)[0], x @ w.T)
    together = int((x[0] * naive.pack(w.T)).sum())
    assert not np.array_equal(naive.unpack(np.array(together)), (x @ w.T)[0])


def test_what_cannot_be_is_said():
    with pytest.raises(InvalidValueError, match="4-bit signed"):
        packed_matmul(np.full((1, 2), 8), np.zeros((1, 2), int), SIMD_4X4)
    with pytest.raises(InvalidValueError, match="share `in`"):
        packed_matmul(np.zeros((1, 2), int), np.zeros((1, 3), int), SIMD_4X4)
    with pytest.raises(InvalidValueError, match="room"):
        Packing(8, 8, (0, 8), 48)
