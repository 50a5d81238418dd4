"""Training on pictures: both layouts learn, and the model keeps the layout it came with."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from edgewise.core.errors import InvalidValueError  # noqa: E402
from edgewise.train.pictures import Epochs, learn, predictions  # noqa: E402

CONFIG = Epochs(epochs=30, batch=16, learning_rate=0.1)


def _bright_halves(*shape: int):
    """Pictures whose left or right half is bright, and which."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(2, (64,), generator=generator)
    pictures = 0.1 * torch.randn(64, *shape, generator=generator)
    half = shape[-1] // 2
    pictures[kinds == 0, ..., :half] += 1
    pictures[kinds == 1, ..., half:] += 1
    return pictures, kinds


@pytest.mark.parametrize(("shape", "first"), [
    ((3, 6, 6), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))),
    ((6, 6), nn.Sequential(nn.Flatten(), nn.Linear(36, 2))),
], ids=["channels", "rows"])
def test_a_model_learns_pictures_with_channels_and_pictures_of_rows(shape, first):
    pictures, kinds = _bright_halves(*shape)
    loss = learn(first, pictures, kinds, CONFIG)
    assert loss < 0.1
    assert np.array_equal(predictions(first, pictures), kinds.numpy())
    assert all(one.is_contiguous() for one in first.parameters())


def test_epochs_that_cannot_be_run_are_refused():
    with pytest.raises(InvalidValueError, match="batches of 2 or more"):
        Epochs(batch=1)
