"""Statistics of every linear's inputs, gathered while the engine runs a text: of a loaded model as it runs, or of a
checkpoint block by block on float32 inputs, as a walk over it wants them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.walk import Block, Group, blocks_of
from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import ContextOverflowError, InvalidValueError, UnsupportedError, collect_notices
from edgewise.core.stats import InputGatherer, InputStats, Stats
from edgewise.core.storage import Dense, Stored
from edgewise.engine.archs import plan_of
from edgewise.engine.build import build_model, linears_of
from edgewise.engine.model import native_errors
from edgewise.engine.packing import PackedWeights, pack_one, recipe_of
from edgewise.engine.plan import FeedForward, Layer, Linear, Plan, for_context, layer_with
from edgewise.formats.stats_folder import StatsFolder
from edgewise.measure.cores import usable_cores
from edgewise.native import _core  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from edgewise.engine.model import LanguageModel

__all__ = ["EngineStats", "calibrate", "gather"]

Float32 = NDArray[np.float32]
Progress = Callable[[str, int, int], None]
_PARTS = ("attention", "output", "feed_forward", "down")
_PASS_TOKENS = 2048
"""Tokens in one pass; several sequences share one, and one longer than this has a pass to itself."""


def calibrate(model: LanguageModel, texts: Iterable[str | Sequence[int]], *, gram: bool = False, samples: int = 0,
              progress: Progress | None = None) -> Stats:
    """Stats of each linear's inputs, under the linear's name. Linears with the same inputs share one InputStats.

    Long texts are read in parts of the context's length. gram: keep X^T X too, of every site at once: for a large
    model that is more memory than the weights, and `gather` is the way. samples: keep up to so many inputs of each.
    """
    collected: dict[str, tuple[InputGatherer, tuple[str, ...]]] = {}
    model.session.set_capture(True)
    try:
        batches = [ids for text in texts for ids in _parts(model, text)]
        if not batches:
            raise InvalidValueError("calibration needs at least one text with at least one token")
        for done, ids in enumerate(batches):
            model.reset()
            for start in range(0, len(ids), model.session.batch):
                part = ids[start:start + model.session.batch]
                model.session.begin(part, np.zeros(len(part), np.int32))
                for layer in range(model.layers):
                    model.session.run_layers(layer, layer + 1)
                    for site, names in model.sites[layer].items():
                        if names[0] not in collected:
                            collected[names[0]] = InputGatherer(gram=gram, samples=samples), names
                        _add(collected[names[0]][0], np.asarray(model.session.captured(site)), names)
            if progress is not None:
                progress("calibrating", done + 1, len(batches))
    finally:
        model.session.set_capture(False)
        model.reset()
    stats: dict[str, InputStats] = {}
    for gatherer, names in collected.values():
        stats.update(dict.fromkeys(names, gatherer.stats()))
    return Stats(stats)


def _parts(model: LanguageModel, text: str | Sequence[int]) -> list[np.ndarray]:
    ids = np.asarray(model.encode(text, add_special=False) if isinstance(text, str) else text, np.int32)
    return [ids[start:start + model.context] for start in range(0, len(ids), model.context)]


def _add(gatherer: InputGatherer, x: Float32, names: Sequence[str]) -> None:
    try:
        gatherer.add(x)
    except InvalidValueError as error:
        raise InvalidValueError(f"inputs of {names[0]}: {error}; a layer before it overflows, or a weight is damaged: "
                                "take the source in another format, or leave that text out") from None


class EngineStats:
    """A StatsSource of `compress.walk` that runs a checkpoint natively, one part of one block at a time.

    Weights are multiplied as float32, whatever they are stored as, and so are their inputs: how inputs are rounded is a
    choice of the method, not of its statistics. Each part of a block runs once over all tokens.

    sequences: token ids, each of at most the model's positions. gram, samples: as for `InputGatherer`.
    sequential: inputs come from the blocks and groups as replaced so far; else from the checkpoint as it is.
    folder: where states between parts are spilled, tokens * (hidden + widest input) * 4 bytes; by default a temporary
    folder. Kept in memory are one block's weights, the states of one pass and the statistics of one group.
    """

    def __init__(self, checkpoint: Checkpoint, sequences: Iterable[Sequence[int] | NDArray[np.int32]], *,
                 gram: bool = False, samples: int = 0, sequential: bool = False, threads: int | None = None,
                 folder: Path | None = None) -> None:
        self._checkpoint, self._gram, self._samples, self._sequential = checkpoint, gram, samples, sequential
        plan = plan_of(checkpoint)
        if plan.kind == "encoder-decoder":
            raise UnsupportedError(f"{checkpoint.source}: statistics are gathered of decoders and encoders; "
                                   f"{checkpoint.arch} is both")
        self._kind = plan.kind
        self._sequences = [np.ascontiguousarray(ids, np.int32) for ids in sequences]
        self._sequences = [ids for ids in self._sequences if ids.size]
        self.tokens = sum(map(len, self._sequences))
        if self.tokens < 2:
            raise InvalidValueError(f"calibration needs at least two tokens; given {self.tokens}; give a longer text")
        self._context = max(map(len, self._sequences))
        if self._context > plan.context:
            raise ContextOverflowError(f"a calibration sequence has {self._context} tokens; {checkpoint.source} has "
                                       f"{plan.context} positions; cut it into shorter ones")
        self._passes = _passes_of(self._sequences, max(_PASS_TOKENS, self._context))
        self._threads = threads or usable_cores().usable
        self._pool: Any = None
        self._folder = folder
        self._hidden = self._embedded(plan)
        self._between: Float32 | None = None  # inputs of the output or down projection
        self._at = (0, 0)  # the block and the part that come next
        self._matrices: dict[str, tuple[Stored, Any]] = {}

    # ---- the protocol of compress.walk

    def stats(self, block: Block, group: Group, tensors: Mapping[str, Stored]) -> InputStats | None:
        """See StatsSource. Asked for in the order of the walk, each group once."""
        if group.site not in _PARTS:
            return None
        self._run_to(block, _PARTS.index(group.site), tensors)
        gatherer = InputGatherer(gram=self._gram, samples=self._samples)
        if self._between is not None:
            for first, last in self._spans():
                _add(gatherer, self._between[first:last], group.names)
        else:  # norms of the states: nothing is multiplied
            session = self._session(block, tensors)[1]
            for _ in self._each_pass(session):
                _add(gatherer, np.asarray(session.inputs(0, group.site)), group.names)
        return gatherer.stats()

    def leave(self, block: Block, tensors: Mapping[str, Stored]) -> None:
        """See StatsSource."""
        self._run_to(block, len(_PARTS), tensors)
        self._at = (block.index + 1, 0)
        self._matrices.clear()

    @property
    def hidden(self) -> Float32:
        """States that the next block reads, (tokens, hidden), in the order of the sequences. Not to be written to."""
        return self._hidden

    # ---- running

    def _run_to(self, block: Block, part: int, tensors: Mapping[str, Stored]) -> None:
        """Run the parts of the block before `part` that have not run yet."""
        if block.index != self._at[0] or part < self._at[1]:
            raise InvalidValueError(f"statistics come in the order of the walk; block {self._at[0]} is next, and "
                                    f"block {block.index} was asked for")
        if part == self._at[1]:
            return
        layer, session = self._session(block, tensors)
        before, after = self._at[1], part
        parts = _PARTS[before:after]
        width = 0
        if after in (1, 3):
            width = _output_width(layer) if after == 1 else _down_width(layer)
        made = self._array(width) if width else None
        for first, last in self._each_pass(session):
            if self._between is not None:
                session.set_inputs(0, _PARTS[before], np.ascontiguousarray(self._between[first:last]))
            for name in parts:
                if (layer.attention if name in _PARTS[:2] else layer.feed_forward) is not None:
                    session.run_part(0, name)
            if made is not None:
                made[first:last] = np.asarray(session.inputs(0, _PARTS[after]))
            if len(parts) > 1 or before in (1, 3):  # the states change in output and down
                self._hidden[first:last] = np.asarray(session.hidden())
        self._between = made
        self._at = (block.index, part)

    def _session(self, block: Block, tensors: Mapping[str, Stored]) -> tuple[Layer, Any]:
        """The block alone as a native model, its embedding replaced by states that are handed in."""
        seen = _Patched(self._checkpoint.tensors, tensors) if self._sequential else self._checkpoint.tensors
        with collect_notices():  # given when the plan was made first
            plan = for_context(plan_of(replace(self._checkpoint, tensors=seen)), self._context)
        layer = plan.layers[block.index]
        names: dict[int, str] = {}
        matrices: dict[str, Any] = {}
        linears: list[Linear] = []

        def in_floats(linear: Linear) -> Linear:
            held = self._matrices.get(linear.key)
            stored = seen[linear.name]
            if held is None or held[0] is not stored:
                dense = Dense(np.ascontiguousarray(linear.weight.dense(), np.float32))
                held = self._matrices[linear.key] = stored, pack_one(recipe_of(linear.key, dense))
            kept = replace(linear, weight=_Named(linear.weight.shape), activation="float32")
            names[id(kept.weight)], matrices[linear.key] = linear.key, held[1]
            linears.append(kept)
            return kept

        layer = layer_with(layer, in_floats)
        table = Dense(np.zeros((1, plan.hidden), np.float32))
        names[id(table)], matrices[""] = "", pack_one(recipe_of("", table, table=True))
        alone = Plan(plan.arch, plan.kind, plan.hidden, 1, plan.context, Linear("", table), (layer,))
        return layer, self._session_of(alone, matrices, names)

    def _session_of(self, plan: Plan, matrices: Mapping[str, Any], names: dict[int, str]) -> Any:
        weights = PackedWeights(matrices, 0, False, np.zeros(0, np.uint8))
        with native_errors():
            session = _core.Session(build_model(plan, weights, names), "fp32", self._context,
                                    max(len(sequences) for sequences in self._passes), self._threads,
                                    max(_PASS_TOKENS, self._context) + 2, beside=self._pool)
        self._pool = self._pool or session  # its threads serve the later ones
        return session

    def _embedded(self, plan: Plan) -> Float32:
        """States before the first block, (tokens, hidden)."""
        plan = replace(plan, layers=(), head=None)
        table = plan.embedding.weight
        matrices = {"": pack_one(recipe_of(plan.embedding.name, table, table=True))}
        session = self._session_of(plan, matrices, {id(linear.weight): "" for linear in linears_of(plan)})
        hidden = self._array(plan.hidden)
        for (first, last), sequences in zip(self._spans(), self._passes, strict=True):
            with native_errors():
                session.begin(*_tokens_and_slots([self._sequences[i] for i in sequences]))
            hidden[first:last] = np.asarray(session.hidden())
            self._forget(session)
        return hidden

    def _each_pass(self, session: Any) -> Any:
        """Begin each pass with its states in the session, and yield its rows of all tokens."""
        for (first, last), sequences in zip(self._spans(), self._passes, strict=True):
            tokens, slots = _tokens_and_slots([self._sequences[i] for i in sequences])
            session.begin(np.zeros_like(tokens), slots)
            session.set_hidden(np.ascontiguousarray(self._hidden[first:last]))
            yield first, last
            self._forget(session)

    @staticmethod
    def _forget(session: Any) -> None:
        for slot in range(session.slots):
            session.truncate(slot, 0)

    def _spans(self) -> list[tuple[int, int]]:
        ends = np.cumsum([sum(len(self._sequences[i]) for i in sequences) for sequences in self._passes])
        return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))

    def _array(self, width: int) -> Float32:
        """(tokens, width) in a file without a name: the system keeps of it in memory what there is room for."""
        with tempfile.TemporaryFile(dir=self._folder) as file:
            return np.memmap(file, np.float32, "w+", shape=(self.tokens, width))


class _Named:
    """Stands for a weight that is packed already."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.nbytes = shape, 0

    def dense(self) -> Float32:
        raise UnsupportedError("a packed weight has no values to give")

    def matmul(self, x: Float32) -> Float32:
        raise UnsupportedError("a packed weight has no values to give")


class _Patched(Mapping[str, Stored]):
    """A checkpoint's tensors, some of them replaced."""

    def __init__(self, source: Mapping[str, Stored], changed: Mapping[str, Stored]) -> None:
        self._source, self._changed = source, changed

    def __getitem__(self, name: str) -> Stored:
        return self._changed[name] if name in self._changed else self._source[name]

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def __iter__(self) -> Any:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


def _output_width(layer: Layer) -> int:
    return 0 if layer.attention is None else layer.attention.o.weight.shape[1]


def _down_width(layer: Layer) -> int:
    """Zero where experts run instead, whose inputs are not captured, or nothing does."""
    return layer.feed_forward.down.weight.shape[1] if isinstance(layer.feed_forward, FeedForward) else 0


def _passes_of(sequences: Sequence[NDArray[np.int32]], most: int) -> list[list[int]]:
    """Indices of sequences in order, those of a pass of 2 to most + 2 tokens together; no sequence is above `most`.

    A part of a layer runs for two tokens at least, so a token that would be alone goes with its neighbours.
    """
    passes: list[list[int]] = [[]]
    used = 0
    for index, ids in enumerate(sequences):
        last_alone = index == len(sequences) - 1 and len(ids) == 1
        if used > 1 and used + len(ids) > most and not last_alone:
            passes.append([])
            used = 0
        passes[-1].append(index)
        used += len(ids)
    return passes


def _tokens_and_slots(sequences: Sequence[NDArray[np.int32]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    slots = np.repeat(np.arange(len(sequences), dtype=np.int32), [len(ids) for ids in sequences])
    return np.concatenate(sequences), slots


def gather(checkpoint: Checkpoint, sequences: Iterable[Sequence[int] | NDArray[np.int32]], folder: Path, *,
           gram: bool = False, samples: int = 0, threads: int | None = None, key: str = "",
           progress: Progress | None = None) -> Stats:
    """Stats of a checkpoint's linears on float32 inputs, written to a folder block by block and read from there.

    What an earlier, killed call left in the folder is kept; key: as for `walk`, tells runs apart.
    """
    source = EngineStats(checkpoint, sequences, gram=gram, samples=samples, threads=threads)
    kept = StatsFolder(folder, key=f"{key} {checkpoint.source} gram={gram} samples={samples} tokens={source.tokens}")
    blocks = blocks_of(checkpoint)
    for block in blocks:
        tensors = {name: checkpoint.tensors[name] for name in block.tensors}
        if progress is not None:
            progress(f"calibrating {block.name}", block.index, len(blocks))
        for group in block.groups:
            if group.site and not all(name in kept for name in group.names):
                found = source.stats(block, group, tensors)
                if found is not None:
                    kept.add(group.names, found)
        source.leave(block, tensors)
    if progress is not None:
        progress("calibrating", len(blocks), len(blocks))
    return Stats(kept)
