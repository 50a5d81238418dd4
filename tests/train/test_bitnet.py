"""BitNet's rounding against its equations."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from edgewise.train.bitnet import BitLinear, ternary, ternary_weight  # noqa: E402

pytestmark = pytest.mark.slow


def test_the_weight_is_the_equation_and_its_gradient_the_identity():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    made = ternary_weight(weight)
    values = weight.detach().numpy()
    gamma = np.abs(values).astype(np.float64).mean()
    expected = [[max(-1, min(1, round(float(v) / gamma))) for v in row] for row in values]
    np.testing.assert_array_equal(np.sign(made.detach().numpy()), expected)
    np.testing.assert_allclose(np.abs(made.detach().numpy()).max(), gamma, rtol=1e-6)
    stored = ternary(values)
    assert np.array_equal(stored.codes, expected)
    np.testing.assert_allclose(stored.dense(), made.detach().numpy(), rtol=1e-6)
    upstream = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    made.backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_a_layer_multiplies_integers():
    layer = BitLinear(32, 5)
    x = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(2))
    y = layer(x).detach().numpy()
    stored = ternary(layer.weight.detach().numpy())
    peaks = np.abs(x.numpy()).max(axis=-1, keepdims=True)
    codes = np.rint(x.numpy() / (peaks / np.float32(127))).astype(np.int32)
    whole = codes @ stored.codes.T.astype(np.int32)
    expected = whole * (peaks / 127) * stored.scales[0, 0] + layer.bias.detach().numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_zeros_stay_zero():
    assert ternary_weight(torch.zeros(2, 3)).abs().max() == 0
    assert np.array_equal(ternary(np.zeros((2, 3), np.float32)).dense(), np.zeros((2, 3)))
