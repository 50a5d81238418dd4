"""The fused clipping against LearnedClip, whose gradients autograd makes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402

from edgewise.core.errors import InvalidValueError  # noqa: E402
from edgewise.core.numbers import QuantFormat, dequantize, quantize  # noqa: E402
from edgewise.train import clipping  # noqa: E402
from edgewise.train.clipping import clipped_quantize  # noqa: E402
from edgewise.train.fake_quant import LearnedClip  # noqa: E402

pytestmark = pytest.mark.slow
FORMATS = ["int8/tensor/fp32/int", "int4/axis/fp32/int", "int8/tensor/fp32", "int4/axis/fp32", "int2/axis/fp32/int"]


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("offset", [0.0, 4.0, -4.0])
@pytest.mark.parametrize("share", [4.0, 0.5])
def test_values_and_gradients_are_those_of_the_plain_way(text, offset, share):
    fmt = QuantFormat.parse(text)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(24, 40, generator=generator) + offset).requires_grad_()
    plain = LearnedClip((24, 40), fmt, initial=share)
    direction = torch.randn(24, 40, generator=generator)
    expected = plain(weight)
    (expected * direction).sum().backward()
    grads = weight.grad.clone(), plain.upper.grad.clone(), plain.lower.grad.clone()
    weight.grad = None
    upper, lower = (p.detach().reshape(-1, 1).clone().requires_grad_() for p in (plain.upper, plain.lower))
    found = clipped_quantize(weight, upper, lower, fmt)
    assert torch.equal(found, expected)
    clipped = plain.clip(weight).detach().numpy()
    codes, scales, zeros = quantize(clipped, fmt)
    assert np.array_equal(dequantize(codes, scales, fmt, zeros=zeros), found.detach().numpy())
    (found * direction).sum().backward()
    for mine, theirs in zip((weight.grad, upper.grad, lower.grad), grads, strict=True):
        assert (mine.reshape(-1) - theirs.reshape(-1)).abs().max() <= 2e-5 * theirs.abs().max() + 1e-6


def test_weights_that_are_all_zero_stay_so():
    fmt = QuantFormat.parse("int4/axis/fp32/int")
    weight = torch.zeros(3, 8, requires_grad=True)
    upper = torch.full((3, 1), 4.0, requires_grad=True)
    made = clipped_quantize(weight, upper, upper, fmt)
    made.sum().backward()
    assert torch.equal(made, weight)
    assert torch.isfinite(upper.grad).all()


def test_other_formats_are_refused():
    for text in ("int4/g32/fp32/int", "int4/axis/fp16/int", "nf4/axis/fp32", "int4/axis/fp32/min"):
        with pytest.raises(InvalidValueError, match="learned clipping"):
            clipped_quantize(torch.ones(2, 32), torch.ones(2, 1), torch.ones(2, 1), QuantFormat.parse(text))


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("stripe", [1 << 17, 80, 1])
@pytest.mark.parametrize("given", ["columns", "rows", "both"])
def test_factors_of_columns_and_rows_learn_as_if_the_weight_were_made(text, stripe, given, monkeypatch):
    monkeypatch.setattr(clipping, "_STRIPE", stripe)
    fmt, generator = QuantFormat.parse(text), torch.Generator().manual_seed(1)
    weight = torch.randn(24, 40, generator=generator)
    weight[3, 5] = weight[7, 5] = weight.max() + 1  # an extreme that two hold
    # Powers of two, so that the two that hold it still do.
    columns, rows = (torch.exp2(torch.randint(-1, 2, (size,), generator=generator).float()).requires_grad_()
                     for size in (40, 24))
    used = {name: value for name, value in (("columns", columns), ("rows", rows)) if given in (name, "both")}
    plain = LearnedClip((24, 40), fmt, initial=1.0)
    made = weight * used["columns"] if "columns" in used else weight
    expected = plain(made / used["rows"][:, None] if "rows" in used else made)
    direction = torch.randn(24, 40, generator=generator)
    (expected * direction).sum().backward()
    learned = [*used.values(), plain.upper, plain.lower]
    grads = [part.grad.clone() for part in learned]
    for part in learned:
        part.grad = None
    upper, lower = (p.detach().reshape(-1, 1).clone().requires_grad_() for p in (plain.upper, plain.lower))
    found = clipped_quantize(weight, upper, lower, fmt, **used)
    assert torch.equal(found, expected)
    (found * direction).sum().backward()
    for mine, theirs in zip([*used.values(), upper, lower], grads, strict=True):
        assert (mine.grad.reshape(-1) - theirs.reshape(-1)).abs().max() <= 2e-5 * theirs.abs().max() + 1e-6
