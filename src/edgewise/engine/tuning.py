"""What a machine was tuned to: settings that change how long something takes and never an answer.

`engine.tune` measures them once per machine and stores them here; `load` takes what is stored. They are kept by a
fingerprint of the machine and of the native core, so that another machine, another share of it or another build starts
from the defaults. EDGEWISE_TUNING=off takes no notice of what is stored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from edgewise.core.errors import EdgewiseError, notice
from edgewise.core.values import dataclass
from edgewise.formats.cache import cache_root, write_aside
from edgewise.measure.cores import usable_cores
from edgewise.native import _core  # type: ignore[attr-defined]

__all__ = ["Tuning", "fingerprint", "save_tuning", "stored_tuning", "tuning_file"]

_PLAN = ("threads", "batch", "huge_pages")
"""Fields that Python acts on; the others are the native core's own."""
_LIMITS = {"threads": (1, 256), "batch": (1, 4096), "runs_per_thread": (1, 1024), "ahead_nbytes": (0, 1 << 20),
           "farthest_nbytes": (0, 1 << 24), "spins_before_yield": (0, 10**7), "spins_before_sleep": (0, 10**8)}


@dataclass(frozen=True)
class Tuning:
    """None stands for the default.

    threads: where the caller gives none. batch: tokens of a pass of prefill, where neither the caller nor a memory cap
    decides. huge_pages: whether weights ask for pages of 2 MiB. The rest: see native/include/edgewise/tuning.h.
    """

    threads: int | None = None
    batch: int | None = None
    huge_pages: bool | None = None
    runs_per_thread: int | None = None
    ahead_nbytes: int | None = None
    farthest_nbytes: int | None = None
    spins_before_yield: int | None = None
    spins_before_sleep: int | None = None

    @property
    def changed(self) -> dict[str, int | bool]:
        """What differs from the defaults, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def native(self) -> Any:
        """The native core's part."""
        return _core.Tuning(**{name: value for name, value in self.changed.items() if name not in _PLAN})


def fingerprint() -> dict[str, Any]:
    """What must be the same for a tuning to hold: processor, instruction tiers, cores, quota, native core."""
    from edgewise import __version__

    cores = usable_cores()
    built = Path(_core.__file__).stat()
    return {"processor": _core.cpu_model_name(), "tiers": _core.tiers(), "tier": _core.tier_in_use(),
            "logical": cores.logical, "physical": cores.physical, "quota": cores.quota, "edgewise": __version__,
            "core": f"{built.st_size}-{built.st_mtime_ns}"}


def tuning_file(of: Mapping[str, Any] | None = None) -> Path:
    """Where the tuning of a fingerprint lies, by default this machine's."""
    text = json.dumps(dict(of or fingerprint()), sort_keys=True)
    return cache_root() / "tuning" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def save_tuning(tuning: Tuning, gains: Mapping[str, Any]) -> Path:
    """Store the tuning of this machine. gains: what was measured, for whoever looks into the file."""
    machine = fingerprint()
    path = tuning_file(machine)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with write_aside(path) as file:
        file.write(json.dumps({"fingerprint": machine, "settings": tuning.changed, "gains": dict(gains)},
                              indent=1).encode() + b"\n")
    return path


def stored_tuning() -> Tuning:
    """What this machine was tuned to; the defaults where it never was. A file that cannot be used is a notice."""
    if os.environ.get("EDGEWISE_TUNING", "").lower() in ("off", "0", "no", "false"):
        return Tuning()
    try:
        machine = fingerprint()
        path = tuning_file(machine)
        text = path.read_bytes()
    except FileNotFoundError:
        return Tuning()
    except (OSError, EdgewiseError, ValueError) as error:
        notice("ignored", f"the stored tuning cannot be read ({error}); the defaults are used", where="tuning")
        return Tuning()
    try:
        return _checked(json.loads(text), machine)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        notice("ignored", f"the stored tuning is damaged ({error}); the defaults are used; tune again with: edgewise "
               "device --tune", where=str(path))
        return Tuning()


def _checked(stored: Mapping[str, Any], machine: Mapping[str, Any]) -> Tuning:
    """ValueError and the like for anything that save_tuning does not write."""
    if stored["fingerprint"] != json.loads(json.dumps(dict(machine))):
        raise ValueError("it is of another machine")
    settings = dict(stored["settings"])
    unknown = settings.keys() - {field.name for field in fields(Tuning)}
    if unknown:
        raise ValueError(f"it has settings that do not exist: {', '.join(sorted(unknown))}")
    for name, value in settings.items():
        if name == "huge_pages":
            right = isinstance(value, bool)
        else:
            low, high = _LIMITS[name]
            right = type(value) is int and low <= value <= high
        if not right:
            raise ValueError(f"{name} is {str(value)[:40]!r}")
    return Tuning(**settings)
