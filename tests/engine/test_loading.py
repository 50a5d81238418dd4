"""Loading: the packed cache and what can go wrong with it, requantising, options, and what a wrong one says."""

from __future__ import annotations

import errno
import gc
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
from reference import forward
from tiny_checkpoints import bert, gguf_file, llama

from edgewise import load as front_door
from edgewise.core.errors import (
    EdgewiseError,
    FormatError,
    InvalidValueError,
    SourceError,
    StrictError,
    UnsupportedError,
    collect_notices,
)
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import Dense
from edgewise.engine import packing
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import formatted, load, model_of, requantised
from edgewise.formats.gguf_file import GgufFile
from edgewise.formats.sources import open_checkpoint
from edgewise.native.probe import tiers

IDS = list(range(5, 45))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of our own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgewise" / "packed"


@pytest.fixture
def path(tmp_path):
    return str(gguf_file(tmp_path / "tiny.gguf"))


def with_tokenizer(checkpoint):
    return replace(checkpoint, metadata={**checkpoint.metadata, "tokenizer": b"{}"})


def packed_files(home):
    """What lies in the cache once every thread has named what it packed."""
    for thread in threading.enumerate():
        if thread.name == "packing":
            thread.join()
    return list(home.glob("*.bin"))


def packed_file(home):
    found = packed_files(home)
    assert len(found) == 1
    return found[0]


class TestCache:
    def test_a_second_start_maps_what_the_first_packed(self, path, home, monkeypatch):
        first = load(path, threads=1)
        assert first.packed.cached
        before = packed_file(home).stat()
        expected = first.forward(IDS)
        assert np.array_equal(load(path, threads=1, cache=False).forward(IDS), expected)

        def never(*_):
            raise AssertionError("packed again")

        monkeypatch.setattr(packing, "_fill", never)
        again = load(path, threads=1)
        assert np.array_equal(again.forward(IDS), expected)
        assert packed_file(home).stat().st_mtime_ns == before.st_mtime_ns

    @pytest.mark.parametrize("form", ["Q8_0", "F16", "F32"])
    def test_a_second_start_reads_no_matrix_of_the_source(self, form, tmp_path, home, monkeypatch):
        path = str(gguf_file(tmp_path / "tiny.gguf", form=form))
        read = []
        check = GgufFile.check_finite
        monkeypatch.setattr(GgufFile, "check_finite", lambda file, name: (read.append(name), check(file, name)))
        expected = load(path, threads=1).forward(IDS)
        assert {"token_embd.weight", "blk.0.attn_q.weight"} <= set(read)
        read.clear()
        assert np.array_equal(load(path, threads=1).forward(IDS), expected)
        assert {name.partition("norm")[1] for name in read} == {"norm"}

    def test_a_source_with_a_wrong_scale_is_refused_and_nothing_else_is_said(self, tmp_path, home):
        path = gguf_file(tmp_path / "tiny.gguf", form="Q8_0")
        tensor = GgufFile(path).tensors["blk.0.attn_q.weight"]
        raw = bytearray(path.read_bytes())
        raw[tensor.offset:tensor.offset + 2] = np.float16(np.nan).tobytes()
        path.write_bytes(raw)
        with collect_notices() as notices, pytest.raises(FormatError, match="NaN or infinite"):
            load(str(path), threads=1)
        assert not [item for item in notices if item.kind == "degraded"]
        assert not packed_files(home)

    def test_collection_of_garbage_goes_on_after_loading(self, path, home):
        assert gc.isenabled()
        load(path, threads=1)
        assert gc.isenabled()
        with pytest.raises(SourceError):
            load(path + "-not-there")
        assert gc.isenabled()
        gc.disable()
        try:
            load(path, threads=1)
            assert not gc.isenabled()
        finally:
            gc.enable()

    @pytest.mark.parametrize("size", [0, 1000, -1, 4096])
    def test_a_file_of_the_wrong_size_is_made_again(self, path, home, size):
        expected = load(path, threads=1).forward(IDS)
        file = packed_file(home)
        whole = file.read_bytes()
        file.unlink()
        file.write_bytes(whole[:size] if size <= 1000 else whole + bytes(size))
        model = load(path, threads=1)
        assert model.packed.cached
        assert np.array_equal(model.forward(IDS), expected)
        assert packed_file(home).read_bytes() == whole

    def test_weights_are_used_before_their_file_is_on_the_disk(self, path, home, monkeypatch):
        synced = threading.Event()
        sync = os.fsync

        def slow(handle):
            if os.fstat(handle).st_size > 100_000:
                assert synced.wait(60)
            sync(handle)

        monkeypatch.setattr("edgewise.formats.cache.os.fsync", slow)
        model = load(path, threads=1)
        answered = model.forward(IDS)
        assert model.packed.cached
        assert not list(home.glob("*.bin"))
        synced.set()
        assert packed_file(home) == model.packed.file
        assert np.array_equal(load(path, threads=1).forward(IDS), answered)

    def test_a_file_that_fails_at_its_end_is_a_notice(self, path, home, monkeypatch):
        def full(*_):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr("edgewise.formats.cache.os.replace", full)
        with collect_notices() as notices:
            model = load(path, threads=1)
            assert packed_files(home) == []
        assert "could not be kept" in notices[-1].message
        assert list(home.glob(".*.part")) == []
        assert np.array_equal(model.forward(IDS), load(path, threads=1, cache=False).forward(IDS))

    def test_packing_is_given_up_where_loading_fails(self, path, home, monkeypatch):
        begun, failed = threading.Event(), threading.Event()
        monkeypatch.setattr(packing, "_fill", lambda *arguments: (begun.set(), failed.wait(60), arguments[-1]()))

        def fail(_):
            assert begun.wait(60)
            raise FormatError("no tokenizer")

        monkeypatch.setattr("edgewise.engine.loading.tokenizer_of", fail)
        with pytest.raises(FormatError, match="no tokenizer"):
            model_of(with_tokenizer(open_checkpoint(path)), threads=1)
        failed.set()
        assert packed_files(home) == []
        assert list(home.glob(".*.part")) == []

    def test_another_model_has_another_file(self, path, home, tmp_path):
        load(path, threads=1)
        load(str(gguf_file(tmp_path / "other.gguf", seed=9)), threads=1)
        load(str(gguf_file(tmp_path / "smaller.gguf", "Q4_0")), threads=1)
        assert len(packed_files(home)) == 3

    def test_a_changed_file_is_packed_again(self, path, home, tmp_path):
        old = load(path, threads=1).forward(IDS)
        os.replace(gguf_file(tmp_path / "new.gguf", seed=9), path)
        new = load(path, threads=1).forward(IDS)
        assert not np.array_equal(old, new)
        assert np.array_equal(new, load(path, threads=1, cache=False).forward(IDS))

    def test_nothing_is_written_without_cache_or_for_another_format(self, path, home):
        load(path, threads=1, cache=False)
        with collect_notices():
            load(path, threads=1, format="int8/g32")
        assert not home.exists()

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere; the next test stands in for it")
    def test_a_cache_that_cannot_be_written_is_a_notice(self, path, home):
        home.mkdir(parents=True)
        home.chmod(0o500)
        self.assert_works_with_a_notice(path)

    def test_a_cache_that_is_a_file_is_a_notice(self, path, home):
        home.parent.mkdir(parents=True)
        home.write_text("in the way")
        self.assert_works_with_a_notice(path)

    def test_a_full_disk_is_a_notice(self, path, home, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(packing.os, "posix_fallocate", full)
        self.assert_works_with_a_notice(path)
        assert packed_files(home) == []
        with collect_notices(strict=True), pytest.raises(StrictError, match="packed weights could not be cached"):
            load(path, threads=1)

    @staticmethod
    def assert_works_with_a_notice(path):
        with collect_notices() as notices:
            model = load(path, threads=1)
        assert [(n.kind, "packed again at each start" in n.message) for n in notices] == [("degraded", True)]
        assert not model.packed.cached
        assert np.array_equal(model.forward(IDS), load(path, threads=1, cache=False).forward(IDS))

    def test_progress_is_told(self, path, home):
        told = []
        load(path, threads=1, progress=lambda *args: told.append(args))
        done = [args for args in told if args[0] == "packing weights"]
        assert len(done) == 2 * 7 + 2
        assert done[-1][1] <= done[-1][2]


class TestRequantised:
    @pytest.mark.parametrize("form", ["int8/g32", "int6/g32", "int4/g32/fp16/min", "int8/axis", "int4/g16/fp16/int",
                                      "int2/g64/fp16/min", "fp4/g32/e8m0"])
    def test_the_engine_runs_what_the_plan_says(self, form):
        """Against the executor on the same rounded weights and inputs, where a code may fall the other way."""
        with collect_notices() as notices:
            model = model_of(llama(), threads=1, format=form, kv="fp32")
            plan = requantised(plan_of(llama()), QuantFormat.parse(form))
        assert [n.kind for n in notices] == ["info"]
        found, expected = model.forward(IDS), forward(plan, IDS, activations="plan")
        top = np.abs(expected).max()
        assert np.abs(found - expected).mean() < 1e-3 * top
        assert np.abs(found - expected).max() < 3e-2 * top
        assert np.abs(expected - forward(plan_of(llama()), IDS)).mean() > 2e-3 * top  # the format itself costs more

    @pytest.mark.parametrize("make", [llama, bert], ids=["llama", "bert"])
    @pytest.mark.parametrize(("form", "worst"), [("fp32", 1e-5), ("fp16", 1e-5), ("BF16", 2e-2)])
    def test_formats_without_a_scale(self, make, form, worst):
        """Against the executor; an input in bfloat16 may fall the other way. The format itself changes the outcome."""
        with collect_notices() as notices:
            model = model_of(make(), threads=2, format=form, kv="fp32")
            plan = formatted(plan_of(make()), form)
        assert [n.kind for n in notices if n.kind != "info"] == []
        found, expected = model.forward(IDS), forward(plan, IDS, activations="plan")
        top = np.abs(expected).max()
        assert np.abs(found - expected).max() < worst * top
        if form != "fp32":
            assert np.abs(expected - forward(plan_of(make()), IDS)).max() > 1e-4 * top
        if form == "BF16":
            exact = forward(plan, IDS)
            assert np.abs(found - expected).mean() < np.abs(found - exact).mean()

    def test_a_weight_that_fp16_cannot_hold(self):
        checkpoint = llama()
        name = "model.layers.1.mlp.up_proj.weight"
        big = Dense(np.full(checkpoint.tensors[name].shape, 1e6, np.float32))
        with collect_notices(), pytest.raises(InvalidValueError, match=r"up_proj.weight holds 1e\+06, which fp16 ends"):
            model_of(replace(checkpoint, tensors={**checkpoint.tensors, name: big}), threads=1, format="fp16")

    def test_bfloat16_inputs_come_with_the_format(self):
        with pytest.raises(InvalidValueError, match="come with format='bf16'"):
            model_of(llama(), threads=1, activations="bfloat16")

    def test_a_format_without_a_kernel_runs_as_floats_and_says_so(self):
        with collect_notices() as notices:
            model = model_of(llama(), threads=1, format="int4/g8")
        assert {n.kind for n in notices} == {"info", "fallback"}
        assert "runs as 16-bit floats" in notices[-1].message
        assert np.isfinite(model.forward(IDS)).all()


def test_what_a_model_says_of_itself():
    model = model_of(llama(), threads=2)
    assert repr(model).startswith("LanguageModel(llama, ")
    assert f"context 128, KV fp16, 2 threads, {model.tier}" in repr(model)
    assert model.memory.total_bytes == model.packed.nbytes + model.session.kv_nbytes + model.session.scratch_nbytes
    assert model.layers == 2
    assert len(model.checkpoint.tensors) == 0
    assert model_of(bert(), threads=1).kv == "fp32"


def test_the_front_door_is_this_load():
    assert front_door is load


@pytest.mark.parametrize("name", tiers())
def test_the_tier_is_the_one_asked_for(name, monkeypatch):
    monkeypatch.setenv("EDGEWISE_ISA", name)
    assert model_of(llama(), threads=1).tier == name


@pytest.mark.parametrize(("options", "message"), [
    ({"threads": 0}, "threads is 1 to 256; given 0"), ({"threads": 300}, "given 300"),
    ({"slots": 0}, "at least one sequence; given slots=0"), ({"context": 0}, "at least one position; given 0"),
    ({"kv": "int3"}, "KV format 'int3': expected fp16, bf16, int8, int4, fp32"),
        ({"format": "int4/x"}, "granularity 'x'"),
    ({"format": "q4"}, "not of the form")])
def test_wrong_options(options, message):
    with collect_notices(), pytest.raises(InvalidValueError, match=message):
        model_of(llama(), **{"threads": 1, **options})


def test_an_unknown_instruction_tier(monkeypatch):
    monkeypatch.setenv("EDGEWISE_ISA", "foo")
    with pytest.raises(InvalidValueError, match=r"foo.*expected"):
        model_of(llama(), threads=1)


def test_wrong_sources(tmp_path):
    with pytest.raises(SourceError, match=r"nothing\.gguf"):
        load(str(tmp_path / "nothing.gguf"))
    (tmp_path / "text.gguf").write_text("no model " * 10)
    with pytest.raises(EdgewiseError, match=r"text\.gguf"):
        load(tmp_path / "text.gguf")
    strange = llama()
    object.__setattr__(strange, "arch", "mamba")
    with pytest.raises(UnsupportedError, match="mamba"):
        load(strange)
