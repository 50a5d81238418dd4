"""GGUF files that lie: each is one clear error with its byte, within 64 MB."""

from __future__ import annotations

import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from edgewise.core.errors import EdgewiseError, FormatError, SourceError, UnsupportedError
from edgewise.formats.gguf import read_gguf, read_gguf_raw
from edgewise.native import _core

HUGE = 2**64 - 1
U32, F32, STRING, ARRAY = 4, 6, 8, 9


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key(name: str, value: bytes) -> bytes:
    return text(name) + value


def u32(value: int) -> bytes:
    return struct.pack("<II", U32, value)


def string(value: str) -> bytes:
    return struct.pack("<I", STRING) + text(value)


def array(kind: int, count: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, count) + raw


def tensor(name: str | bytes = "t", dimensions: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0,
           rank: int | None = None) -> bytes:
    rank = len(dimensions) if rank is None else rank
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", rank, *dimensions, kind, offset)


@dataclass
class Gguf:
    """The bytes of a file, every count of which can be a lie."""

    keys: list[bytes] = field(default_factory=lambda: [key("general.architecture", string("llama"))])
    tensors: list[bytes] = field(default_factory=lambda: [tensor()])
    data: bytes = bytes(4096)
    magic: bytes = b"GGUF"
    version: int = 3
    n_keys: int | None = None
    n_tensors: int | None = None

    def header(self) -> bytes:
        counts = (len(self.tensors) if self.n_tensors is None else self.n_tensors,
                  len(self.keys) if self.n_keys is None else self.n_keys)
        return self.magic + struct.pack("<IQQ", self.version, *counts) + b"".join(self.keys + self.tensors)

    def bytes(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % 32) + self.data


def llama_keys(**changed: bytes) -> list[bytes]:
    """Keys of a tiny Llama, some of them changed. Dots of names are written as double underscores."""
    keys = {"general__architecture": string("llama"), "llama__block_count": u32(1), "llama__embedding_length": u32(32),
            "llama__feed_forward_length": u32(32), "llama__attention__head_count": u32(2)} | changed
    return [key(name.replace("__", "."), value) for name, value in keys.items() if value]


LLAMA_TENSORS = [tensor("token_embd.weight", (32, 2)), tensor("blk.0.attn_norm.weight", (32,), offset=256)]

# name: (file, error, what it says)
HEADERS: dict[str, tuple[Gguf, type[EdgewiseError], str]] = {
    "magic": (Gguf(magic=b"GGML"), FormatError, "not a GGUF file"),
    "version 1": (Gguf(version=1), UnsupportedError, "version 1; versions 2 and 3 are read"),
    "version 9": (Gguf(version=9), FormatError, "version 9; expected 2 or 3"),
    "big endian": (Gguf(version=3 << 24), UnsupportedError, "big-endian"),
    "tensor count": (Gguf(n_tensors=HUGE), FormatError, f"claims {HUGE} tensors in a file of"),
    "tensor count, just too many": (Gguf(n_tensors=2), FormatError, "ends inside|claims|dimensions|a tensor's name"),
    "key count": (Gguf(n_keys=HUGE), FormatError, f"claims {HUGE} keys in a file of"),
    "key count above the cap": (Gguf(n_keys=70_000, data=bytes(1 << 20)), FormatError, "at most 65536 are read"),
    "key name length": (Gguf(keys=[text("k", HUGE)]), FormatError, f"the name of a key claims {HUGE} bytes"),
    "empty key name": (Gguf(keys=[key("", u32(1))]), FormatError, "a key's name has 0 bytes"),
    "long key name": (Gguf(keys=[key("k" * 70_000, u32(1))]), FormatError, "has 70000 bytes; expected 1 to 65535"),
    "key name not UTF-8": (Gguf(keys=[text(b"\xff\xfe") + u32(1)]), FormatError, "a key's name is not valid UTF-8"),
    "value type": (Gguf(keys=[key("k", struct.pack("<II", 77, 1))]), FormatError, "value type 77 of a key"),
    "string length": (Gguf(keys=[key("k", struct.pack("<I", STRING) + text("", HUGE))]), FormatError,
                      f"a string under a key claims {HUGE} bytes"),
    "array length": (Gguf(keys=[key("k", array(U32, HUGE))]), FormatError, f"an array claims {HUGE} elements"),
    "array length, product overflows": (Gguf(keys=[key("k", array(U32, 2**62))]), FormatError, "an array claims"),
    "array of strings length": (Gguf(keys=[key("k", array(STRING, 2**40))]), FormatError, "an array claims"),
    "array of strings, lying": (Gguf(keys=[key("k", array(STRING, 3, text("a") + text("b", 2**50)))]), FormatError,
                                "a string under a key claims"),
    "array element type": (Gguf(keys=[key("k", array(99, 1, bytes(8)))]), FormatError, "value type 99"),
    "array of arrays": (Gguf(keys=[key("k", array(ARRAY, 1, array(ARRAY, 1)[4:]))]), FormatError, "an array of arrays"),
    "the same key twice": (Gguf(keys=[key("k", u32(1)), key("k", u32(2))]), FormatError, "key 'k' occurs twice"),
    "alignment 0": (Gguf(keys=[key("general.alignment", u32(0))]), FormatError, "general.alignment is 0"),
    "alignment 48": (Gguf(keys=[key("general.alignment", u32(48))]), FormatError, "general.alignment is 48"),
    "alignment 2^31": (Gguf(keys=[key("general.alignment", u32(1 << 31))]), FormatError, "alignment is 2147483648"),
    "alignment a string": (Gguf(keys=[key("general.alignment", string("32"))]), FormatError, "not a 32-bit unsigned"),
    "tensor name length": (Gguf(tensors=[text("t", HUGE) + bytes(64)]), FormatError, "the name of a tensor claims"),
    "empty tensor name": (Gguf(tensors=[tensor("")]), FormatError, "a tensor's name has 0 bytes"),
    "long tensor name": (Gguf(tensors=[tensor("t" * 2000)]), FormatError, "has 2000 bytes; expected 1 to 1024"),
    "tensor name not UTF-8": (Gguf(tensors=[tensor(b"\xff")]), FormatError, "a tensor's name is not valid UTF-8"),
    "the same tensor twice": (Gguf(tensors=[tensor(), tensor(offset=128)]), FormatError, "tensor 't' occurs twice"),
    "rank 0": (Gguf(tensors=[tensor(dimensions=())]), FormatError, "'t', byte .*: 0 dimensions; expected 1 to 4"),
    "rank 5": (Gguf(tensors=[tensor(dimensions=(1,) * 5)]), FormatError, "5 dimensions; expected 1 to 4"),
    "rank 2^32-1": (Gguf(tensors=[tensor(rank=2**32 - 1)]), FormatError, "4294967295 dimensions"),
    "dimension 0": (Gguf(tensors=[tensor(dimensions=(32, 0))]), FormatError, "'t', byte .*: a dimension is zero"),
    "dimensions overflow": (Gguf(tensors=[tensor(dimensions=(2**32, 2**32))]), FormatError, "product overflows"),
    "dimensions wrap to 64": (Gguf(tensors=[tensor(dimensions=(2**63, 2, 64))]), FormatError, "product overflows"),
    "bytes overflow": (Gguf(tensors=[tensor(dimensions=(2**61,))]), FormatError, "product overflows"),
    "row not whole blocks": (Gguf(tensors=[tensor(dimensions=(33,), kind=2)]), FormatError,
                             r"rows of 33 values are not whole blocks of 32 \(Q4_0\)"),
    "unknown block type": (Gguf(tensors=[tensor(kind=1000)]), FormatError, "block type 1000 is not read"),
    "removed block type": (Gguf(tensors=[tensor(kind=4)]), FormatError, "block type 4 is not read"),
    "block type of others": (Gguf(tensors=[tensor(dimensions=(256,), kind=16)]), UnsupportedError,
                             r"tensor 't', byte .*: block type 16 \(IQ2_XXS\) is not read"),
    "offset misaligned": (Gguf(tensors=[tensor(offset=16)]), FormatError, "offset 16 is not a multiple of the"),
    "offset outside": (Gguf(tensors=[tensor(offset=1 << 40)]), FormatError, "reach beyond the end of the file"),
    "offset wraps": (Gguf(tensors=[tensor(offset=2**64 - 32)]), FormatError, "reach beyond the end of the file"),
    "tensor too long": (Gguf(tensors=[tensor(dimensions=(1 << 20,))]), FormatError, "reach beyond the end of the file"),
    "tensors overlap": (Gguf(tensors=[tensor("a"), tensor("b", offset=96)]), FormatError,
                        "tensor 'b', byte .*: overlaps tensor 'a'"),
    "tensors in one place": (Gguf(tensors=[tensor("a"), tensor("b")]), FormatError, "overlaps tensor"),
    "no data": (Gguf(data=b""), FormatError, "reach beyond the end of the file"),
}
MODELS: dict[str, tuple[Gguf, type[EdgewiseError], str]] = {
    "no architecture": (Gguf(keys=[]), FormatError, "general.architecture is missing"),
    "architecture a number": (Gguf(keys=[key("general.architecture", u32(1))]), FormatError, "not a string"),
    "architecture unknown": (Gguf(keys=[key("general.architecture", string("x"))]), UnsupportedError,
                             "architecture 'x'"),
    "architecture not UTF-8": (Gguf(keys=[key("general.architecture", struct.pack("<I", STRING) + text(b"\xff"))]),
                               FormatError, "a string is not valid UTF-8"),
    **{f"block_count {name}": (Gguf(keys=llama_keys(llama__block_count=value), tensors=LLAMA_TENSORS), FormatError,
                               says)
       for name, value, says in (
           ("missing", b"", "llama.block_count is missing"), ("a string", string("1"), "block_count is not a number"),
           ("zero", u32(0), "is 0; expected a positive number"),
           ("huge", u32(2**31 - 1), "the tensors are of 1 layers"),
           ("a boolean", struct.pack("<IB", 7, 1), "is not a number"),
           ("NaN", struct.pack("<If", F32, np.nan), "is nan; expected a positive number"))},
    "heads do not divide": (Gguf(keys=llama_keys(llama__attention__head_count=u32(3)), tensors=LLAMA_TENSORS),
                            FormatError, "32 is not a multiple of"),
    "kv heads do not divide": (Gguf(keys=llama_keys(llama__attention__head_count_kv=u32(4)), tensors=LLAMA_TENSORS),
                               FormatError, "head_count 2 is not a multiple of head_count_kv 4"),
    "heads differ per layer": (
        Gguf(keys=llama_keys(llama__attention__head_count=array(U32, 2, struct.pack("<II", 1, 2))),
             tensors=LLAMA_TENSORS), UnsupportedError, "differs from layer to layer"),
    "split count a string": (Gguf(keys=[*llama_keys(), key("split.count", string("2"))]), FormatError,
                             "key split.count is not an integer"),
    "split count huge": (Gguf(keys=[*llama_keys(), key("split.count", u32(2**31))]), FormatError,
                         "one of 2147483648 shards"),
    "no embedding": (Gguf(keys=llama_keys(), tensors=LLAMA_TENSORS[1:]), FormatError,
                     "there is no tensor token_embd.weight"),
    "layer number": (Gguf(keys=llama_keys(),
                          tensors=[LLAMA_TENSORS[0], tensor("blk.999999.attn_norm.weight", offset=256)]), FormatError,
                     "the tensors are of 1 layers"),
    "lineage": (Gguf(keys=[*llama_keys(), key("edgewise.lineage", string("[" * 100_000))], tensors=LLAMA_TENSORS),
                FormatError, "edgewise.lineage is malformed"),
}


@pytest.mark.parametrize("name", [*HEADERS, *MODELS])
def test_one_clear_error(tmp_path: Path, name: str) -> None:
    file, error, message = (HEADERS | MODELS)[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(file.bytes())
    if name in HEADERS:
        with pytest.raises(error, match=message) as caught:
            read_gguf_raw(path)
        assert "byte " in str(caught.value)
    with pytest.raises(error, match=message) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(str(path))


def test_the_file_that_the_lies_are_made_from_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(Gguf(keys=llama_keys(), tensors=LLAMA_TENSORS).bytes())
    assert len(read_gguf(path).tensors) == 2
    path.write_bytes(Gguf().bytes())
    assert len(read_gguf_raw(path)[1]) == 1


def test_cut_off_anywhere(tmp_path: Path) -> None:
    keys = [*llama_keys(), key("k", array(STRING, 2, text("a") + text("b"))), key("n", array(U32, 1, bytes(4)))]
    whole = Gguf(keys=keys, tensors=LLAMA_TENSORS, data=bytes(384)).bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    assert len(read_gguf_raw(path)[1]) == 2
    for length in range(len(whole)):
        with pytest.raises(ValueError) as caught:
            _core.parse_gguf(np.frombuffer(whole[:length], np.uint8))
        assert caught.value.args[1] <= length
    for length in (0, 3, 23, 24, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"m\.gguf, .*byte \d+: "):
            read_gguf_raw(path)


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none.gguf", "no such file"), (tmp_path, "not a regular file"),
                          (Path("/dev/zero"), "not a regular file")):
        with pytest.raises(SourceError, match=message):
            read_gguf(path)


def test_offsets_into_the_file_are_checked_again() -> None:
    data = np.frombuffer(text("abc"), np.uint8)
    assert _core.gguf_strings(data, 0, 1) == ["abc"]
    for offset, count in ((0, 2), (4, 1), (12, 1), (2**63, 1), (0, 2**63)):
        with pytest.raises(ValueError):
            _core.gguf_strings(data, offset, count)


WORST: dict[str, Callable[[], Gguf]] = {
    "64k keys": lambda: Gguf(keys=[key(f"{i:05}", u32(i)) for i in range(65_000)]),
    "a million empty strings": lambda: Gguf(keys=[key("k", array(STRING, 1 << 20, bytes(8 << 20)))]),
    "30k tensors": lambda: Gguf(tensors=[tensor(f"{i:05}", (8,), offset=32 * i) for i in range(30_000)]),
}


def test_memory_stays_below_64_megabytes(tmp_path: Path) -> None:
    """Address space is capped 64 MB above what the reader takes when idle; files are up to 9 MB of that."""
    for number, (file, _, _) in enumerate((HEADERS | MODELS).values()):
        (tmp_path / f"{number}.gguf").write_bytes(file.bytes())
    for name, make in WORST.items():
        (tmp_path / f"{name}.gguf").write_bytes(make().bytes())
    program = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        import edgewise.formats.gguf as gguf
        from edgewise.core.errors import EdgewiseError, collect_notices
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 64_000_000, used + 64_000_000))
        errors = 0
        for path in sorted(Path(sys.argv[1]).iterdir()):
            with collect_notices():
                try:
                    gguf.read_gguf(path)
                except EdgewiseError:
                    errors += 1
                try:
                    gguf.read_gguf_raw(path)
                except EdgewiseError:
                    pass
        print(errors)
    """)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert int(done.stdout) == len(HEADERS) + len(MODELS) + len(WORST)
