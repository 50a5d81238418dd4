"""The steps that a pipeline is made of: width, depth, rank, sparsity and bits, each a Checkpoint to a Checkpoint.

    width      heads and neurons cut out (units by norm, MoDeGPT, LLM-Pruner)
    depth      whole layers left out (ShortGPT)
    rank       linears as two factors (whitened singular value decomposition)
    sparsity   two of every four weights kept (Wanda, SparseGPT, magnitude)
    bits       one number format for all, or one for each weight, chosen for what a budget leaves

A later step keeps the form that earlier ones gave: what it turns into plain floats again is factored, thinned out and
rounded once more, by the values alone. So the same steps cost the same bytes in any order, and differ in what they
lose. A format for each weight is the last step, since only then is it known what the budget leaves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.lowrank.factored import LowRank, factored_change, factors_of
from edgewise.compress.prune.masks import Prune, SparseGpt, by_magnitude, by_sparsegpt, by_wanda, stored_of
from edgewise.compress.quantize.changes import KEPT
from edgewise.compress.walk import Change, Group, blocks_of, walk
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import InvalidValueError, collect_notices, notice
from edgewise.core.numbers import FP16, FP32, NumberFormat, QuantFormat
from edgewise.core.stats import InputStats
from edgewise.core.storage import Dense, Factored, LazyTensors, QuantizedTensor, Stored
from edgewise.engine.archs import plan_of
from edgewise.engine.calibrate import EngineStats
from edgewise.fit.dispatch import Calibration
from edgewise.fit.prune import pruned
from edgewise.fit.pruners import pruner_of
from edgewise.fit.refine import gptq_of_parts
from edgewise.fit.rounding import is_sparse, quantised

__all__ = ["KINDS", "PER_WEIGHT", "Form", "PipelineStep", "applied", "form_after", "form_at_start", "key_of",
           "pipeline_text"]

KINDS = ("width", "depth", "rank", "sparsity", "bits")
PER_WEIGHT = "per weight"
"""The format of a bits step that gives every weight its own."""
_SITES = {"all": ("attention", "output", "feed_forward", "down"), "attention": ("attention", "output"),
          "feed_forward": ("feed_forward", "down")}
_PATTERN = "2:4"


@dataclass(frozen=True)
class PipelineStep:
    """kind: of KINDS. settings: method and its parameters; the order of keys does not count."""

    kind: str
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidValueError(f"a step is one of {', '.join(KINDS)}; given {self.kind!r}")
        object.__setattr__(self, "settings", tuple(sorted(self.settings)))

    def __getitem__(self, name: str) -> Any:
        return dict(self.settings)[name]

    @property
    def label(self) -> str:
        """In a few words."""
        given = dict(self.settings)
        method = given.pop("method", "")
        words = [str(method)] if method else []
        words += [f"{100 * value:.3g} %" if name in ("sparsity", "share") else str(value) for name, value in
                  given.items() if not (name == "where" and value == "all")]
        return f"{self.kind} ({', '.join(words)})" if words else self.kind

    def to_json(self) -> list[Any]:
        return [self.kind, dict(self.settings)]

    @classmethod
    def from_json(cls, data: Any) -> PipelineStep:
        return cls(str(data[0]), tuple(data[1].items()))


def pipeline_text(pipeline: tuple[PipelineStep, ...]) -> str:
    """The kinds, in order."""
    return " > ".join(step.kind for step in pipeline) or "nothing"


def key_of(pipeline: tuple[PipelineStep, ...]) -> str:
    """The pipeline as a string that no other has."""
    return json.dumps([step.to_json() for step in pipeline], sort_keys=True)


@dataclass(frozen=True)
class Form:
    """What earlier steps made of the linears of a site: a share of rank, n of every m, a format.

    number: of plain floats.
    """

    number: NumberFormat = FP32
    ranks: Mapping[str, LowRank] = field(default_factory=dict)
    sparse: frozenset[str] = frozenset()
    format: QuantFormat | None = None

    def of(self, stored: Stored, site: str) -> Stored:
        """A weight in this form; as it is, where it is in it already."""
        if site in self.ranks and not isinstance(stored, Factored):
            stored = factors_of(np.asarray(stored.dense(), np.float32), None, self.ranks[site], self.number) or stored
        if isinstance(stored, Factored):
            return Factored(self._part(stored.left, site), self._part(stored.right, site))
        return self._part(stored, site)

    def _part(self, stored: Stored, site: str) -> Stored:
        if site in self.sparse and not is_sparse(stored) and stored.shape[1] % 4 == 0:
            values, mask = by_magnitude(np.asarray(stored.dense(), np.float32), Prune(pattern=_PATTERN))
            stored = stored_of(values, mask, _PATTERN, self.number)
        return stored if self.format is None or _is_in(stored) else quantised(stored, self.format)


def _is_in(stored: Stored) -> bool:
    """Whether a weight is rounded already: a pipeline has one format before its last step."""
    return isinstance(stored.values if is_sparse(stored) else stored, QuantizedTensor)


def applied(checkpoint: Checkpoint, form: Form, step: PipelineStep, sample: Calibration, *, threads: int,
            progress: Callable[[str, int, int], None] | None = None) -> tuple[Checkpoint, Form]:
    """The checkpoint after a step, and the form that its weights have by now.

    Raises what the method raises: InvalidValueError or UnsupportedError where it cannot take the model.
    """
    if step.kind in ("width", "depth"):
        row = pruner_of(str(step["method"]))
        with collect_notices() as notices:
            made = pruned(checkpoint, row, row.settings({"sparsity": step["sparsity"]}), sample, threads=threads,
                          progress=progress)
        for item in notices:
            if item.kind != "fallback" or "become float32" not in item.message:  # they are put back in their form
                notice(item.kind, item.message, where=item.where)
        return _in_form(made, form), form
    form, sites, method = form_after(form, step), _sites(step), str(step["method"])
    if step.kind == "rank":
        change = factored_change(form.ranks[sites[0]])
    elif step.kind == "sparsity":
        change = _thinned(method, form.number)
    else:
        assert form.format is not None
        change = _rounded(method, form.format)
    needs_gram = step.kind == "rank" or method in ("gptq", "sparsegpt") or _any_factored(checkpoint)
    stats = EngineStats(checkpoint, list(sample.windows), gram=needs_gram, sequential=step.kind != "rank",
                        threads=threads)

    def within(group: Group, tensors: Mapping[str, Stored], found: InputStats | None) -> dict[str, Stored]:
        if group.site not in sites:
            return {}
        made = change(group, tensors, found)
        return {name: form.of(stored, group.site) for name, stored in made.items()}

    made = walk(checkpoint, within, stats, step=Step(step.kind, dict(step.settings)), progress=progress)
    if step.kind == "bits":
        assert form.format is not None
        made = _with_tables(made, form.format)
    return _unbound(made), form


def form_after(form: Form, step: PipelineStep) -> Form:
    """The form of weights once a step is done."""
    if step.kind == "rank":
        config = LowRank(float(step["share"]))
        return replace(form, ranks={**form.ranks, **dict.fromkeys(_sites(step), config)})
    if step.kind == "sparsity":
        return replace(form, sparse=form.sparse | set(_sites(step)))
    return replace(form, format=QuantFormat.parse(str(step["format"]))) if step.kind == "bits" else form


def _sites(step: PipelineStep) -> tuple[str, ...]:
    return _SITES["all" if step.kind == "bits" else str(step["where"])]


def form_at_start(checkpoint: Checkpoint) -> Form:
    """Of the source: its floats, or half precision where its weights are rounded already."""
    for block in blocks_of(checkpoint):
        for name in (name for group in block.groups for name in group.names):
            stored = checkpoint.tensors[name]
            return Form(stored.number if isinstance(stored, Dense) else FP16)
    return Form()


def _any_factored(checkpoint: Checkpoint) -> bool:
    return any(isinstance(checkpoint.tensors[name], Factored) for name in checkpoint.tensors)


def _unbound(checkpoint: Checkpoint) -> Checkpoint:
    """Of no file: what is packed of it is not worth keeping."""
    return replace(checkpoint, files=())


def _in_form(checkpoint: Checkpoint, form: Form) -> Checkpoint:
    sites = {name: group.site for block in blocks_of(checkpoint) for group in block.groups for name in group.names
             if group.site and not KEPT.search(name)}
    source = checkpoint.tensors
    held: dict[str, Stored] = {}

    def made(name: str) -> Stored:
        if name not in sites:
            return source[name]
        if name not in held:
            held[name] = form.of(source[name], sites[name])
        return held[name]

    return replace(checkpoint, tensors=LazyTensors({name: (lambda name=name: made(name))  # type: ignore[misc]
                                                    for name in source}), files=())


def _with_tables(checkpoint: Checkpoint, fmt: QuantFormat) -> Checkpoint:
    """Embedding and head in the format too, where its groups fit."""
    plan = plan_of(checkpoint)
    names = {plan.embedding.name} | ({plan.head.name} if plan.head is not None else set())
    made = {name: quantised(checkpoint.tensors[name], fmt) for name in names & set(checkpoint.tensors)
            if fmt.granularity.kind != "group" or checkpoint.tensors[name].shape[1] % fmt.granularity.group == 0}
    source = checkpoint.tensors
    return replace(checkpoint, tensors=LazyTensors({
        name: (lambda name=name: made[name] if name in made else source[name])  # type: ignore[misc]
        for name in source}))


# ---- changes of weights that may be factored already ----------------------------------------------------------------

def _each_part(work: Callable[[NDArray[np.float32], InputStats | None, Stored], Stored]) -> Change:
    """A change of every linear, or of its factors: the left one meets what the right one gives."""
    def change(group: Group, tensors: Mapping[str, Stored], stats: InputStats | None) -> dict[str, Stored]:
        made: dict[str, Stored] = {}
        for name in (name for name in group.names if not KEPT.search(name)):
            stored = tensors[name]
            try:
                if isinstance(stored, Factored):
                    right = work(np.asarray(stored.right.dense(), np.float32), stats, stored.right)
                    left = work(np.asarray(stored.left.dense(), np.float32), _through(stats, right), stored.left)
                    made[name] = Factored(left, right)
                else:
                    made[name] = work(np.asarray(stored.dense(), np.float32), stats, stored)
            except InvalidValueError as error:
                raise InvalidValueError(f"{name}: {error}") from None
        return made

    return change


def _through(stats: InputStats | None, right: Stored) -> InputStats | None:
    """Statistics of x R^T from those of x."""
    if stats is None or stats.gram is None:
        return None
    values = right.dense().astype(np.float64)
    gram = values @ stats.gram @ values.T
    nothing = np.zeros(len(gram))
    return InputStats(stats.count, nothing, nothing, nothing, np.diag(gram).copy(), gram)


def _thinned(method: str, number: NumberFormat) -> Change:
    if method not in ("magnitude", "wanda", "sparsegpt"):
        raise InvalidValueError(f"weights are thinned out by magnitude, wanda or sparsegpt; given {method!r}")

    def work(weight: NDArray[np.float32], stats: InputStats | None, stored: Stored) -> Stored:
        if weight.shape[1] % 4:
            return stored
        if stats is None or method == "magnitude":
            values, mask = by_magnitude(weight, Prune(pattern=_PATTERN))
        elif method == "wanda":
            values, mask = by_wanda(weight, np.sqrt(stats.total_square), Prune(pattern=_PATTERN))
        else:
            assert stats.gram is not None
            values, mask = by_sparsegpt(weight, stats.gram, SparseGpt(pattern=_PATTERN))
        return stored_of(values, mask, _PATTERN, number)

    return _each_part(work)


def _rounded(method: str, fmt: QuantFormat) -> Change:
    if method == "rtn":
        def change(group: Group, tensors: Mapping[str, Stored], stats: InputStats | None) -> dict[str, Stored]:
            def part(stored: Stored, importance: NDArray[np.floating[Any]] | None) -> Stored:
                if fmt.granularity.kind == "group" and stored.shape[1] % fmt.granularity.group:
                    raise InvalidValueError(f"rows of {stored.shape[1]} values are no whole groups of "
                                            f"{fmt.granularity.group}")
                return quantised(stored, fmt, importance=importance)

            made: dict[str, Stored] = {}
            for name in (name for name in group.names if not KEPT.search(name)):
                stored = tensors[name]
                if isinstance(stored, Factored):
                    right = part(stored.right, _importance(stats))
                    made[name] = Factored(part(stored.left, _importance(_through(stats, right))), right)
                else:
                    made[name] = part(stored, _importance(stats))
            return made

        return change
    if method != "gptq":
        raise InvalidValueError(f"weights are rounded by rtn or gptq; given {method!r}")

    def by_gptq(group: Group, tensors: Mapping[str, Stored], stats: InputStats | None) -> dict[str, Stored]:
        formats = {f"{name}{part}": fmt for name in group.names if not KEPT.search(name)
                   for part in ((".left", ".right") if isinstance(tensors[name], Factored) else ("",))}
        return dict(gptq_of_parts(formats)(group, tensors, stats))

    return by_gptq


def _importance(stats: InputStats | None) -> NDArray[np.floating[Any]] | None:
    if stats is None:
        return None
    squares = stats.total_square / max(stats.count, 1)
    return np.asarray(squares + 1e-3 * squares.mean() + 1e-30)
