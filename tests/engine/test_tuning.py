"""What a machine was tuned to: stored, read back, checked, ignored where it does not belong, and used by load."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_checkpoints import gguf_file

from edgewise.core.errors import collect_notices
from edgewise.engine import tuning
from edgewise.engine.loading import load
from edgewise.engine.tuning import Tuning, fingerprint, save_tuning, stored_tuning, tuning_file

SOME = Tuning(threads=1, batch=64, huge_pages=False, runs_per_thread=3, farthest_nbytes=4096)
IDS = list(range(5, 45))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGEWISE_TUNING")


def read():
    with collect_notices() as notices:
        return stored_tuning(), [item.kind for item in notices]


def test_a_machine_that_was_never_tuned_has_the_defaults():
    assert read() == (Tuning(), [])
    assert Tuning().changed == {}


def test_what_is_stored_is_read_back():
    path = save_tuning(SOME, {"decode": {"ratio": 1.1}})
    assert read() == (SOME, [])
    assert json.loads(path.read_bytes())["gains"] == {"decode": {"ratio": 1.1}}
    assert SOME.changed == {"threads": 1, "batch": 64, "huge_pages": False, "runs_per_thread": 3,
                            "farthest_nbytes": 4096}
    native = SOME.native
    assert (native.runs_per_thread, native.farthest_nbytes, native.spins_before_yield) == (3, 4096, 20_000)


def test_another_machine_has_its_own(monkeypatch):
    save_tuning(SOME, {})
    here = fingerprint()
    for name in here:
        monkeypatch.setattr(tuning, "fingerprint", lambda name=name: {**here, name: "another"})
        assert read() == (Tuning(), []), name
    monkeypatch.setattr(tuning, "fingerprint", lambda: here)
    assert read() == (SOME, [])


def test_it_can_be_switched_off(monkeypatch):
    save_tuning(SOME, {})
    monkeypatch.setenv("EDGEWISE_TUNING", "off")
    assert read() == (Tuning(), [])


@pytest.mark.parametrize("settings", [
    {"threads": 0}, {"threads": "2"}, {"threads": True}, {"batch": 10**9}, {"huge_pages": 1}, {"runs_per_thread": None},
    {"colour": 3}, {"farthest_nbytes": -1}, [], None], ids=str)
def test_settings_that_nobody_stores_are_a_notice(settings):
    save_tuning(SOME, {})
    path = tuning_file()
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "settings": settings}))
    assert read() == (Tuning(), ["ignored"] if settings != [] else [])


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b"{}", b'{"fingerprint": {}}',
                                  b"[" * 10**5], ids=lambda text: repr(text[:20]))
def test_a_damaged_file_is_a_notice(text):
    save_tuning(SOME, {})
    tuning_file().write_bytes(text)
    assert read() == (Tuning(), ["ignored"])


def test_a_file_of_another_machine_under_this_name_is_a_notice():
    save_tuning(SOME, {})
    path = tuning_file()
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "fingerprint": {**fingerprint(), "physical": 999}}))
    assert read() == (Tuning(), ["ignored"])


def test_a_file_that_cannot_be_read_is_a_notice():
    save_tuning(SOME, {})
    path = tuning_file()
    path.unlink()
    path.mkdir()
    assert read() == (Tuning(), ["ignored"])


class TestLoad:
    @pytest.fixture
    def path(self, tmp_path):
        return str(gguf_file(tmp_path / "tiny.gguf"))

    def test_it_runs_as_tuned_and_answers_the_same(self, path):
        before = load(path)
        expected = before.forward(IDS)
        assert before.tuning == Tuning()
        save_tuning(SOME, {})
        tuned = load(path)
        assert tuned.tuning == SOME
        assert (tuned.session.threads, tuned.session.batch) == (1, 64)
        assert np.array_equal(tuned.forward(IDS), expected)
        assert np.array_equal(load(path, cache=False).forward(IDS), expected)

    def test_what_the_caller_says_goes_before(self, path):
        save_tuning(SOME, {})
        model = load(path, threads=2, batch=32)
        assert (model.session.threads, model.session.batch) == (2, 32)
        assert load(path, tuning=Tuning()).session.batch == 256

    def test_a_memory_cap_chooses_the_batch(self, path):
        save_tuning(Tuning(batch=512), {})
        assert load(path).session.batch == 512
        assert load(path, memory_bytes=50_000_000).session.batch == 256
