"""Every storage form: shape, bytes, dense(), matmul(); nesting; laziness."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import BF16, FP16, INT8, QuantFormat, float32_to_bf16, quantize
from edgewise.core.storage import (
    Blocks,
    Dense,
    Factored,
    InputSparse,
    LazyTensors,
    QuantizedTensor,
    Sparse,
    Stored,
    Sum,
    rows_of,
)

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(6, 8)).astype(np.float32)


def quantized(text: str, weight: np.ndarray = WEIGHT) -> QuantizedTensor:
    fmt = QuantFormat.parse(text)
    codes, scales, extra = quantize(weight, fmt)
    return QuantizedTensor(codes, scales, fmt, zeros=extra if fmt.zero == "int" else None,
                           minima=extra if fmt.zero == "min" else None)


class TwoHalves:
    """A codec of two float16 values in four bytes."""

    name, block, block_nbytes = "halves", 2, 4

    def decode(self, raw):
        return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def n_m() -> Sparse:
    index = np.array([[0, 3, 1, 2]] * 6, np.uint8)
    return Sparse("n_m", index, Dense(np.arange(1, 25, dtype=np.float32).reshape(6, 4)), (6, 8), n_m=(2, 4))


def csr() -> Sparse:
    rows, columns = np.nonzero(WEIGHT > 0)
    starts = np.concatenate([[0], np.cumsum((WEIGHT > 0).sum(axis=1))])
    return Sparse("csr", columns, Dense(WEIGHT[rows, columns][None]), (6, 8), row_starts=starts)


FORMS = {
    "float32": (Dense(WEIGHT), 192),
    "float16": (Dense(WEIGHT.astype(np.float16), FP16), 96),
    "bfloat16": (Dense(float32_to_bf16(WEIGHT), BF16), 96),
    "int4 min": (quantized("int4/g4/fp16/min"), 24 + 6 * 2 * 4),
    "int8 zero": (quantized("int8/axis/fp32/int"), 48 + 6 * 5),
    "blocks": (Blocks(WEIGHT.astype(np.float16).view(np.uint8), TwoHalves(), (6, 8)), 96),
    "factored": (Factored(Dense(WEIGHT[:, :3].copy()), quantized("int8/axis", WEIGHT[:3])), 72 + 24 + 6),
    "n_m": (n_m(), 96 + 6 * 4 * 2 // 8),
    "csr": (csr(), None),
    "sum": (Sum((quantized("int8/axis"), Factored(Dense(WEIGHT[:, :2].copy()), Dense(WEIGHT[:2].copy())))),
            48 + 12 + 48 + 64),
    "input sparse": (InputSparse(quantized("int8/axis"), np.arange(8, dtype=np.float32) / 4, Factored(
        Dense(WEIGHT[:, :2].copy()), Dense(WEIGHT[:2].copy()))), 48 + 12 + 32 + 48 + 64),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_keeps_the_protocol(name):
    stored, nbytes = FORMS[name]
    assert isinstance(stored, Stored)
    assert stored.shape == (6, 8)
    dense = stored.dense()
    assert (dense.shape, dense.dtype) == ((6, 8), np.float32)
    x = RNG.normal(size=(2, 3, 8)).astype(np.float32)
    np.testing.assert_allclose(stored.matmul(x), x @ dense.T, rtol=1e-5, atol=1e-5)
    if nbytes is not None:
        assert stored.nbytes == nbytes
    assert "\n" not in repr(stored)
    assert len(repr(stored)) < 140


def test_dense_means_what_its_number_says():
    half = WEIGHT.astype(np.float16)
    np.testing.assert_array_equal(Dense(half, FP16).dense(), half.astype(np.float32))
    np.testing.assert_allclose(FORMS["bfloat16"][0].dense(), WEIGHT, rtol=2**-8)


@pytest.mark.parametrize(("data", "number", "message"), [
    (WEIGHT.astype(np.float64), None, "float64"), (WEIGHT, FP16, "expects dtype float16"), (WEIGHT, INT8, "int8"),
])
def test_dense_refuses(data, number, message):
    with pytest.raises(InvalidValueError, match=message):
        Dense(data) if number is None else Dense(data, number)


def test_n_m_places_values():
    row = n_m().dense()[0]
    assert row.tolist() == [1, 0, 0, 2, 0, 3, 4, 0]


def test_csr_places_values():
    np.testing.assert_array_equal(csr().dense(), np.where(WEIGHT > 0, WEIGHT, 0))


def test_factored_needs_one_rank():
    with pytest.raises(InvalidValueError, match=r"\(6, 3\) and \(2, 8\)"):
        Factored(Dense(WEIGHT[:, :3].copy()), Dense(WEIGHT[:2].copy()))


class TestInputSparse:
    def test_what_decoding_reads(self):
        weight, low = Dense(WEIGHT), Factored(Dense(WEIGHT[:, :2].copy()), Dense(WEIGHT[:2].copy()))
        thresholds = np.array([0, 0.5, 1, np.inf, 0.5, 0.5, 0.5, 0.5], np.float32)
        x = np.array([0.1, 0.5, -2, 9, -0.4, 0.6, 0, 1], np.float32)
        read = np.array([0.1, 0, -2, 0, 0, 0.6, 0, 1], np.float32)
        np.testing.assert_allclose(InputSparse(weight, thresholds).decode(x), WEIGHT @ read, rtol=1e-5)
        np.testing.assert_allclose(InputSparse(weight, thresholds, low).decode(x),
                                   WEIGHT @ read + low.dense() @ (x - read), rtol=1e-5)

    @pytest.mark.parametrize(("thresholds", "message"), [
        (np.zeros(6, np.float32), "each of 8 inputs"), (np.zeros(8), "float64"),
        (np.full(8, -1, np.float32), "at least zero"), (np.full(8, np.nan, np.float32), "at least zero")])
    def test_refuses(self, thresholds, message):
        with pytest.raises(InvalidValueError, match=message):
            InputSparse(Dense(WEIGHT), thresholds)

    def test_a_product_of_another_shape_is_refused(self):
        with pytest.raises(InvalidValueError, match=r"product of shape \(6, 8\)"):
            InputSparse(Dense(WEIGHT), np.zeros(8, np.float32), Factored(Dense(WEIGHT[:3, :2].copy()),
                                                                         Dense(WEIGHT[:2].copy())))


@pytest.mark.parametrize("parts", [(), (Dense(WEIGHT), Dense(WEIGHT[:3].copy()))])
def test_a_sum_needs_parts_of_one_shape(parts):
    with pytest.raises(InvalidValueError, match="parts of one shape"):
        Sum(parts)


def test_blocks_of_three_dimensions():
    blocks = Blocks(WEIGHT.astype(np.float16).view(np.uint8), TwoHalves(), (2, 3, 8))
    assert blocks.dense().shape == (2, 3, 8)


def test_lazy_tensors_are_made_when_asked_for():
    made = []

    def maker(name):
        def make():
            made.append(name)
            return Dense(WEIGHT)

        return make

    tensors = LazyTensors({name: maker(name) for name in "ab"})
    assert (list(tensors), len(tensors), "a" in tensors, "c" in tensors, made) == (["a", "b"], 2, True, False, [])
    assert tensors["b"].shape == (6, 8)
    assert made == ["b"]
    with pytest.raises(KeyError):
        tensors["c"]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rows", [slice(0, 6), slice(2, 5), slice(3, 3), 4])
def test_rows_of_every_form_are_those_of_the_dense_tensor(name, rows):
    stored, _ = FORMS[name]
    part = rows_of(stored, rows)
    expected = stored.dense()[rows]
    assert part.shape == expected.shape
    np.testing.assert_allclose(part.dense(), expected, rtol=1e-6)
    if not isinstance(rows, int):
        assert type(part) is (Dense if name == "csr" else type(stored))


def test_an_element_of_a_stack_keeps_its_blocks():
    stack = np.stack([WEIGHT, 2 * WEIGHT, 3 * WEIGHT]).astype(np.float16)
    blocks = Blocks(stack.reshape(18, 8).view(np.uint8), TwoHalves(), (3, 6, 8))
    second = rows_of(blocks, 1)
    assert isinstance(second, Blocks)
    assert np.shares_memory(second.raw, blocks.raw)
    np.testing.assert_array_equal(second.dense(), stack[1].astype(np.float32))
    np.testing.assert_array_equal(rows_of(Dense(stack, FP16), 2).dense(), stack[2].astype(np.float32))


def test_rows_that_are_not_there():
    with pytest.raises(InvalidValueError, match=r"rows 6 to 7 .*\(6, 8\)"):
        rows_of(Dense(WEIGHT), 6)


def test_blocks_made_later_are_made_when_read_and_each_time() -> None:
    made: list[int] = []

    def make() -> np.ndarray:
        made.append(1)
        return WEIGHT.astype(np.float16).view(np.uint8)

    blocks = Blocks.later(make, TwoHalves(), (6, 8))
    assert (blocks.shape, blocks.nbytes, repr(blocks)) == ((6, 8), 96, repr(Blocks(make(), TwoHalves(), (6, 8))))
    assert len(made) == 1  # by the comparison
    np.testing.assert_array_equal(blocks.dense(), WEIGHT.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(rows_of(blocks, slice(1, 3)).dense(), blocks.dense()[1:3])
    assert len(made) == 4
    with pytest.raises(AttributeError, match="no attribute 'row'"):
        _ = blocks.row


def test_a_dense_tensor_made_later_is_made_when_read_and_each_time() -> None:
    made: list[int] = []

    def make() -> np.ndarray:
        made.append(1)
        return WEIGHT.astype(np.float16)

    tensor = Dense.later(make, FP16, (6, 8))
    assert (tensor.shape, tensor.nbytes, repr(tensor)) == ((6, 8), 96, repr(Dense(make(), FP16)))
    part = rows_of(tensor, slice(1, 3))
    assert part.shape == (2, 8)
    assert len(made) == 1  # by the comparison
    np.testing.assert_array_equal(part.dense(), WEIGHT.astype(np.float16).astype(np.float32)[1:3])
    np.testing.assert_array_equal(tensor.data, WEIGHT.astype(np.float16))
    assert len(made) == 3
    with pytest.raises(AttributeError, match="no attribute 'row'"):
        _ = tensor.row
