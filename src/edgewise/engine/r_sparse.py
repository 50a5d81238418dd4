"""R-Sparse on a model: thresholds from a text, and the search for how much of each linear's budget its low rank gets.

Zhang et al., arXiv:2504.19449, section 4.3 and Algorithm 1: an evolutionary search over one alpha for each linear,
whose fitness is the perplexity of a few texts of which every token is decoded. How the search varies and selects is not
said in what is public of it: here tournaments of four, uniform crossover, normal mutation of a tenth of the genes by
0.1, the best four kept; it begins with 0.95 everywhere and with 1 everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise import __version__
from edgewise.compress.lowrank.r_sparse import Decomposed, RSparse, budget_of, decomposed, sparse_layer
from edgewise.compress.quantize.rtn import quantize_layer
from edgewise.compress.walk import blocks_of
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import InvalidValueError, UnsupportedError, collect_notices, notice
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import InputSparse, LazyTensors, QuantizedTensor, Stored
from edgewise.engine.archs import plan_of
from edgewise.engine.build import build_model, linears_of, low_rank_of
from edgewise.engine.loading import default_kv, model_of, recipes_of
from edgewise.engine.model import LanguageModel
from edgewise.engine.packing import PackedWeights, in_columns, pack_all, pack_one, recipe_of
from edgewise.engine.plan import Linear, Plan, for_context, plan_with
from edgewise.measure.cores import usable_cores
from edgewise.native import _core  # type: ignore[attr-defined]

__all__ = ["Prepared", "decoded_perplexity", "model_stats", "prepare", "quantize", "search", "with_alphas"]

Ids = NDArray[np.integer]
Progress = Callable[[str, int, int], None]
Alphas = Mapping[str, float]
_DEFAULT = RSparse()
_LEAST_ALPHA = 0.75
"""Down to which ranks are decomposed at once; a smaller one decomposes again."""


def quantize(checkpoint: Checkpoint, token_ids: Ids, fmt: QuantFormat | None = None, config: RSparse = _DEFAULT, *,
             progress: Progress | None = None, state: Path | None = None) -> Checkpoint:
    """The checkpoint with weights in a format, by rounding to nearest, and with what decides which inputs are read.

    token_ids: (n,), the first config.tokens of which are calibrated on, those after them searched on. fmt: None, or the
    linears' format already, leaves them as they are. state: not needed; nothing here takes long enough.
    """
    prepared = prepare(checkpoint, token_ids, fmt, config, progress=progress)
    alphas = dict.fromkeys(prepared.inputs, config.alpha)
    if config.generations:
        ids = np.asarray(token_ids)[config.tokens:config.tokens + config.search_tokens]
        if len(ids) < 16:
            raise InvalidValueError(f"a search needs {config.search_tokens} tokens after {config.tokens} to calibrate "
                                    f"on; given {len(token_ids)}")
        alphas = search(prepared, ids, config, progress=progress)
    return with_alphas(prepared, alphas, config)


class Prepared:
    """A checkpoint in its format, and of each linear its inputs over a text and its decomposition.

    inputs: by weight name, (tokens, in). Decompositions are made when they are asked for, and kept for smaller ranks.
    """

    def __init__(self, checkpoint: Checkpoint, inputs: Mapping[str, NDArray[np.float32]]) -> None:
        self.checkpoint, self.inputs = checkpoint, inputs
        self._parts: dict[str, Decomposed] = {}

    def parts(self, name: str, sparsity: float, alpha: float) -> Decomposed:
        """For a rank of at least theirs."""
        rows, cols = self.checkpoint.tensors[name].shape
        rank = budget_of((rows, cols), sparsity, alpha).rank
        known = self._parts.get(name)
        if known is None or known.left.shape[1] < rank:  # a few more: what is asked for next is not much larger
            wanted = max(rank, budget_of((rows, cols), sparsity, _LEAST_ALPHA).rank if rank else 0)
            known = self._parts[name] = decomposed(self.checkpoint.tensors[name].dense(), wanted)
        return known

    def layer(self, name: str, alpha: float, config: RSparse) -> InputSparse:
        """One linear as it will be decoded."""
        parts = self.parts(name, config.sparsity, alpha if config.low_rank else 1.0)
        return sparse_layer(self.checkpoint.tensors[name], parts, self.inputs[name], config, alpha=alpha)


def prepare(checkpoint: Checkpoint, token_ids: Ids, fmt: QuantFormat | None, config: RSparse, *,
            progress: Progress | None = None) -> Prepared:
    """One dense pass over the text. Raises UnsupportedError for a model or a format that does not decode so."""
    plan = plan_of(checkpoint)
    if plan.kind != "decoder":
        raise UnsupportedError(f"{checkpoint.source}: input sparsity is for the tokens that a decoder gives; "
                               f"{checkpoint.arch} is an {plan.kind}")
    made = checkpoint if fmt is None else _in_format(checkpoint, fmt)
    names = _linears(made)
    for name in names:
        if not in_columns(name, made.tensors[name]):
            raise UnsupportedError(f"{name} is stored as {made.tensors[name]!r}: the kernel that skips inputs takes "
                                   "weights of 4 or 8 bits in groups of 32 or more; take int4/g32/fp16/min")
    ids = np.asarray(token_ids, np.int32)[:config.tokens]
    if len(ids) < 16:
        raise InvalidValueError(f"calibration needs at least 16 tokens; given {len(ids)}")
    with collect_notices():
        model = model_of(made, threads=usable_cores().usable, context=len(ids), cache=False)
    stats = model_stats(model, ids, progress)
    return Prepared(made, {name: stats[name] for name in names})


def model_stats(model: LanguageModel, ids: Ids, progress: Progress | None = None) -> dict[str, NDArray[np.float32]]:
    """What every linear read over a text, (tokens, in) by name."""
    from edgewise.engine.calibrate import calibrate

    stats = calibrate(model, [[int(i) for i in ids]], samples=len(ids), progress=progress)
    found = {}
    for name in stats:
        samples = stats[name].samples
        assert samples is not None
        found[name] = np.asarray(samples, np.float32)
    return found


def _linears(checkpoint: Checkpoint) -> list[str]:
    return [name for block in blocks_of(checkpoint) for group in block.groups if group.site for name in group.names]


def _in_format(checkpoint: Checkpoint, fmt: QuantFormat) -> Checkpoint:
    """Linears rounded to nearest, but for those that are in the format already."""
    names = set(_linears(checkpoint))

    def rounded(name: str) -> Stored:
        stored = checkpoint.tensors[name]
        if isinstance(stored, InputSparse):
            stored = stored.weight
        if isinstance(stored, QuantizedTensor) and stored.format == fmt:
            return stored
        return quantize_layer(stored.dense(), fmt)

    made = {name: rounded(name) for name in names}
    return checkpoint.with_tensors(
        {name: made[name] if name in made else checkpoint.tensors[name] for name in checkpoint.tensors},
        Step("quantize", {"method": "rtn", "format": str(fmt)}, __version__))


def with_alphas(prepared: Prepared, alphas: Alphas, config: RSparse) -> Checkpoint:
    """The checkpoint that decodes with an alpha of each linear."""
    source = prepared.checkpoint

    def maker(name: str) -> Callable[[], Stored]:
        if name not in alphas:
            return lambda: source.tensors[name]
        layer = prepared.layer(name, alphas[name], config)
        return lambda: layer

    settings = {**asdict(config), "alphas": {name: round(float(alpha), 4) for name, alpha in alphas.items()}}
    return source.with_tensors(LazyTensors({name: maker(name) for name in source.tensors}),
                               Step("r-sparse", settings, __version__, config.seed))


def decoded_perplexity(model: LanguageModel, windows: Iterable[Ids], *, dense_share: float = 0.0) -> float:
    """exp of the mean loss, every token decoded, but for the first `dense_share` of each window, a prompt."""
    session, total, count = model.session, 0.0, 0
    for ids in windows:
        tokens = np.ascontiguousarray(ids, np.int32)
        model.reset()
        split = int(dense_share * len(tokens))
        for decoding, start, stop in ((False, 0, split), (True, split, len(tokens) - 1)):
            session.decoding = decoding
            for first in range(start, stop, session.batch):
                part = tokens[first:min(first + session.batch, stop)]
                session.forward(part, np.zeros(len(part), np.int32))
                if decoding:
                    rows = np.arange(len(part), dtype=np.int32)
                    total -= float(np.sum(session.log_probs(rows, tokens[first + 1:first + 1 + len(part)])))
                    count += len(part)
        session.decoding = False
    model.reset()
    return math.exp(total / max(count, 1))


# ---- search -------------------------------------------------------------------------------------------------------

class _Trial:
    """Decodes a text with any alphas. What every trial shares is packed once: the weights, which do not change."""

    def __init__(self, prepared: Prepared, config: RSparse, ids: Ids) -> None:
        self._prepared, self._config, self._ids = prepared, config, np.asarray(ids, np.int32)
        base = with_alphas(prepared, dict.fromkeys(prepared.inputs, 1.0), replace(config, low_rank=False))
        self._plan = for_context(plan_of(base), len(ids))
        self._names: dict[int, str] = {}
        recipes, names = recipes_of(self._plan)
        self._packed = pack_all(recipes, key=None)
        self._by_key = {linear.key: names[id(linear.weight)] for linear in linears_of(self._plan)}
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, alphas: NDArray[np.float64]) -> float:
        """The loss, in nats."""
        key = tuple(np.rint(alphas * 1000).astype(int).tolist())
        if key not in self._known:
            self._known[key] = self._loss(dict(zip(self._prepared.inputs, alphas.tolist(), strict=True)))
        return self._known[key]

    def _loss(self, alphas: Alphas) -> float:
        def changed(linear: Linear) -> Linear:
            if linear.name not in alphas:
                return linear
            return replace(linear, weight=self._prepared.layer(linear.name, alphas[linear.name], self._config))

        plan = plan_with(self._plan, changed)
        matrices, names = dict(self._packed.matrices), {}
        for linear in linears_of(plan):
            names[id(linear.weight)] = self._by_key[linear.key]
            for name, factor in low_rank_of(linear):
                names[id(factor)] = name
                matrices[name] = pack_one(recipe_of(name, factor))
        return self._decode(plan, PackedWeights(matrices, 0, False, self._packed.buffer), names)

    def _decode(self, plan: Plan, packed: PackedWeights, names: dict[int, str]) -> float:
        session: Any = _core.Session(build_model(plan, packed, names), default_kv(plan), len(self._ids), 1,
                                     usable_cores().usable, 64)
        session.decoding = True
        total = 0.0
        for first in range(0, len(self._ids) - 1, 64):
            part = self._ids[first:min(first + 64, len(self._ids) - 1)]
            session.forward(part, np.zeros(len(part), np.int32))
            rows = np.arange(len(part), dtype=np.int32)
            total -= float(np.sum(session.log_probs(rows, self._ids[first + 1:first + 1 + len(part)])))
        return total / (len(self._ids) - 1)


def search(prepared: Prepared, ids: Ids, config: RSparse, *, progress: Progress | None = None) -> dict[str, float]:
    """The alpha of each linear that decodes a text best. The first population holds 0.95 and 1 everywhere."""
    rng, genes = np.random.default_rng(config.seed), len(prepared.inputs)
    trial = _Trial(prepared, config, ids)
    population = [np.full(genes, config.alpha), np.ones(genes)]
    population += [np.clip(rng.normal(0.95, 0.1, genes), 0, 1) for _ in range(config.population - 2)]
    losses = [trial(each) for each in population]
    for generation in range(config.generations):
        order = np.argsort(losses, kind="stable")
        children = [population[i] for i in order[:4]]
        while len(children) < config.population:
            pair = [population[min(rng.integers(0, len(population), 4), key=lambda i: losses[i])] for _ in range(2)]
            child = np.where(rng.random(genes) < 0.5, pair[0], pair[1])
            moved = rng.random(genes) < 0.1
            children.append(np.clip(child + moved * rng.normal(0, 0.1, genes), 0, 1))
        population = children
        losses = [trial(each) for each in population]
        if progress is not None:
            progress(f"search, loss {min(losses):.4f}", generation + 1, config.generations)
    best = population[int(np.argmin(losses))]
    notice("info", f"of {config.generations} generations the best loss is {min(losses):.4f}; 0.95 everywhere gives "
           f"{trial(np.full(genes, config.alpha)):.4f}, 1 everywhere {trial(np.ones(genes)):.4f}", where="r-sparse")
    return dict(zip(prepared.inputs, best.tolist(), strict=True))

