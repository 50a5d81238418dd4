"""What a fit chose and what it measured, as a Report with tables and a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgewise.core.checkpoint import Step
from edgewise.core.report import Quantity, Report, Table
from edgewise.engine.model import Memory
from edgewise.fit.candidates import Candidate, TensorGroup
from edgewise.fit.choose import Choice
from edgewise.report import plot_table

__all__ = ["Measured", "pareto_plot", "report_of"]

_ROWS = 12
_BAR = 24


@dataclass(frozen=True)
class Measured:
    """A model as measured. kl and its standard error: against the source, in nats; None for the source itself."""

    disk_bytes: int
    memory: Memory
    bits_per_weight: float
    kv: str
    context: int
    perplexity: float
    decode_tokens_per_s: float
    kl: float | None = None
    kl_error: float = 0.0
    agreement: float | None = None

    @property
    def quality(self) -> float | None:
        return None if self.kl is None else math.exp(-self.kl)


def report_of(title: str, before: Measured, after: Measured, choice: Choice, items: Sequence[TensorGroup],
              candidates: Sequence[Sequence[Candidate]], kls: Sequence[Sequence[float]], front: Sequence[Choice],
              *, text: tuple[str, str], positions: int, seconds: Mapping[str, float], methods: Mapping[str, float],
              bound: float, exact: bool, written: str | None, lineage: tuple[Step, ...]) -> Report:
    """text: the name and the SHA-256 of the text measured on. seconds: of the search's stages, by name. methods: what
    each method that was tried diverges by, on the text of the search. bound: below which no allocation of these bytes
    is, predicted; exact: nothing better is possible than the choice, as predicted."""
    assert after.kl is not None
    low, high = after.kl - 1.96 * after.kl_error, after.kl + 1.96 * after.kl_error
    # A decode step reads every weight once: its time follows their bytes.
    weights = before.memory.weights_bytes / after.memory.weights_bytes
    quantities = [
        Quantity("quality", after.quality, "", (math.exp(-high), math.exp(-max(low, 0.0)))),
        Quantity("quality predicted", math.exp(-choice.kl), origin="simulated"),
        Quantity("quality bound", math.exp(-min(bound, choice.kl)), origin="simulated"),
        Quantity("allocation", "exact" if exact else "within the bound"),
        Quantity("memory_bytes", after.memory.total_bytes, "B"),
        Quantity("memory predicted", choice.memory_bytes, "B", origin="simulated"),
        Quantity("storage_bytes", after.disk_bytes, "B"),
        Quantity("tokens_per_s", after.decode_tokens_per_s, "tokens/s"),
        Quantity("tokens_per_s predicted", before.decode_tokens_per_s * weights, "tokens/s", origin="simulated"),
        Quantity("method", _method(methods)),
        Quantity("text", f"{text[0]}, SHA-256 {text[1][:16]}, {positions} positions"),
        *(Quantity(f"{name}_s", value, "s") for name, value in seconds.items()),
    ]
    if written is not None:
        quantities.append(Quantity("written to", written))
    rows = (("bytes on disk", _mb(before.disk_bytes), _mb(after.disk_bytes)),
            ("memory", _mb(before.memory.total_bytes), _mb(after.memory.total_bytes)),
            ("  weights", _mb(before.memory.weights_bytes), _mb(after.memory.weights_bytes)),
            ("  KV cache", _mb(before.memory.kv_bytes), _mb(after.memory.kv_bytes)),
            ("  scratch", _mb(before.memory.scratch_bytes), _mb(after.memory.scratch_bytes)),
            ("context, positions", before.context, after.context),
            ("KV format", before.kv, after.kv),
            ("bits per weight", round(before.bits_per_weight, 2), round(after.bits_per_weight, 2)),
            ("mean KL to the source, nats", 0.0, after.kl),
            ("quality exp(-KL)", 1.0, after.quality),
            ("same first choice", 1.0, after.agreement),
            ("perplexity", before.perplexity, after.perplexity),
            ("decoding, tokens/s", before.decode_tokens_per_s, after.decode_tokens_per_s))
    return Report(title, tuple(quantities),
                  (Table("Before and after", ("", "source", "fitted"), rows),
                   _classes_table(choice, items, candidates, kls), _layers_table(choice, items, candidates),
                   _front_table(front, choice)),
                  lineage=lineage)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def _method(methods: Mapping[str, float]) -> str:
    """Which method it was, and why."""
    if not methods:
        return "rounding to nearest"
    best = min(methods, key=methods.__getitem__)
    label = {"rtn": "rounding to nearest", "gptq": "GPTQ"}
    others = ", ".join(f"{label[name]} {value:.4g}" for name, value in methods.items() if name != best)
    return f"{label[best]}: KL {methods[best]:.4g} on the text of the search, where {others} was tried too"


def _short(label: str) -> str:
    return label.removesuffix("/fp16").replace("/fp16", "")


def _classes_table(choice: Choice, items: Sequence[TensorGroup], candidates: Sequence[Sequence[Candidate]],
                   kls: Sequence[Sequence[float]]) -> Table:
    """One row per class of weights: which formats it got, what they take, and what they cost."""
    classes: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        classes.setdefault(item.name, []).append(place)
    rows = []
    for name, places in classes.items():
        picked = [candidates[place][choice.allocation.picks[place]] for place in places]
        counts: dict[str, int] = {}
        for each in picked:
            counts[_short(each.label)] = counts.get(_short(each.label), 0) + 1
        parameters = sum(items[place].parameters for place in places)
        rows.append((name, round(8 * sum(items[place].stored_bytes for place in places) / parameters, 2),
                     ", ".join(f"{count} {label}" if len(places) > 1 else label for label, count in counts.items()),
                     round(8 * sum(each.stored_bytes for each in picked) / parameters, 2),
                     _mb(sum(each.packed_bytes for each in picked)),
                     sum(kls[place][choice.allocation.picks[place]] for place in places)))
    return Table("Formats by class, and the KL in nats that each is predicted to cost",
                 ("class", "bits before", "formats", "bits", "size", "KL"), tuple(rows))


def _layers_table(choice: Choice, items: Sequence[TensorGroup], candidates: Sequence[Sequence[Candidate]]) -> Table:
    """The format of every weight, a layer a row."""
    classes = list(dict.fromkeys(item.name for item in items if item.layer is not None))
    rows: dict[str, dict[str, str]] = {}
    for item, choices, pick in zip(items, candidates, choice.allocation.picks, strict=True):
        row = item.name if item.layer is None else f"layer {item.layer}"
        column = (classes[0] if classes else item.name) if item.layer is None else item.name
        rows.setdefault(row, {})[column] = _short(choices[pick].label)
    return Table("Format of every weight", ("", *classes), tuple(
        (row, *(cells.get(name, "") for name in classes)) for row, cells in rows.items()))


def _front_table(front: Sequence[Choice], choice: Choice) -> Table:
    """A dozen points of the front, the one nearest to the choice among them, with a bar for the quality."""
    if len(front) > _ROWS:
        places = {round(i * (len(front) - 1) / (_ROWS - 1)) for i in range(_ROWS)}
        places.add(min(range(len(front)), key=lambda i: (front[i].allocation.picks != choice.allocation.picks,
                                                         front[i].kv != choice.kv)))
        front = [front[i] for i in sorted(places)]
    rows = tuple((point.memory_bytes / 1e6, math.exp(-point.kl), "█" * max(round(_BAR * math.exp(-point.kl)), 1),
                  point.kv, "chosen" if (point.allocation.picks, point.kv) == (choice.allocation.picks, choice.kv)
                  else "") for point in front)
    context = front[0].context
    return Table(f"Pareto front at {context} positions, predicted", ("memory, MB", "quality", "", "KV", "choice"), rows)


def pareto_plot(report: Report) -> str:
    """The Pareto table as an SVG document."""
    table = next(table for table in report.tables if table.title.startswith("Pareto"))
    return plot_table(table, x="memory, MB", y="quality", label="choice", front=range(len(table.rows)))
