"""What is kept comes back to the bit, under its own key alone, and never takes more room than it may."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.fit.memo import Memo
from tiny_checkpoint import tiny_checkpoint


@pytest.fixture
def memo(tmp_path):
    (tmp_path / "made").mkdir()
    return Memo(tmp_path / "made", 10**8)


def test_what_is_kept_comes_back(memo):
    source = tiny_checkpoint()
    memo.put("a", source, {"seconds": 1.5})
    made, record = memo.get("a")
    assert record == {"seconds": 1.5}
    assert made.files == ()
    assert all(np.array_equal(made.tensors[name].dense(), source.tensors[name].dense()) for name in source.tensors)
    assert made.metadata["tokenizer"] == source.metadata["tokenizer"]
    assert memo.get("b") is None


def test_the_oldest_goes_when_there_is_no_room_and_what_is_read_from_it_stays(memo):
    source = tiny_checkpoint()
    memo.put("a", source, {})
    made, _ = memo.get("a")
    whole = sum(path.stat().st_size for path in memo.folder.rglob("*") if path.is_file())
    tight = Memo(memo.folder, whole * 3 // 2)
    tight.put("b", source, {})
    assert tight.get("a") is None
    assert tight.get("b") is not None
    name = "model.norm.weight"
    assert np.array_equal(made.tensors[name].dense(), source.tensors[name].dense())


def test_too_large_is_not_kept(memo):
    Memo(memo.folder, 10).put("a", tiny_checkpoint(), {})
    assert memo.get("a") is None


@pytest.mark.parametrize("damage", ["no record", "a torn record", "another key", "no model"])
def test_a_damaged_entry_is_none(memo, damage):
    memo.put("a", tiny_checkpoint(), {})
    (at,) = (path for path in memo.folder.iterdir() if path.is_dir())
    if damage == "no record":
        (at / "record.json").unlink()
    elif damage == "a torn record":
        (at / "record.json").write_text('{"key": "a')
    elif damage == "another key":
        (at / "record.json").write_text(json.dumps({"key": "b"}))
    else:
        (at / "model" / "config.json").unlink()
    assert memo.get("a") is None


def test_a_limit_is_not_negative(tmp_path):
    with pytest.raises(InvalidValueError, match="at least 0"):
        Memo(tmp_path, -1)
