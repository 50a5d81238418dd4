"""Safetensors: equal to the reference library, and one clear error for every way a header can be wrong."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy as reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgewise.core.errors import (
    EdgewiseError,
    EdgewiseWarning,
    FormatError,
    InvalidValueError,
    SourceError,
    UnsupportedError,
    collect_notices,
)
from edgewise.core.numbers import BF16, FP16, FP32
from edgewise.formats import safetensors as module
from edgewise.formats.safetensors import SafetensorsFile, open_tensors, write_safetensors


def raw_file(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"a": rng.standard_normal((3, 4)).astype(np.float32), "b": rng.standard_normal(5).astype(np.float16),
              "c": np.arange(6, dtype=np.int64), "d": np.zeros((0, 3), np.float32), "e": np.array(2.5, np.float32),
              "f": np.array([True, False])}
    reference.save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file) == set(arrays)
    assert file.metadata == {"format": "pt"}
    for name, array in arrays.items():
        assert np.array_equal(file.array(name), array)
        assert file.array(name).shape == array.shape
    assert file.dense("a").number == FP32
    assert file.dense("b").number == FP16
    with pytest.raises(UnsupportedError, match=r"tensor 'c'.*I64"):
        file.dense("c")


def test_views_are_read_only_and_not_copies(tmp_path: Path) -> None:
    reference.save_file({"a": np.arange(8, dtype=np.float32)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    view = file.array("a")
    assert not view.flags.owndata
    assert not view.flags.writeable
    assert np.shares_memory(view, file.array("a"))


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrays = {"w": rng.standard_normal((7, 3)).astype(np.float32), "h": rng.standard_normal((2, 2)).astype(np.float16),
              "q": rng.integers(0, 255, (5,)).astype(np.uint8)}
    plan = {name: (module.dtype_name(array), array.shape) for name, array in arrays.items()}
    seen: list[tuple[str, int, int]] = []
    write_safetensors(tmp_path / "x.safetensors", plan, arrays.__getitem__, metadata={"format": "pt"},
                      progress=lambda *step: seen.append(step))
    back = reference.load_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(back[name], array) for name, array in arrays.items())
    assert seen[-1] == ("writing x.safetensors", 84 + 8 + 5, 84 + 8 + 5)
    with pytest.raises(InvalidValueError, match="exists"):
        write_safetensors(tmp_path / "x.safetensors", plan, arrays.__getitem__, overwrite=False)


def test_bfloat16_is_a_view_of_bits(tmp_path: Path) -> None:
    bits = np.array([[0x3F80, 0xC000]], np.uint16)
    write_safetensors(tmp_path / "x.safetensors", {"b": ("BF16", (1, 2))}, lambda _: bits)
    dense = SafetensorsFile(tmp_path / "x.safetensors").dense("b")
    assert dense.number == BF16
    assert np.array_equal(dense.dense(), [[1.0, -2.0]])


def test_unaligned_data_is_copied_and_said(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32)
    path = raw_file(tmp_path / "x.safetensors", json.dumps({"a": entry("F32", [4], 0, 16)}).encode().ljust(71),
                    values.tobytes())
    with pytest.warns(EdgewiseWarning, match="not aligned to 4 bytes"):
        array = SafetensorsFile(path).array("a")
    assert array.flags.aligned
    assert np.array_equal(array, values)
    assert np.array_equal(SafetensorsFile(path).array("a", aligned=False), values)


def test_float64_is_narrowed_and_said(tmp_path: Path) -> None:
    reference.save_file({"a": np.array([0.5])}, tmp_path / "x.safetensors")
    with collect_notices() as notices:
        assert SafetensorsFile(tmp_path / "x.safetensors").dense("a").dense() == [0.5]
    assert "narrowed to float32" in notices[0].message


GOOD = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 8, 12)}
HOSTILE: dict[str, tuple[Any, bytes, str]] = {
    "not an object": (b"[]", b"", "does not begin with"),
    "not JSON": (b"{'a'}", b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}', b"", "not UTF-8"),
    "deep": (b'{"a":' + b"[" * 90_000, b"", "nested too deeply"),
    "deep objects": (b'{"a":' * 90_000, b"", "nested too deeply"),
    "too many brackets": (b'{"a":' + b"[]," * 100_001, b"", "brackets"),
    "too many commas": (b'{"a":[' + b"1," * 200_001 + b"1]}", b"", "commas"),
    "huge integer": (b'{"a":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    "duplicate tensor": (b'{"a":%s,"a":%s}' % ((json.dumps(GOOD["a"]).encode(),) * 2), bytes(12), "two tensors"),
    "duplicate field": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "exactly"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "exactly the fields"),
    "extra field": ({"a": {**GOOD["a"], "x": 1}}, bytes(8), "exactly the fields"),
    "entry is a number": ({"a": 3}, b"", "exactly the fields"),
    "unknown dtype": ({"a": entry("F31", [2], 0, 8)}, bytes(8), "unknown dtype 'F31'"),
    "dtype is a list": ({"a": entry(["F32"], [2], 0, 8)}, bytes(8), "unknown dtype"),  # type: ignore[arg-type]
    "negative size": ({"a": entry("F32", [-2], 0, 8)}, bytes(8), "bad shape"),
    "float size": ({"a": {**GOOD["a"], "shape": [2.0]}}, bytes(8), "bad shape"),
    "boolean size": ({"a": {**GOOD["a"], "shape": [True, 2]}}, bytes(8), "bad shape"),
    "huge size": ({"a": entry("F32", [2**48], 0, 8)}, bytes(8), "bad shape"),
    "empty but huge": ({"a": entry("F32", [0, 2**60], 0, 0)}, b"", "bad shape"),
    "size overflow": ({"a": entry("F32", [2**40, 2**40], 0, 8)}, bytes(8), "data_offsets span 8"),
    "rank 17": ({"a": entry("F32", [1] * 17, 0, 4)}, bytes(4), "bad shape"),
    "shape and offsets differ": ({"a": entry("F32", [3], 0, 8)}, bytes(8), "takes 12 bytes"),
    "offsets reversed": ({"a": entry("F32", [2], 8, 0)}, bytes(8), "bad data_offsets"),
    "offsets negative": ({"a": entry("F32", [2], -8, 0)}, bytes(8), "bad data_offsets"),
    "one offset": ({"a": {**GOOD["a"], "data_offsets": [0]}}, bytes(8), "bad data_offsets"),
    "beyond the end": (GOOD, bytes(11), "ends at byte"),
    "far beyond the end": ({"a": entry("F32", [2], 2**70, 2**70 + 8)}, bytes(8), "ends at byte"),
    "overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12), "overlaps"),
    "same bytes": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, bytes(8), "overlaps"),
    "gap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 12, 16)}, bytes(16), "belong to no tensor"),
    "gap at the start": ({"a": entry("F32", [2], 4, 12)}, bytes(12), "belong to no tensor"),
    "bytes at the end": (GOOD, bytes(13), "at the end belong to no tensor"),
    "metadata is a list": ({"__metadata__": []}, b"", "__metadata__"),
    "metadata holds numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "half a surrogate pair": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "surrogate"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header(tmp_path: Path, case: str) -> None:
    header, data, message = HOSTILE[case]
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(FormatError, match=message) as caught:
        SafetensorsFile(path)
    assert caught.value.path == str(path)
    assert caught.value.offset is not None
    assert len(str(caught.value)) < 1000


def test_the_tensor_and_offset_are_named(tmp_path: Path) -> None:
    header = json.dumps({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}).encode()
    path = raw_file(tmp_path / "x.safetensors", header, bytes(12))
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(path)
    assert caught.value.tensor == "b"
    assert caught.value.offset == 8 + len(header) + 4


@pytest.mark.parametrize(("length", "message"), [(2**63, "cut off"), (100, "cut off"), (0, "does not begin")])
def test_header_length(tmp_path: Path, length: int, message: str) -> None:
    path = raw_file(tmp_path / "x.safetensors", GOOD, length=length)
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(FormatError, match=message):
        SafetensorsFile(path)


def test_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((90_000_000).to_bytes(8, "little"))
        file.truncate(100_000_000)  # sparse
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="at most 6000000 are read"):
            SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensors", "names", "metadata", "lists", "index"])
def test_the_largest_header_stays_within_64_mb(tmp_path: Path, kind: str) -> None:
    if kind == "tensors":
        count = module.TENSOR_LIMIT
        name = "model.layers.%07d.mlp.experts.down_proj.weight"
        header = {name % i: entry("F32", [1, 1], 4 * i, 4 * i + 4) for i in range(count)}
        path = raw_file(tmp_path / "x", json.dumps(header, separators=(",", ":")).encode(), bytes(4 * count))
    elif kind == "names":
        path = raw_file(tmp_path / "x", b"{" + b",".join(b'"%d":0' % i for i in range(199_000)) + b"}")
    elif kind == "index":
        path = tmp_path / "model.safetensors.index.json"
        index(tmp_path, {f"{i:050d}": "a.safetensors" for i in range(140_000)})
    elif kind == "metadata":
        path = raw_file(tmp_path / "x", {"__metadata__": {str(i): "12" for i in range(199_000)}})
    else:
        path = raw_file(tmp_path / "x", b'{"a":[' + b"[]," * 99_000 + b"1]}")
    tracemalloc.start()
    try:
        if kind in ("tensors", "metadata"):
            SafetensorsFile(path)
        else:
            with pytest.raises(FormatError):
                open_tensors(tmp_path) if kind == "index" else SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 64_000_000
    finally:
        tracemalloc.stop()


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="regular file"):
        SafetensorsFile(tmp_path / "pipe")
    with pytest.raises(SourceError, match="no such file"):
        SafetensorsFile(tmp_path / "absent")
    (tmp_path / "empty").touch()
    with pytest.raises(FormatError, match="too few"):
        SafetensorsFile(tmp_path / "empty")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_mutation_reads_or_says_why(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(json.dumps(GOOD).encode().ljust(120))
    content = bytearray(len(content).to_bytes(8, "little")) + content + bytes(12)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.safetensors"
    path.write_bytes(content[:data.draw(st.integers(0, len(content)))])
    with collect_notices() as notices:
        try:
            file = SafetensorsFile(path)
        except EdgewiseError:
            return
        for name in file:
            assert file.array(name).nbytes == file[name].nbytes
    # A header whose length was changed may still be one: then tensors are not aligned, which is said.
    assert {notice.kind for notice in notices} <= {"degraded"}


def shard(folder: Path, name: str, **arrays: np.ndarray) -> None:
    reference.save_file(arrays, folder / name)


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(tmp_path: Path) -> None:
    shard(tmp_path, "model-1.safetensors", a=np.ones(2, np.float32), c=np.zeros(1, np.float32))
    shard(tmp_path, "model-2.safetensors", b=np.full(3, 2, np.float16))
    index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with pytest.warns(EdgewiseWarning, match="1 tensors of the shards are not named"):
        files = open_tensors(tmp_path)
    assert set(files) == {"a", "b"}
    assert np.array_equal(files.dense("b").dense(), [2, 2, 2])
    assert [Path(path).name for path in files.files] == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors",
                                  ".safetensors", "x.bin", "x\0.safetensors", 7, "c:x.safetensors"])
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, name: Any) -> None:
    (tmp_path / "m").mkdir()
    shard(tmp_path, "x.safetensors", a=np.ones(1, np.float32))
    index(tmp_path / "m", {"a": name})
    with pytest.raises(FormatError, match="plain name") as caught:
        open_tensors(tmp_path / "m")
    assert caught.value.tensor == "a"


def test_wrong_indexes(tmp_path: Path) -> None:
    shard(tmp_path, "s.safetensors", a=np.ones(1, np.float32))
    index(tmp_path, {"z": "s.safetensors"})
    with pytest.raises(FormatError, match="does not hold it"):
        open_tensors(tmp_path)
    index(tmp_path, {"a": "t.safetensors"})
    with pytest.raises(FormatError, match=r"t\.safetensors is missing"):
        open_tensors(tmp_path)
    index(tmp_path, [])
    with pytest.raises(FormatError, match="weight_map"):
        open_tensors(tmp_path)


def test_folders_without_a_clear_answer(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no weights"):
        open_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UnsupportedError, match="can run code"):
        open_tensors(tmp_path)
    shard(tmp_path, "x.safetensors", a=np.ones(1, np.float32))
    with collect_notices() as notices:
        assert set(open_tensors(tmp_path)) == {"a"}
    assert notices[0].kind == "info"
    shard(tmp_path, "y.safetensors", a=np.ones(1, np.float32))
    with pytest.raises(FormatError, match="2 safetensors files"):
        open_tensors(tmp_path)
