"""The cache directory, file hashes that are computed once, and writing aside: whole or not at all.

Everything under the cache root is disposable. A file or folder appears under its final name only when complete:
it is written next to its destination, synced, then renamed. What a killed process left behind is swept by the next
writer of the same name.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from edgewise.core.errors import BudgetError, InvalidValueError, SourceError, notice

__all__ = ["Progress", "cache_root", "file_sha256", "files_key", "folder_aside", "locked", "write_aside"]

Progress = Callable[[str, int, int], None]
"""progress(what, done_bytes, total_bytes); total_bytes is 0 while it is unknown."""

_CHUNK_BYTES = 1 << 20
_STALE_AFTER_S = 600.0
"""An unlocked temporary older than this was left by a process that died: younger ones may be about to be locked."""


def cache_root() -> Path:
    """$XDG_CACHE_HOME/edgewise (~/.cache/edgewise), made with mode 0700. A relative XDG_CACHE_HOME is ignored."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if given and not os.path.isabs(given):
        notice("ignored", f"XDG_CACHE_HOME={given!r} is not an absolute path; ~/.cache is used", where="cache")
        given = ""
    root = (Path(given) if given else Path.home() / ".cache") / "edgewise"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(
            f"cannot create the cache directory {root}: {error.strerror or error}; "
            "set XDG_CACHE_HOME to a directory that can be written") from error
    return root


def file_sha256(path: str | Path, *, progress: Progress | None = None) -> str:
    """SHA-256 of a file in hex, remembered in the cache by path, size, times and inode."""
    path = Path(path).resolve()
    info = path.stat()
    identity = f"{path}\0{info.st_size}\0{info.st_mtime_ns}\0{info.st_ctime_ns}\0{info.st_ino}\0{info.st_dev}"
    memory: Path | None = None
    try:
        memory = cache_root() / "hashes" / hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
        known = memory.read_text("ascii").strip()
        if len(known) == 64:
            return known
    except (OSError, UnicodeDecodeError, SourceError):
        pass  # not remembered: the hash is computed
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(f"hashing {path.name}", done, info.st_size)
    value = digest.hexdigest()
    # A file changed within the resolution of its clock could change again without showing it.
    settled = time.time_ns() - max(info.st_mtime_ns, info.st_ctime_ns) > 2_000_000_000
    if memory is not None and settled:
        with suppress(OSError, BudgetError):
            memory.parent.mkdir(mode=0o700, exist_ok=True)
            with write_aside(memory) as file:
                file.write(value.encode("ascii"))
    return value


def files_key(paths: Iterable[str | Path]) -> str:
    """One key for the contents of several files, in order: the SHA-256 of their names and SHA-256 sums."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{Path(path).name}\0{file_sha256(path)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@contextmanager
def locked(path: str | Path, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock on a file for the length of the block; other processes wait. waiting: called if we do."""
    path = Path(path)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def write_aside(path: str | Path, *, overwrite: bool = True) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` when the block ends well, and not at all otherwise.

    overwrite=False: an existing file is an InvalidValueError, before anything is written.
    A full disk is a BudgetError; the temporary is removed.
    """
    path = Path(path)
    if not overwrite and os.path.lexists(path):
        raise InvalidValueError(f"{path} exists; choose another name, or ask for it to be overwritten")
    _sweep(path)
    aside = _aside_name(path)
    try:
        with open(os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "w+b") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(aside, path)
        _sync_directory(path.parent)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        _explain_full_disk(error, path)
        raise


@contextmanager
def folder_aside(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A directory that appears under `path` when the block ends well, and not at all otherwise.

    replace: an existing directory of that name makes way, at the last moment; else it is an InvalidValueError.
    """
    path = Path(path)
    if os.path.lexists(path) and not replace:
        raise InvalidValueError(f"{path} exists; choose another name, or ask for it to be overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    aside = _aside_name(path)
    try:
        aside.mkdir()
        with open(aside / ".lock", "wb") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
            yield aside
            for file in aside.rglob("*"):
                if file.is_file():
                    _sync_file(file)
            (aside / ".lock").unlink()
            former = _aside_name(path, "former")
            if os.path.lexists(path):
                os.rename(path, former)
            try:
                os.rename(aside, path)
            except OSError:
                if os.path.lexists(former):
                    os.rename(former, path)
                raise
            _sync_directory(path.parent)
            if former.is_symlink():
                former.unlink()
            elif former.exists():
                shutil.rmtree(former)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        _explain_full_disk(error, path)
        raise


def _aside_name(path: Path, end: str = "part") -> Path:
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.{end}")


def _sweep(path: Path) -> None:
    """Remove temporaries of `path` that nobody holds any more."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return
    prefix = f".{path.name}."
    for name in names:
        if not (name.startswith(prefix) and name.endswith(".part") and len(name) == len(prefix) + 13):
            continue
        stale = path.parent / name
        try:
            info = stale.lstat()
            if time.time() - info.st_mtime < _STALE_AFTER_S:
                continue
            is_folder = stat.S_ISDIR(info.st_mode)
            with open(stale / ".lock" if is_folder else stale, "rb") as held:
                fcntl.flock(held.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_folder:
                    shutil.rmtree(stale)
                else:
                    stale.unlink()
        except OSError:
            continue  # held by a living writer, or already gone


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems cannot sync a directory; the rename itself stays atomic
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(handle)


def _explain_full_disk(error: BaseException, path: Path) -> None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = shutil.disk_usage(path.parent).free
        except OSError:
            free = 0
        raise BudgetError(
            f"no space left while writing {path} ({free} bytes free there); nothing was kept of it; "
            "free some space or choose another destination") from error
