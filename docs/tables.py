"""The tables of README.md, made from the program. `python docs/tables.py` rewrites them; a test compares them.

A table stands between <!-- NAME --> and <!-- /NAME -->.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgewise.cli import VERBS
from edgewise.core import numbers
from edgewise.core.numbers import NumberFormat
from edgewise.cost import devices
from edgewise.native.io import block_layouts

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def grid(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ("---",) * len(columns), *rows))


def rooms() -> str:
    """The first sentence of every room's docstring."""
    rows = []
    for path in sorted((ROOT / "src/edgewise").glob("*/__init__.py")):
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        rows.append((f"`{path.parent.name}`", " ".join(text.split("\n\n")[0].split()).rstrip(".")))
    return grid(("room", "what it holds"), rows)


def verbs() -> str:
    return grid(("command", "what it does"), [(f"`edgewise {name}`", text.rstrip(".")) for name, text in VERBS.items()])


def number_formats() -> str:
    constants = {value.name: value for name, value in vars(numbers).items()
                 if isinstance(value, NumberFormat) and not name.startswith("_")}
    rows = [(f"`{fmt.name}`", str(fmt.bits), fmt.kind, f"{fmt.max_value:.6g}")
            for fmt in sorted(constants.values(), key=lambda f: (f.kind, f.bits, f.name))]
    return grid(("element", "bits", "kind", "largest"), rows)


def gguf_types() -> str:
    layouts = block_layouts()
    read = ", ".join(layouts)
    written = ", ".join(name for name, layout in layouts.items() if layout.written)
    return grid(("GGUF", "tensor types"), [("read", read), ("written", written)])


def shipped_devices() -> str:
    rows = [(f"`{name}`", device.name, device.description) for name in devices.list_devices()
            for device in (devices.load(name),)]
    return grid(("name", "device", "what it is"), rows)


def results(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text("utf-8")) for path in sorted((ROOT / "docs/results").glob(pattern))]


def with_interval(ratio: float, low: float, high: float) -> str:
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def language_models() -> str:
    """Every pair of benchmarks/llm.py."""
    rows = []
    for report in results("llm-*.json"):
        for threads, test, ours, peer, ratio, low, high, _ in report["tables"][0]["rows"]:
            # A name that carries the file it was made from ends in the type that it has now.
            model = re.sub(r"-[0-9a-f]{12}(?=\.)|\.gguf$|\.Q4_1(?=-[0-9a-f]{12})", "", report["environment"]["model"])
            rows.append((model.replace(".", " "), test, str(threads), f"{ours:.0f}", f"{peer:.0f}",
                         with_interval(ratio, low, high)))
    return grid(("file", "test", "threads", "edgewise, token/s", "llama.cpp, token/s", "ratio"), rows)


def starts() -> str:
    """Every pair of benchmarks/start.py."""
    rows = [(file.upper(), setting, f"{ours * 1e3:.0f} ms", f"{peer * 1e3:.0f} ms", with_interval(ratio, low, high))
            for report in results("start.json")
            for file, setting, ours, peer, ratio, low, high in report["tables"][0]["rows"]]
    return grid(("file", "start", "edgewise", "llama.cpp", "time over llama.cpp's"), rows)


def encoders() -> str:
    """Every pair of benchmarks/encoders.py that something is required of."""
    rows = [(str(batch), ours, peer, with_interval(ratio, low, high))
            for report in results("encoders.json")
            for batch, ours, peer, ratio, low, high, required in report["tables"][1]["rows"] if required]
    return grid(("batch", "edgewise", "beside", "times as fast"), rows)


def allocations() -> str:
    """Every line of benchmarks/allocation.py."""
    rows = []
    for report in results("allocation.json"):
        table = report["tables"][0]
        for each in (dict(zip(table["columns"], row, strict=True)) for row in table["rows"]):
            low, high = each["its 95 % interval, low"], each["high"]
            rows.append((each["model"], each["beside"], f"{each['bytes of the peer'] / 1e6:.1f} MB",
                         f"{each['bytes of fit'] / 1e6:.1f} MB", f"{each['KL of the peer']:.2g}",
                         f"{each['KL of fit']:.2g}", f"{each['difference']:.2g} ({low:.2g} to {high:.2g})"))
    return grid(("model", "llama.cpp's type", "its bytes", "bytes of fit", "its KL", "KL of fit", "difference"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "language models": language_models, "starts": starts, "encoders": encoders, "allocations": allocations,
    "rooms": rooms, "verbs": verbs, "numbers": number_formats, "gguf": gguf_types, "devices": shipped_devices,
}


def filled(text: str) -> str:
    """The text with every table between its marks made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise SystemExit(f"README.md: expected the marks <!-- {name} --> and <!-- /{name} --> once")
        table = make()
        text = pattern.sub(lambda found, table=table: found[1] + table + "\n" + found[2], text)
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text("utf-8")), "utf-8")
    sys.exit(0)
