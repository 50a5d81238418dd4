"""How far each weight in each format moves the model's predictions: measured once per group, told apart by error.

One group at a time is rounded, packed and put in the place of the source's; all other weights stay shared with it.
The measure is the mean KL(source || changed) over the positions of a sample of text, in nats. For small changes KL is
quadratic in them, so that of one group it is a number times the squared error of its weights, each column weighed by
the mean square of its inputs. That number, the group's rate, is measured with one format; what any weight of the group
costs in any format is then the rate times its error, for which nothing needs to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import InvalidValueError, UnsupportedError, notice
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import Factored, QuantizedTensor, Sparse, rows_of
from edgewise.engine.archs import plan_of
from edgewise.engine.build import build_model, linears_of
from edgewise.engine.loading import model_of, recipes_of
from edgewise.engine.packing import layout_of, pack_all, pack_one, recipe_of
from edgewise.engine.plan import Linear, layer_with
from edgewise.fit.candidates import Candidate, TensorGroup, candidates_of
from edgewise.fit.rounding import every_row_of, quantised
from edgewise.formats.cache import files_key
from edgewise.native import _core  # type: ignore[attr-defined]

__all__ = ["SOURCE_KV", "Bench", "Importance", "Reference", "Sample", "errors_of", "importance_of", "kl_rows",
           "rates_of", "sample_of"]

Progress = Callable[[str, int, int], None]
Ids = NDArray[np.int32]
Float32 = NDArray[np.float32]
Importance = Mapping[str, Float32]
"""Mean square of each input, by the name of the linear that reads it: (in,) float32."""

SOURCE_KV = "bf16"
"""KV format of the source: what quantised models run in by default."""
_REFERENCE_BYTES = 128 << 20
"""What the source's logits may take; of a large vocabulary only every second, third, ... position is compared."""
_BLOCK_ROWS = 16
_FAR = 20.0
_PROBES = ("int3/g32/fp16/min", "int2/g32/fp16/min", "int8/g32/fp16")
"""Formats that rates are measured with: the first that makes a group smaller."""
_CHUNK_ROWS = 4096
_ERROR_ROWS = 256
"""Rows of a weight that its error in a format is taken from."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Excerpts of a text. search: (windows, tokens) for sensitivities; check: (windows, tokens) for the result;
    calibration: (windows, tokens) of what lies between them, as long as those of the check."""

    search: Ids
    check: Ids
    calibration: Ids


def sample_of(ids: Sequence[int] | Ids, *, context: int, tokens: int = 512, checked: int = 2048,
              calibrated: int = 0) -> Sample:
    """Excerpts spread evenly over a tokenised text, those of the search, the check and the calibration apart.

    The check takes windows of 512 tokens, the search windows of 128, both at most a `context`. calibrated: tokens at
    most; what the text has no room for is left out.
    """
    ids = np.asarray(ids, np.int32)
    long, short = min(512, context), min(128, context)
    if len(ids) < long + short:
        raise InvalidValueError(f"the text has {len(ids)} tokens; the search needs at least {long + short}; "
                                "give a longer text")
    count, parts = max(checked // long, 1), max(tokens // short, 1)
    if len(ids) < count * long + parts * short:
        count = max((len(ids) - parts * short) // long, 1)
        parts = max(min(parts, (len(ids) - count * long) // short), 1)
        notice("truncation", f"the text has {len(ids)} tokens; the search uses {parts * short} and the check "
               f"{count * long} of them", where="fit")
    gap = (len(ids) - count * long - parts * short) // (count + parts)
    # One run of slots, of which every few are of the search, with equal gaps between them.
    every = max((count + parts) // parts, 1)
    search: list[Ids] = []
    check: list[Ids] = []
    between: list[Ids] = []
    start = 0
    for slot in range(count + parts):
        short_turn = (slot % every == every - 1 and len(search) < parts) or len(check) == count
        length = short if short_turn else long
        (search if short_turn else check).append(ids[start:start + length])
        start += length
        between += [ids[at:at + long] for at in range(start, start + gap - long + 1, long)]
        start += gap
    wanted = min(calibrated // long, len(between))
    spread = [between[place] for place in np.rint(np.linspace(0, len(between) - 1, wanted)).astype(int)]
    return Sample(np.stack(search), np.stack(check), np.stack(spread) if spread else np.zeros((0, long), np.int32))


@dataclass(frozen=True, eq=False)
class Reference:
    """The source's logits at the compared positions of each search window: (positions, vocab) float32 each."""

    windows: Ids
    rows: Ids
    logits: tuple[Float32, ...]


def kl_rows(source: Float32, changed: Float32) -> NDArray[np.float64]:
    """KL(source || changed) of each row of logits, (rows,) float64 in nats.

    With p = softmax(a) and g = b - a less its mean under p:  KL = log E_p[exp(g)] - E_p[g], taken as
    log1p(E_p[expm1(g)]) - E_p[g]: only differences of logits enter, so that single precision is enough for the
    smallest divergences. Where some g exceeds 20, what p rounds to zero could matter:  KL = log sum exp(b) -
    log sum exp(a) - E_p[b - a] is used instead.
    """
    if source.shape != changed.shape or source.ndim != 2:
        raise InvalidValueError(f"logits of one shape (rows, vocab) are compared; given {source.shape} and "
                                f"{changed.shape}")
    result = np.empty(len(source))
    for start in range(0, len(source), _BLOCK_ROWS):
        a, b = source[start:start + _BLOCK_ROWS], changed[start:start + _BLOCK_ROWS]
        p, total = _softmax(a)
        gap = b - a
        mean = np.einsum("rv,rv->r", p, gap)
        gap -= mean[:, None]
        left = np.einsum("rv,rv->r", p, gap).astype(np.float64)  # what rounding left of the mean
        if gap.max() <= _FAR:
            part = np.log1p(np.einsum("rv,rv->r", p, np.expm1(gap, out=gap)).astype(np.float64)) - left
        else:
            part = _softmax(b)[1] - total - mean - left
        result[start:start + len(a)] = np.maximum(part, 0.0)
    return result


def importance_of(checkpoint: Checkpoint, sample: Sample, threads: int) -> dict[str, Float32]:
    """Mean square of each linear's inputs over the search windows; of a tied embedding, of the head's inputs."""
    length = sample.search.shape[1]
    model = model_of(checkpoint, threads=threads, context=length, kv=SOURCE_KV)
    stats = model.calibrate([list(map(int, window)) for window in sample.search])
    squares = {name: stats[name].total_square / stats[name].count for name in stats}
    states = np.concatenate([model.states(window) for window in sample.search])
    plan = plan_of(checkpoint)
    if plan.head is not None:
        squares[plan.head.name] = np.square(states, dtype=np.float64).mean(axis=0)
    for linear in linears_of(plan):
        if isinstance(linear.weight, Factored) and linear.name in squares:
            squares[f"{linear.key}.right"] = squares[linear.name]
            # What lies between the factors, as if the inputs were not correlated.
            squares[f"{linear.key}.left"] = np.square(linear.weight.right.dense(), dtype=np.float64) @ squares[
                linear.name]
    # An input that the sample never used still counts for something.
    return {name: (square + 1e-3 * square.mean() + 1e-30).astype(np.float32) for name, square in squares.items()}


def _softmax(logits: Float32) -> tuple[Float32, NDArray[np.float64]]:
    """Probabilities, and log sum exp, of each row."""
    top = logits.max(axis=-1, keepdims=True)
    p = np.exp(logits - top)
    total = p.sum(axis=-1, keepdims=True)
    p /= total
    return p, np.log(total[:, 0].astype(np.float64)) + top[:, 0]


class Bench:
    """A source model whose weights can be exchanged one group at a time, all others shared."""

    def __init__(self, checkpoint: Checkpoint, *, threads: int, kv: str = SOURCE_KV,
                 progress: Progress | None = None) -> None:
        self.plan = plan_of(checkpoint)
        if self.plan.kind != "decoder" or self.plan.head is None:
            raise UnsupportedError(
                f"{checkpoint.source}: fit compares predictions of the next token, and {checkpoint.arch} is an "
                f"{self.plan.kind}; load it with a format instead, such as load(source, format='int8/g32')")
        self.threads, self.kv = threads, kv
        recipes, self._names = recipes_of(self.plan)
        self.weights_bytes = layout_of(recipes)[1]
        key = files_key(checkpoint.files) if checkpoint.files else None
        self._packed = pack_all(recipes, key=key, progress=progress)

    def session(self, tokens: int, changed: Mapping[str, Any] | None = None, kv: str | None = None) -> Any:
        """A native session for sequences of `tokens`. changed: native matrices that stand in, by weight name."""
        changed = changed or {}
        matrices = {**self._packed.matrices, **changed}
        # As when it is loaded: a quantised weight takes its inputs in 8 bits.
        def running(linear: Linear) -> Linear:
            own = {linear.key, f"{linear.key}.left", f"{linear.key}.right"}
            return replace(linear, activation="int8") if own & changed.keys() else linear

        plan = self.plan
        plan = replace(plan, layers=tuple(layer_with(layer, running) for layer in plan.layers),
                       head=None if plan.head is None else running(plan.head))
        model = build_model(plan, replace(self._packed, matrices=matrices), self._names)
        return _core.Session(model, kv or self.kv, tokens, 1, self.threads, tokens)

    def packed(self, group: TensorGroup, candidate: Candidate, importance: Importance) -> dict[str, Any]:
        """The native matrices of the weights that a candidate changes."""
        assert candidate.format is not None
        return {name: pack_one(recipe_of(name, self.rounded(group, name, candidate, importance)))
                for name in candidate.replaced}

    def rounded(self, group: TensorGroup, name: str, candidate: Candidate,
                importance: Importance) -> QuantizedTensor | Sparse:
        """One weight of a group in the candidate's format."""
        assert candidate.format is not None
        return quantised(group.weights[name], candidate.format, importance=importance.get(name), threads=self.threads)

    def reference(self, windows: Ids) -> Reference:
        """The source's predictions on the windows."""
        length = windows.shape[1]
        stride = max(1, -(-windows.size * self.plan.vocab * 4 // _REFERENCE_BYTES))
        rows = np.arange(0, length, stride, dtype=np.int32)
        return Reference(windows, rows, tuple(self._logits(self.session(length), windows, rows)))

    def kl(self, reference: Reference, changed: Mapping[str, Any] | None = None, kv: str | None = None) -> float:
        """Mean KL(source || changed) over the reference's positions, in nats."""
        session = self.session(reference.windows.shape[1], changed, kv)
        total, count = 0.0, 0
        for source, logits in zip(reference.logits, self._logits(session, reference.windows, reference.rows),
                                  strict=True):
            total += float(kl_rows(source, logits).sum())
            count += len(source)
        return total / count

    @staticmethod
    def _logits(session: Any, windows: Ids, rows: Ids) -> Iterator[Float32]:
        for ids in windows:
            session.truncate(0, 0)
            session.forward(ids, np.zeros(len(ids), np.int32))
            yield np.asarray(session.logits(rows))


def rates_of(bench: Bench, reference: Reference, groups: Sequence[TensorGroup], importance: Importance,
             progress: Progress | None = None) -> dict[str, float]:
    """By the name of each weight: nats of KL per weighted squared error of the group that it is of.

    A group that no probe makes smaller, or that a probe leaves as it is, has none.
    """
    rates: dict[str, float] = {}
    for done, group in enumerate(groups):
        if progress is not None:
            progress(f"measuring {group.name}", done, len(groups))
        rate = _rate(bench, reference, group, importance)
        rates.update(dict.fromkeys(group.weights, rate))
    if progress is not None:
        progress("measuring", len(groups), len(groups))
    return rates


def _rate(bench: Bench, reference: Reference, group: TensorGroup, importance: Importance) -> float:
    for name in _PROBES:
        candidates = candidates_of(group, [QuantFormat.parse(name)], None)
        if len(candidates) < 2:
            continue
        changed, error = {}, 0.0
        for weight in candidates[1].replaced:
            made = bench.rounded(group, weight, candidates[1], importance)
            source = rows_of(group.weights[weight], slice(None))
            error += sum(_squared(rows_of(made, slice(start, start + _CHUNK_ROWS)).dense()
                                  - rows_of(source, slice(start, start + _CHUNK_ROWS)).dense(), importance.get(weight))
                         for start in range(0, source.shape[0], _CHUNK_ROWS))
            changed[weight] = pack_one(recipe_of(weight, made))
        if error > 0:
            return bench.kl(reference, changed) / error
    return 0.0


def errors_of(items: Sequence[TensorGroup], candidates: Sequence[Sequence[Candidate]], rates: Mapping[str, float],
              importance: Importance, threads: int, progress: Progress | None = None) -> list[list[float]]:
    """What each candidate of each item costs in nats: rate times weighted squared error, of evenly spaced rows."""
    def costs(item: TensorGroup, choices: Sequence[Candidate]) -> list[float]:
        row = [0.0] * len(choices)
        for name, stored in item.weights.items():
            rate = rates.get(name, 0.0)
            if not rate > 0:
                continue
            some = every_row_of(stored, max(1, stored.shape[0] // _ERROR_ROWS))
            values = some.dense()
            share = rate * stored.shape[0] / len(values)
            for place, candidate in enumerate(choices):
                if name in candidate.replaced:
                    assert candidate.format is not None
                    made = quantised(some, candidate.format, importance=importance.get(name))
                    row[place] += share * _squared(made.dense() - values, importance.get(name))
        return row

    result = []
    with ThreadPoolExecutor(threads) as pool:
        for done, row in enumerate(pool.map(costs, items, candidates)):
            result.append(row)
            if progress is not None:
                progress("comparing formats", done + 1, len(items))
    return result


def _squared(gap: Float32, importance: Float32 | None) -> float:
    """Sum of squares, each column weighed."""
    squares = np.square(gap).sum(axis=0, dtype=np.float64)
    return float(squares.sum() if importance is None else squares @ importance.astype(np.float64))
