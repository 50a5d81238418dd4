"""Pictures of known kind, in the proportion that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.data.lesions import KINDS, lesions


def test_they_follow_their_seed():
    first, again, other = (lesions(12, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
    assert first[0].shape == (12, 3, 32, 32)
    assert first[0].dtype == np.float32
    assert np.abs(first[0]).max() < 2


@pytest.mark.parametrize(("count", "shares", "expected"), [
    (300, (1, 1, 1), [100, 100, 100]), (100, (70, 25, 5), [69, 25, 6]), (3, (98, 1, 1), [1, 1, 1]),
    (10, (98, 1, 1), [8, 1, 1]), (7, (1, 1, 1), [3, 2, 2])])
def test_kinds_come_in_the_shares_asked_for(count, shares, expected):
    kinds = lesions(count, 0, size=8, shares=shares)[1]
    assert np.bincount(kinds, minlength=len(KINDS)).tolist() == expected


def test_the_answer_lies_in_what_was_drawn_for_it():
    """Without noise and hairs' help: a mottled mark has more colours inside, a ragged one a longer outline."""
    pictures, kinds = lesions(600, 0, size=48, noise=0.0)
    dark = pictures.mean(axis=1)
    mark = dark < np.quantile(dark, 0.35, axis=(1, 2), keepdims=True)
    length = (mark[:, 1:] != mark[:, :-1]).sum(axis=(1, 2)) + (mark[:, :, 1:] != mark[:, :, :-1]).sum(axis=(1, 2))
    spread = np.array([np.ptp(np.quantile(picture[inside], (0.05, 0.95)))
                       for picture, inside in zip(dark, mark, strict=True)])
    outline, colours = ([np.median(values[kinds == kind]) for kind in range(3)] for values in (length, spread))
    assert outline[1] > 1.1 * outline[0]
    assert colours[2] > 1.1 * colours[0]


def test_too_few_or_odd_shares_are_refused():
    for count, shares in ((2, (1, 1, 1)), (9, (1, 1)), (9, (1, 0, 1))):
        with pytest.raises(InvalidValueError, match="three"):
            lesions(count, 0, shares=shares)
