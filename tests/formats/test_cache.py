"""Whole or not at all: what writers leave behind, and hashes that are remembered without being wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgewise.core.errors import BudgetError, EdgewiseWarning, InvalidValueError, SourceError
from edgewise.formats import cache
from edgewise.formats.cache import cache_root, file_sha256, files_key, folder_aside, locked, write_aside


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "edgewise"


def age(path: Path, seconds: float = 3600) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_root_is_private_and_follows_xdg(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root() == root
    assert root.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    with pytest.warns(EdgewiseWarning, match="not an absolute path"):
        assert cache_root() == tmp_path / ".cache" / "edgewise"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == tmp_path / ".cache" / "edgewise"


def test_root_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="set XDG_CACHE_HOME"):
        cache_root()


def test_hash_is_right_remembered_and_renewed(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"one")
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert not (root / "hashes").exists()  # too young to be trusted next time
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**10)
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    [memory] = (root / "hashes").iterdir()
    memory.write_text("0" * 64)
    assert file_sha256(path) == "0" * 64  # it is the memory that answers
    modified = path.stat().st_mtime_ns
    path.write_bytes(b"two")
    os.utime(path, ns=(modified, modified))
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest()  # same name, size and time of modification
    memory.write_text("not a hash")
    assert len(file_sha256(path)) == 64


def test_hash_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"x").hexdigest()


def test_key_of_several_files_depends_on_content_name_and_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    keys = {files_key([one, two]), files_key([two, one]), files_key([one])}
    two.write_bytes(b"3")
    keys.add(files_key([one, two]))
    assert len(keys) == 4


def test_write_aside_appears_when_done(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with write_aside(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    with pytest.raises(InvalidValueError, match="exists"), write_aside(path, overwrite=False) as file:
        file.write(b"other")
    with pytest.raises(TypeError), write_aside(path) as file:
        file.writelines([b"half", "not bytes"])  # type: ignore[list-item]
    assert path.read_bytes() == b"new"
    assert [found.name for found in tmp_path.iterdir()] == ["x"]


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="no space left while writing"), write_aside(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(BudgetError, match="no space left"), folder_aside(tmp_path / "y"):
        raise OSError(errno.ENOSPC, "full")
    assert not list(tmp_path.iterdir())


def test_folder_aside_replaces_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with folder_aside(path) as aside:
        (aside / "a").write_text("1")
    with pytest.raises(InvalidValueError, match="exists"), folder_aside(path):
        pass
    with pytest.raises(FileNotFoundError), folder_aside(path, replace=True) as aside:
        (aside / "a" / "b").write_text("2")
    assert (path / "a").read_text() == "1"
    with folder_aside(path, replace=True) as aside:
        (aside / "b").write_text("2")
        assert (path / "a").exists()
    assert [found.name for found in path.iterdir()] == ["b"]
    assert [found.name for found in tmp_path.iterdir()] == ["m"]


def test_a_folder_whose_place_is_refused_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    with folder_aside(path) as aside:
        (aside / "a").write_text("1")
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name.endswith(".part"):
            raise PermissionError(errno.EACCES, "no")
        rename(source, target)

    monkeypatch.setattr(cache.os, "rename", refuse)
    with pytest.raises(PermissionError), folder_aside(path, replace=True):
        pass
    assert (path / "a").read_text() == "1"


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    program = ("import os, sys; from pathlib import Path; from edgewise.formats.cache import *\n"
               "with write_aside(Path(sys.argv[1])) as f, folder_aside(Path(sys.argv[2])) as d:\n"
               "    f.write(b'half'); f.flush(); (d / 'a').write_text('half'); os._exit(9)")
    import edgewise

    source = str(Path(edgewise.__file__).parent.parent)
    finished = subprocess.run([sys.executable, "-c", program, str(tmp_path / "x"), str(tmp_path / "m")], check=False,
                              env={**os.environ, "PYTHONPATH": source})
    assert finished.returncode == 9
    parts = sorted(found for found in tmp_path.iterdir() if found.name.endswith(".part"))
    assert [found.name.split(".")[1] for found in parts] == ["m", "x"]
    assert not (tmp_path / "x").exists()
    with write_aside(tmp_path / "x"):
        pass
    assert all(part.exists() for part in parts)  # young ones may belong to a writer that is just starting
    for part in parts:
        age(part)
    with write_aside(tmp_path / "x"), folder_aside(tmp_path / "m"):
        pass
    assert not any(part.exists() for part in parts)


def test_a_living_writer_is_not_swept(tmp_path: Path) -> None:
    with write_aside(tmp_path / "x") as first:
        first.write(b"1")
        first.flush()
        [part] = tmp_path.iterdir()
        age(part)
        with write_aside(tmp_path / "x") as second:
            second.write(b"2")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_lock_is_exclusive(tmp_path: Path) -> None:
    waited: list[bool] = []
    with locked(tmp_path / "l"), pytest.raises(KeyError), locked(tmp_path / "l", waiting=lambda: stop(waited)):
        pass
    assert waited == [True]
    with locked(tmp_path / "l", waiting=lambda: stop(waited)):
        pass
    assert waited == [True]


def stop(waited: list[bool]) -> None:
    """Called instead of waiting for a lock that this process itself holds."""
    waited.append(True)
    raise KeyError
