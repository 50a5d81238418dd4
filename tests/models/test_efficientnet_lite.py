"""The network in the wheel is the published one, to the padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgewise.core.errors import FormatError
from edgewise.models import efficientnet_lite
from edgewise.models.efficientnet_lite import EfficientNetLite, SameConv2d, efficientnet_lite0

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("size", "kernel", "stride"), [(9, 3, 1), (9, 3, 2), (8, 3, 2), (8, 5, 2), (7, 5, 2)])
def test_same_padding_is_tensorflows(size, kernel, stride):
    torch.manual_seed(0)
    conv = SameConv2d(2, 3, kernel, stride, bias=False)
    x = torch.randn(1, 2, size, size)
    made = conv(x).detach()
    assert made.shape[2] == -(-size // stride)
    # Slow: output i reads inputs from i * stride - before, before = half of what is missing, rounded down.
    before = max((made.shape[2] - 1) * stride + kernel - size, 0) // 2
    wide = functional.pad(x, (before, kernel, before, kernel))
    for row in range(made.shape[2]):
        for column in range(made.shape[3]):
            patch = wide[0, :, row * stride:row * stride + kernel, column * stride:column * stride + kernel]
            expected = (conv.weight * patch).sum(dim=(1, 2, 3)).detach()
            np.testing.assert_allclose(made[0, :, row, column], expected, rtol=0, atol=1e-5)


def drawn():
    """A ball, a traffic light, a chequered board: (3, 3, 224, 224) in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(224.0), torch.arange(224.0), indexing="ij")
    ball = torch.where((y - 112)**2 + (x - 112)**2 < 67**2, 0.5, -0.8).expand(3, 224, 224)
    light = torch.full((3, 224, 224), -0.2)
    light[:, 40:190, 80:144] = -0.9
    for place, colour in enumerate(((1, -1, -1), (1, 0.8, -1), (-1, 1, -0.5))):
        lamp = (y - 65 - 50 * place)**2 + (x - 112)**2 < 20**2
        light[:, lamp] = torch.tensor(colour, dtype=torch.float32)[:, None]
    board = ((y // 28 + x // 28) % 2 * 2 - 1).expand(3, 224, 224)
    return torch.stack([ball, light, board])


def test_the_weights_know_what_is_drawn():
    model = efficientnet_lite0()
    assert sum(value.numel() for value in model.parameters()) == pytest.approx(4.65e6, rel=0.01)  # published: 4.7 M
    with torch.no_grad():
        found = model(torch.cat([drawn(), torch.zeros(1, 3, 224, 224)]))
    assert found[0].argmax() == 722  # ping-pong ball
    assert 920 in found[1].topk(2).indices  # traffic light
    assert found[2].argmax() == 918  # crossword puzzle
    assert torch.softmax(found[3], dim=0).max() < 0.01  # of nothing, nothing


def test_a_broken_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    monkeypatch.setattr(efficientnet_lite, "fetch", lambda *args, **options: tmp_path / "broken.pth")
    with pytest.raises(FormatError, match="not the weights"):
        efficientnet_lite0()
    torch.save({}, tmp_path / "broken.pth")
    with pytest.raises(FormatError, match="not the weights"):
        efficientnet_lite0()


def test_features_are_what_the_classes_read():
    torch.manual_seed(0)
    model = EfficientNetLite(classes=4, size=32).build().eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        np.testing.assert_allclose(model._fc(model.features(x)), model(x), rtol=0, atol=1e-6)
