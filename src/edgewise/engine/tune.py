"""Tune a machine once: which settings make a model run faster here, without changing an answer.

    report = tune(budget_s=30)

A model of random weights, larger than the caches, decodes and reads prompts under the settings in use and under a
candidate, in pairs (`measure.repeat.compare`). A candidate stays when the whole interval of its ratio lies above 1 by
more than MARGIN, in what it is about, and nothing else gets slower. In the end everything that stayed is compared with
the defaults; if that is no gain beyond noise, the defaults stay. The result is stored for `load` (`engine.tuning`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from edgewise.core.errors import InvalidValueError, notice
from edgewise.core.report import Quantity, Report, Table
from edgewise.engine.build import build_model
from edgewise.engine.loading import recipes_of
from edgewise.engine.packing import pack_all
from edgewise.engine.plan import Attention, FeedForward, Layer, Linear, Norm, Plan, Rope
from edgewise.engine.tuning import Tuning, fingerprint, save_tuning
from edgewise.formats.ggml_blocks import codec, stored_of
from edgewise.measure.cores import usable_cores
from edgewise.measure.repeat import Comparison, compare
from edgewise.native import _core  # type: ignore[attr-defined]

__all__ = ["MARGIN", "Candidate", "Found", "Trial", "candidates", "search", "synthetic_plan", "tune"]

Work = Literal["decode", "prefill"]
MARGIN = 0.01
"""A gain below one per cent is not worth a setting of its own."""
MOST_PAIRS, FEWEST_PAIRS, SCREENED = 11, 7, 3
"""Fewer than six pairs have no interval."""
ALL_WORK: tuple[Work, ...] = ("decode", "prefill")
DECODED, READ = 24, 512
"""Tokens of a run of each kind."""
_DEFAULTS = {"batch": 256, "huge_pages": True}
COLUMNS = ("setting", "before", "tried", "in", "gain", "low", "high", "outcome")


@dataclass(frozen=True)
class Candidate:
    """A value of one field of Tuning. about: what it may speed up, the first being what it is for."""

    setting: str
    value: int | bool
    about: tuple[Work, ...]


@dataclass(frozen=True)
class Trial:
    """What became of a candidate. gain: seconds before over seconds with it, one comparison for each of `about`."""

    candidate: Candidate
    before: int | bool | None
    gains: tuple[Comparison, ...]
    outcome: Literal["kept", "no gain", "no time left"]


def candidates(threads: int) -> tuple[Candidate, ...]:
    """What is tried on a machine with so many cores, the most telling first."""
    fewer = dict.fromkeys(n for n in (threads - 1, threads // 2, 1) if 0 < n < threads)
    decode, prefill = ALL_WORK[:1], ALL_WORK[1:]
    return (
        *(Candidate("threads", n, ALL_WORK) for n in fewer),
        Candidate("huge_pages", False, ALL_WORK),
        *(Candidate("farthest_nbytes", n << 10, decode) for n in (256, 64)),
        *(Candidate("ahead_nbytes", n, decode) for n in (12288, 3072)),
        *(Candidate("batch", n, prefill) for n in (512, 128)),
        *(Candidate("runs_per_thread", n, prefill) for n in (16, 4)),
        *(Candidate("spins_before_yield", n, ALL_WORK) for n in (2_000,)),
    )


class _TimeUp(Exception):
    """The budget is spent."""


@dataclass(frozen=True)
class Found:
    """tuning: the settings to keep. gains: of all of them together over the start, by kind of work."""

    tuning: Tuning
    trials: tuple[Trial, ...]
    gains: Mapping[Work, Comparison]


def search(measure: Callable[[Tuning, Work], float], tries: Sequence[Candidate], *, budget_s: float,
           clock: Callable[[], float] = time.perf_counter, started: float | None = None,
           progress: Callable[[str, float], None] = lambda what, spent_s: None) -> Found:
    """The best settings that the budget lets one find, from the defaults on.

    measure: seconds of one run of a kind of work under settings. No run begins after the budget is spent, so the end
    comes at most one run later. started: when the budget began to run, by the clock.
    """
    began = clock() if started is None else started
    deadline = began + budget_s
    seconds: dict[Work, float] = {}

    def timed(tuning: Tuning, work: Work) -> float:
        if clock() >= deadline:
            raise _TimeUp
        seconds[work] = measure(tuning, work)
        return seconds[work]

    def cost(works: Sequence[Work], pairs: int) -> float:
        """Seconds of so many pairs and the pair that warms up, if runs take half as long again as the last ones."""
        return 2 * 1.5 * sum(seconds[work] for work in works) * (pairs + 1)

    def compared(first: Tuning, second: Tuning, works: Sequence[Work], pairs: int) -> tuple[Comparison, ...]:
        return tuple(compare(lambda w=work: timed(first, w), lambda w=work: timed(second, w),  # type: ignore[misc]
                             pairs=pairs, measure=lambda run: run()) for work in works)

    def gains_of(before: Tuning, after: Tuning, works: Sequence[Work], until: float) -> tuple[Comparison, ...]:
        """A few pairs show most candidates to be none; only the others are worth an interval, of pairs of its own."""
        if cost(works, FEWEST_PAIRS + SCREENED) > until - clock():
            raise _TimeUp
        glance = compared(before, after, works, SCREENED)
        if not any(gain.ratio > 1 for gain in glance):
            return glance
        pairs = min(MOST_PAIRS, int((until - clock()) / cost(works, 0)) - 1)
        return compared(before, after, works, max(pairs, FEWEST_PAIRS))

    now, start = Tuning(), Tuning()
    trials: list[Trial] = []
    try:
        for work in ALL_WORK:
            timed(now, work)
            timed(now, work)  # the first one also made the session
    except _TimeUp:
        return Found(start, tuple(Trial(one, None, (), "no time left") for one in tries), {})
    for one in tries:
        progress(f"{one.setting} {one.value}", clock() - began)
        before = getattr(now, one.setting)
        after = replace(now, **{one.setting: one.value})  # type: ignore[arg-type]
        try:
            # What the comparison with the defaults takes in the end is kept back.
            gains = gains_of(now, after, one.about, deadline - cost(ALL_WORK, FEWEST_PAIRS))
        except _TimeUp:
            trials.append(Trial(one, before, (), "no time left"))
            continue
        kept = any(_low(gain) > 1 + MARGIN for gain in gains) and not any(map(_loses, gains))
        trials.append(Trial(one, before, gains, "kept" if kept else "no gain"))
        now = after if kept else now
    if now == start:
        return Found(start, tuple(trials), {})
    progress("all changes together", clock() - began)
    try:
        pairs = min(MOST_PAIRS, max(FEWEST_PAIRS, int((deadline - clock()) / cost(ALL_WORK, 0)) - 1))
        final = dict(zip(ALL_WORK, compared(start, now, ALL_WORK, pairs), strict=True))
    except _TimeUp:
        return Found(start, tuple(trials), {})
    better = any(_low(gain) > 1 for gain in final.values()) and not any(map(_loses, final.values()))
    return Found(now if better else start, tuple(trials), final)


def _low(gain: Comparison) -> float:
    return (gain.interval or (0.0, 0.0))[0]


def _loses(gain: Comparison) -> bool:
    """Beyond noise."""
    return gain.interval is not None and gain.interval[1] < 1


# ---- a model to try them on ---------------------------------------------------------------------------------------

def synthetic_plan(*, hidden: int = 1024, layers: int = 8, heads: int = 16, kv_heads: int = 4, width: int = 2816,
                   vocab: int = 16384, context: int = 1024, seed: int = 0) -> Plan:
    """A Llama of random 4-bit weights and a head in 8 bits: 74 MB by default, more than caches hold."""
    rng = np.random.default_rng(seed)
    head_dim = hidden // heads

    def linear(name: str, rows: int, cols: int, kind: str = "Q4_1") -> Linear:
        raw = rng.integers(0, 256, (rows, codec(kind).row_nbytes(cols)), np.uint8)
        blocks = raw.reshape(rows, -1, codec(kind).block_nbytes)
        deviation = cols**-0.5
        # Scales come first in a block, and random bits are no number to multiply by.
        if kind == "Q4_1":
            blocks[..., :4] = np.array([deviation / 4, -2 * deviation], "<f2").view(np.uint8)
        else:
            blocks[..., :2] = np.array([deviation / 64], "<f2").view(np.uint8)
        return Linear(name, stored_of(kind, raw, (rows, cols)))

    norm = Norm("rms", np.ones(hidden, np.float32), 1e-5)
    rope = Rope((10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32))
    made = tuple(
        Layer(Attention(linear(f"{i}.q", hidden, hidden), linear(f"{i}.k", kv_heads * head_dim, hidden),
                        linear(f"{i}.v", kv_heads * head_dim, hidden), linear(f"{i}.o", hidden, hidden), heads,
                        kv_heads, head_dim, head_dim**-0.5, rope),
              FeedForward(linear(f"{i}.up", width, hidden), linear(f"{i}.down", hidden, width),
                          linear(f"{i}.gate", width, hidden)), norm, norm)
        for i in range(layers))
    table = linear("embedding", vocab, hidden, "Q8_0")
    return Plan("llama", "decoder", hidden, vocab, context, table, made, norm, replace(table, name="head"))


class _Bench:
    """Runs of the synthetic model. Sessions share their threads where the settings allow it, so that a moment in which
    others take the cores away, and what the pool does about it, falls on both sides of a comparison."""

    def __init__(self, plan: Plan, threads: int) -> None:
        self._plan = plan
        self._threads = threads
        self._models: dict[bool, Any] = {}
        self._sessions: dict[Tuning, Any] = {}
        self._pools: dict[Tuning, Any] = {}
        self._last = Tuning()
        self._tokens = np.random.default_rng(0).integers(0, plan.vocab, READ).astype(np.int32)

    def seconds(self, tuning: Tuning, work: Work) -> float:
        session = self._session(tuning)
        if self._pool(tuning) != self._last:
            time.sleep(0.02)  # waiting threads of the other pool spin for a while, and take a core
            self._last = self._pool(tuning)
        session.truncate(0, 0)
        if work == "prefill":
            started = time.perf_counter()
            session.prefill(0, self._tokens)
            return time.perf_counter() - started
        session.prefill(0, self._tokens[:1])
        sampler = _core.Sampler()
        session.generate(0, sampler, 1, [])
        started = time.perf_counter()
        session.generate(0, sampler, DECODED, [])
        return time.perf_counter() - started

    @staticmethod
    def _pool(tuning: Tuning) -> Tuning:
        """What threads depend on."""
        return Tuning(threads=tuning.threads, spins_before_yield=tuning.spins_before_yield,
                      spins_before_sleep=tuning.spins_before_sleep)

    def _session(self, tuning: Tuning) -> Any:
        if tuning not in self._sessions:
            if len(self._sessions) == 2:
                del self._sessions[next(iter(self._sessions))]
            huge = tuning.huge_pages is not False
            if huge not in self._models:
                recipes, names = recipes_of(self._plan)
                self._models[huge] = build_model(self._plan, pack_all(recipes, key=None, huge_pages=huge), names)
            pool = self._pool(tuning)
            self._sessions[tuning] = _core.Session(
                self._models[huge], "fp16", READ + DECODED + 2, 1, tuning.threads or self._threads,
                tuning.batch or _DEFAULTS["batch"], beside=self._pools.get(pool), tuning=tuning.native)
            self._pools.setdefault(pool, self._sessions[tuning])
        self._sessions[tuning] = self._sessions.pop(tuning)  # the one used last is the last to go
        return self._sessions[tuning]


# ---- the whole of it ----------------------------------------------------------------------------------------------

def tune(*, budget_s: float = 30.0, plan: Plan | None = None, store: bool = True,
         progress: Callable[[str, float], None] = lambda what, spent_s: None) -> Report:
    """Find the settings of this machine within budget_s, store them, and report every change with its gain.

    plan: what runs, by default synthetic_plan(). progress(what, spent_s) is told what is tried next.
    """
    if budget_s <= 0:
        raise InvalidValueError(f"tuning takes time; given {budget_s} s")
    started = time.perf_counter()
    progress("a model of random weights", 0.0)
    threads = usable_cores().usable
    bench = _Bench(plan or synthetic_plan(), threads)
    found = search(bench.seconds, candidates(threads), budget_s=budget_s, started=started, progress=progress)
    settings = found.tuning.changed
    kept = [trial for trial in found.trials if trial.outcome == "kept"]
    if kept and not settings:
        notice("info", "all changes together are no gain beyond noise; the defaults stay", where="tune")
    untried = [f"{one.setting} = {one.value}" for one in
               (trial.candidate for trial in found.trials if trial.outcome == "no time left")]
    if untried:
        notice("info", f"{budget_s:g} s were too short to try {', '.join(untried)}", where="tune")
    quantities = [Quantity("changed settings", len(settings)),
                  *(Quantity(name, value) for name, value in settings.items()),
                  *(gain.quantity(f"{work} gain") for work, gain in found.gains.items())]
    if store:
        gains = {str(work): {"ratio": gain.ratio, "interval": gain.interval} for work, gain in found.gains.items()}
        quantities.append(Quantity("stored in", str(save_tuning(found.tuning, gains))))
    quantities.append(Quantity("spent", time.perf_counter() - started, "s"))
    return Report("Tuning of this machine", tuple(quantities),
                  (Table("Trials", COLUMNS, tuple(_rows(found.trials, threads))),),
                  environment={**fingerprint(), "settings": settings, "budget_s": budget_s})


def _rows(trials: Sequence[Trial], threads: int) -> Iterator[tuple[Any, ...]]:
    native = _core.Tuning()
    for trial in trials:
        one = trial.candidate
        usual = threads if one.setting == "threads" else _DEFAULTS.get(one.setting, getattr(native, one.setting, None))
        before = usual if trial.before is None else trial.before
        if not trial.gains:
            yield one.setting, before, one.value, one.about[0], None, None, None, trial.outcome
        for work, gain in zip(one.about, trial.gains, strict=False):
            low, high = gain.interval or (None, None)
            yield one.setting, before, one.value, work, gain.ratio, low, high, trial.outcome
