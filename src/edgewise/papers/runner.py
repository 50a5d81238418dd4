"""Run recipes: seeds, resumption, verdicts, files.

The run of a seed is kept in the cache until all seeds are through, so that an interrupted reproduction goes on where
it stopped; it is forgotten when the recipe's file, its settings or the version of edgewise changes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import json
import pkgutil
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import edgewise.papers as room
from edgewise import __version__
from edgewise.core.checkpoint import Step
from edgewise.core.errors import InvalidValueError, collect_notices, notice
from edgewise.core.recipe import Recipe, Scale
from edgewise.core.report import Report
from edgewise.formats.cache import cache_root, write_aside
from edgewise.measure.machine import usable_cores
from edgewise.papers.verdicts import judge, metrics_of, summary
from edgewise.report import render

__all__ = ["SCALES", "read_results", "recipe_of", "reproduce", "slugs", "without_paths", "write_results"]

SCALES: tuple[Scale, ...] = ("smoke", "small", "paper")
Progress = Callable[[str, int, int], None]


@lru_cache(maxsize=1)
def slugs() -> tuple[str, ...]:
    """Every recipe, by the name of its card."""
    found = []
    for module in pkgutil.iter_modules(room.__path__):
        if hasattr(importlib.import_module(f"{room.__name__}.{module.name}"), "RECIPE"):
            found.append(module.name.replace("_", "-"))
    return tuple(sorted(found))


def recipe_of(slug: str) -> Recipe:
    """The recipe of that name. Raises InvalidValueError, which lists those there are."""
    if slug not in slugs():
        raise InvalidValueError(f"no recipe {slug!r}; there are {', '.join(slugs())}")
    recipe: Recipe = _module(slug).RECIPE
    return recipe


def _module(slug: str) -> Any:
    return importlib.import_module(f"{room.__name__}.{slug.replace('-', '_')}")


def reproduce(slug: str, *, scale: Scale = "smoke", seed: int | None = None, ablate: bool = False,
              out: str | Path | None = None, resume: bool = True, progress: Progress | None = None) -> Report:
    """Run a recipe at a scale and judge its claims by what was measured.

    seed: the first of the scale's seeds, by default the recipe's. ablate: also measure with the mechanism off.
    out: a directory; <slug>.json and <slug>.md are written there, other scales in them are kept.
    resume: take up runs of seeds that an interrupted reproduction left.
    """
    recipe = recipe_of(slug)
    return run_recipe(slug, recipe, Path(inspect.getfile(_module(slug))).read_bytes(), scale=scale, seed=seed,
                      ablate=ablate, out=out, resume=resume, progress=progress)


def run_recipe(slug: str, recipe: Recipe, code: bytes, *, scale: Scale, seed: int | None = None, ablate: bool = False,
               out: str | Path | None = None, resume: bool = True, progress: Progress | None = None) -> Report:
    """As `reproduce`, of a recipe at hand. code: what its kept runs depend on beside its settings."""
    if scale not in recipe.scales:
        raise InvalidValueError(f"{slug} has no scale {scale!r}; it has {', '.join(recipe.scales)}")
    if recipe.run is None:
        raise InvalidValueError(f"{slug} has nothing to run")
    settings = dict(recipe.scales[scale])
    count, first = int(settings.pop("seeds", 1)), recipe.seed if seed is None else seed
    kept = _Kept(slug, recipe, code, scale, ablate)
    runs: list[Report] = []
    started = time.perf_counter()
    for done in range(count):
        if progress is not None:
            progress(f"{slug}, seed {first + done}", done, count)
        report = kept.read(first + done) if resume else None
        if report is None:
            with collect_notices() as notices:
                report = recipe.run(settings, first + done, ablate)
            report = report.with_notices([item for item in notices if item not in report.notices])
            kept.write(first + done, report)
        runs.append(report)
    judged = [judge(claim, [metrics_of(run) for run in runs], ablated=ablate) for claim in recipe.claims]
    made = summary(slug, judged, runs, recipe.title or recipe.paper)
    made = replace(made, lineage=(Step("reproduce", {"recipe": slug, "scale": scale, "ablate": ablate,
                                                     "seeds": [first + i for i in range(count)], **settings},
                                       __version__, first),),
                   environment={"paper": recipe.paper, "scale": scale, "ablated": ablate,
                                "seeds": [first + i for i in range(count)],
                                "command": _command(slug, scale, seed, ablate),
                                "seconds": round(time.perf_counter() - started, 1), **environment(),
                                **runs[0].environment})
    made = without_paths(made)
    if out is not None:
        write_results(Path(out), slug, recipe, made)
    kept.forget([first + i for i in range(count)])
    return made


def without_paths(report: Report) -> Report:
    """The report without the directories of this machine, which a published result does not name."""
    text = json.dumps(report.to_json())
    for directory, name in ((cache_root(), "CACHE"), (Path(tempfile.gettempdir()), "TMP"), (Path.home(), "HOME")):
        text = text.replace(f"{json.dumps(str(directory))[1:-1]}/", f"{name}/")
    return Report.from_json(json.loads(text))


def _command(slug: str, scale: str, seed: int | None, ablate: bool) -> str:
    words = ["edgewise reproduce", slug, f"--scale {scale}"]
    words += [f"--seed {seed}"] if seed is not None else []
    return " ".join([*words, "--ablate"] if ablate else words)


def environment() -> dict[str, Any]:
    """What a result depends on beside the recipe: processor, tier, cores, versions."""
    from edgewise.native import probe

    versions = {}
    for name in ("numpy", "torch", "transformers", "onnxruntime", "mlx"):
        try:
            versions[name] = importlib.metadata.version("mlx-cpu" if name == "mlx" else name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"edgewise": __version__, "python": platform.python_version(), "system": platform.system(),
            "processor": probe.processor_name(), "tier": probe.tier_in_use(), "cores": usable_cores().usable,
            "versions": versions}


class _Kept:
    """Runs of seeds in the cache."""

    def __init__(self, slug: str, recipe: Recipe, code: bytes, scale: str, ablate: bool) -> None:
        key = hashlib.sha256(b"\0".join((
            code, json.dumps([recipe.to_json(), scale, ablate, __version__], sort_keys=True).encode()))).hexdigest()
        self.directory = cache_root() / "reproduce" / f"{slug}-{key[:24]}"

    def _path(self, seed: int) -> Path:
        return self.directory / f"{seed}.json"

    def read(self, seed: int) -> Report | None:
        path = self._path(seed)
        if not path.exists():
            return None
        try:
            report = Report.from_json(json.loads(path.read_text("utf-8")))
        except (ValueError, KeyError, TypeError):
            notice("ignored", f"{path} is not a run that was kept; the seed is run again", where="reproduce")
            return None
        notice("info", f"seed {seed} was run before and is taken from {path}", where="reproduce")
        return report

    def write(self, seed: int, report: Report) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with write_aside(self._path(seed)) as file:
            file.write(json.dumps(report.to_json()).encode())

    def forget(self, seeds: list[int]) -> None:
        for seed in seeds:
            self._path(seed).unlink(missing_ok=True)
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()


def write_results(directory: Path, slug: str, recipe: Recipe, report: Report) -> None:
    """<slug>.json with every scale that was run, the newest run of each; <slug>.md with the same in words."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{slug}.json"
    reports = dict(read_results(path)) if path.exists() else {}
    name = str(report.environment["scale"]) + (", ablated" if report.environment["ablated"] else "")
    reports[name] = report
    data = {"slug": slug, "paper": recipe.paper, "title": recipe.title, "sources": dict(recipe.sources),
            "scales": {scale: dict(settings) for scale, settings in recipe.scales.items()},
            "reports": {key: value.to_json() for key, value in sorted(reports.items())}}
    with write_aside(path) as file:
        file.write((json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())
    with write_aside(directory / f"{slug}.md") as file:
        file.write("\n".join(render(value, "markdown") for _, value in sorted(reports.items())).encode())


def read_results(path: Path) -> Mapping[str, Report]:
    """The reports of a results file by scale ("small", "small, ablated"). Raises InvalidValueError."""
    try:
        data = json.loads(path.read_text("utf-8"))
        return {name: Report.from_json(report) for name, report in data["reports"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidValueError(f"{path} is not a file of results ({type(error).__name__}: {error}); move it away, or "
                                "write elsewhere") from error
