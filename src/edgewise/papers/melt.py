"""MELT: what language models cost on a device, measured headlessly over a quantisation ladder.

Laskaridis et al., "MELTing point: Mobile Evaluation of Language Transformers", MobiCom 2024, arXiv:2403.12844, and
the repositories brave-experiments/{MELT,blade,jetsonlab}-public. MICRO runs have fixed prompt and answer lengths and
no end of text; MACRO runs are talks of several turns whose context carries over. Events and a power trace give energy
per turn; decode is bound by memory; quantisation pays in speed and costs accuracy; sustained use meets heat.

Here the power trace is synthetic and the thermal body simulated: both are marked so. The ladder starts at float
weights off every grid (compress/reference.py); a rung rounds the layers, and the table to 8 bits; perplexity is that of
the evaluation text.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgewise.compress.reference import off_the_grid
from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import collect_notices, notice
from edgewise.core.numbers import QuantFormat, quantize
from edgewise.core.recipe import Claim, Recipe
from edgewise.core.report import Quantity, Report, Table
from edgewise.core.storage import QuantizedTensor
from edgewise.cost.thermal import Body, Sustained, sustain
from edgewise.engine.archs import plan_of
from edgewise.engine.bench import BenchTest, limits_of, time_tests
from edgewise.engine.loading import model_of
from edgewise.engine.model import LanguageModel
from edgewise.engine.plan import Plan
from edgewise.engine.profile import profile, profile_table
from edgewise.engine.workload import arithmetic, workload_of
from edgewise.formats.sources import open_checkpoint
from edgewise.measure.events import Event, EventLog
from edgewise.measure.machine import usable_cores
from edgewise.measure.power import PowerTrace, energy_of_turns
from edgewise.measure.quality import kl_divergence
from edgewise.measure.repeat import rounds
from edgewise.native import _core
from edgewise.papers.random_llama import random_llama

__all__ = ["RECIPE", "synthetic_trace"]

Metrics = dict[str, float | None]
QUESTIONS = ("Name three trees that lose their leaves in autumn.", "Which of them grows tallest?",
             "Write one sentence about it for a child.", "Now say the same in ten words.",
             "What would you ask a gardener about it?", "Thank you. Which tree would you plant, and why?")
WATTS = {"load": 4.0, "prefill": 9.0, "decode": 7.0}
IDLE_W = 1.0
"""Of the synthetic trace: of the order of MELT's phones."""
NAMES = {"float32": "float32", "int8/g32/fp16": "8 bits", "int4/g32/fp16/min": "4 bits", "int3/g32/fp16/min": "3 bits"}


def run(settings: Mapping[str, Any], seed: int, ablate: bool) -> Report:
    """One seed: every rung of the ladder, then energy and heat."""
    threads, rng = usable_cores().usable, np.random.default_rng(seed)
    metrics: Metrics = {}
    if settings["model"] == "random":
        checkpoint = random_llama(seed, hidden=settings["hidden"])
        ids = rng.integers(0, 256, settings["window"])
    else:
        checkpoint, ids = off_the_grid(open_checkpoint(settings["model"]), seed=seed), None
    rows: list[tuple[Any, ...]] = []
    exact: Any = None
    tables: list[Table] = []
    log = EventLog()
    for fmt in NAMES:
        source = checkpoint if fmt == "float32" else _with_table(checkpoint)
        plan = plan_of(source)
        with collect_notices(), log.record("load"):
            model = model_of(source, format=None if fmt == "float32" else fmt, threads=threads,
                             context=settings["context"], cache=False)
        if ablate and fmt == "int4/g32/fp16/min":
            _cold(model, settings, metrics)
        if fmt == "float32" and ids is None:
            ids = _text_ids(model, settings["window"] * settings["windows"])
        logits = np.concatenate([model.forward(part) for part in np.asarray(ids).reshape(-1, settings["window"])])
        exact = logits if exact is None else exact
        row = _rung(model, plan, fmt, settings, seed, metrics)
        kl = float(kl_divergence(exact, logits).mean())
        perplexity = _perplexity(logits, np.asarray(ids), settings["window"])
        rows.append((NAMES[fmt], *row, kl, perplexity))
        if fmt == "int4/g32/fp16/min":
            tables += [_profiled(model, plan, settings, metrics), _macro(model, settings, seed, log)]
            _memory_bound(model, settings, threads, metrics)
    _compare(rows, settings, metrics)
    tables.insert(0, Table("Ladder", ("weights", "MB", "prefill token/s", "decode token/s", "prefill over decode",
                                      "GB/s", "FLOP per byte", "divergence", "perplexity"), tuple(rows)))
    simulated: Metrics = {}
    tables.append(_energy(seed, ablate, simulated, log))
    _heat(settings, ablate, simulated)
    return Report("melt", (*(Quantity(name, value) for name, value in metrics.items()),
                           *(Quantity(name, value, origin="simulated") for name, value in simulated.items())),
                  tuple(tables), environment={"threads": threads, "text": settings.get("text", "random tokens"),
                                              "events": len(log.events)})


# ---- the ladder ---------------------------------------------------------------------------------------------------

def _with_table(checkpoint: Checkpoint) -> Checkpoint:
    """The embedding, which is the head as well, in 8 bits: below that, files of every runtime keep it finer."""
    fmt, name = QuantFormat.parse("int8/g32/fp16"), "model.embed_tokens.weight"
    codes, scales, _ = quantize(np.asarray(checkpoint.tensors[name].dense()), fmt)
    return replace(checkpoint, tensors={**checkpoint.tensors, name: QuantizedTensor(codes, scales, fmt)})


def _text_ids(model: LanguageModel, count: int) -> Any:
    from edgewise.data.texts import text

    return np.asarray(model.encode(text("lee_background").content[:count * 12], add_special=False)[:count])


def _rung(model: LanguageModel, plan: Plan, fmt: str, settings: Mapping[str, Any], seed: int, metrics: Metrics,
          ) -> tuple[float, ...]:
    """MICRO: MB, prefill and decode speed, their ratio, bandwidth and arithmetic intensity of decode."""
    tests = [BenchTest("prefill", settings["prompt"]), BenchTest("decode", settings["answer"])]
    prefill, decode = (timing.speed.median for timing in time_tests(
        model.session, model.vocab, tests, repeats=settings["repeats"], seed=seed))
    model.reset()
    step = workload_of(plan, model.packed.matrices, depth=settings["answer"] // 2, kv=model.kv,
                       int8=None if fmt == "float32" else True)
    metrics[f"decode token/s at {NAMES[fmt]}"] = decode
    return (model.packed.nbytes / 1e6, prefill, decode, prefill / decode, decode * step.moved_bytes / 1e9,
            sum(arithmetic(step).values()) / step.moved_bytes)


def _perplexity(logits: Any, ids: Any, window: int) -> float:
    """Windows side by side, every position but the first of each."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64))
    parts = log_p.reshape(-1, window, logits.shape[-1])
    targets = ids.reshape(-1, window)[:, 1:]
    losses = -np.take_along_axis(parts[:, :-1], targets[..., None], axis=-1)
    return math.exp(float(losses.mean()))


def _compare(rows: Sequence[tuple[Any, ...]], settings: Mapping[str, Any], metrics: Metrics) -> None:
    """What the claims ask of the ladder as a whole."""
    by_name = {row[0]: row for row in rows}
    decode, kl = [row[3] for row in rows], [row[7] for row in rows]
    metrics["least step of divergence down the ladder"] = min(b - a for a, b in itertools.pairwise(kl))
    if settings["model"] == "random":
        return
    perplexity = {name: row[8] for name, row in by_name.items()}
    metrics["decode speed, 4 bits over float32"] = by_name["4 bits"][3] / by_name["float32"][3]
    metrics["least gain of decode speed as bytes fall"] = min(b / a - 1 for a, b in itertools.pairwise(decode))
    metrics["prefill over decode speed at 4 bits"] = by_name["4 bits"][4]
    metrics["perplexity, 8 bits over float"] = perplexity["8 bits"] / perplexity["float32"]
    metrics["perplexity, 4 bits over 8 bits, less 1"] = perplexity["4 bits"] / perplexity["8 bits"] - 1
    metrics["perplexity, 3 bits over float"] = perplexity["3 bits"] / perplexity["float32"]


# ---- operators, memory, talk --------------------------------------------------------------------------------------

def _profiled(model: LanguageModel, plan: Plan, settings: Mapping[str, Any], metrics: Metrics) -> Table:
    found = profile(model, plan, depth=32, int8=True)
    if settings["model"] != "random":  # microseconds of a tiny step are the calls', not the operators'
        metrics["share of linears in a decode step"] = found.linear_share
    return profile_table(found, "Operators of a decode step at 4 bits, one thread")


def _memory_bound(model: LanguageModel, settings: Mapping[str, Any], threads: int, metrics: Metrics) -> None:
    """Decode on one and on two threads, and four sequences in one step."""
    if settings["model"] == "random":
        return  # it fits a cache, and memory does not bound it
    repeats = settings["repeats"]

    def session(count: int, slots: int = 1) -> Any:
        return _core.Session(model.native, model.kv, settings["context"], slots, count, int(model.session.batch))

    def step(made: Any, slots: int) -> Any:
        tokens, where, logits = (np.full(slots, 5, np.int32), np.arange(slots, dtype=np.int32),
                                 np.arange(slots, dtype=np.int32))

        def call() -> None:
            for _ in range(settings["answer"] // 2):
                made.forward(tokens, where)
                made.logits(logits)
            for slot in range(slots):
                made.truncate(slot, 0)

        return call

    one, four = session(threads), session(threads, 4)
    calls = {"one": step(one, 1), "four": step(four, 4)}
    if threads > 1:
        calls["alone"] = step(session(1), 1)
    found = rounds(calls, repeats=repeats)
    metrics["speed of four sequences over one"] = 4 * found["one"].median / found["four"].median
    metrics["decode speed, two threads over one"] = (
        found["alone"].median / found["one"].median if threads == 2 else None)
    if threads != 2:
        notice("info", f"the scaling test compares one and two threads; this process may use {threads}", where="melt")
    limits = limits_of(threads)
    steps = settings["answer"] // 2
    read = model.packed.nbytes * steps / found["one"].median
    metrics["share of read bandwidth in decode at 4 bits"] = read / (limits.read_bytes_per_s or math.inf)


def _macro(model: LanguageModel, settings: Mapping[str, Any], seed: int, log: EventLog) -> Table:
    """A talk: every turn reads what it does not hold yet, answers to its end or the limit, and logs both phases."""
    rng, rows = np.random.default_rng(seed), []
    messages: list[dict[str, str]] = []
    ids: list[int] = []
    for turn in range(settings["turns"]):
        if model.tokenizer is None:
            ids += rng.integers(0, model.vocab, 12).tolist()
            prompt: Any = list(ids)
        else:
            messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
            prompt = messages
        started = time.time()
        answer = model.generate(prompt, max_tokens=settings["answer"], repetition_penalty=1.1).result()
        log.add("prefill", started, answer.prefill_s, tokens=answer.prompt_tokens - answer.reused_tokens, turn=turn)
        log.add("decode", started + answer.prefill_s, answer.decode_s, tokens=len(answer.ids), turn=turn)
        ids += answer.ids
        messages.append({"role": "assistant", "content": answer.text})
        rows.append((turn, answer.prompt_tokens, answer.prompt_tokens - answer.reused_tokens, len(answer.ids),
                     answer.prefill_s * 1e3, len(answer.ids) / answer.decode_s, answer.finish_reason))
    model.reset()
    columns = ("turn", "prompt tokens", "read", "answered", "first token ms", "token/s", "ended")
    return Table("A talk at 4 bits", columns, tuple(rows))


def _cold(model: LanguageModel, settings: Mapping[str, Any], metrics: Metrics) -> None:
    """The first run after loading beside later ones: what a missing warm-up would count."""
    timing, = time_tests(model.session, model.vocab, [BenchTest("prefill", settings["prompt"])],
                         repeats=2 * settings["repeats"] + 1, warmup=0)
    model.reset()
    later = sorted(timing.seconds[1:])
    metrics["first run over the median of later ones, less 1"] = timing.seconds[0] / later[len(later) // 2] - 1


# ---- energy and heat, simulated -----------------------------------------------------------------------------------

def synthetic_trace(log: EventLog, seed: int, *, rate_hz: float = 1000.0, volts: float = 4.0) -> PowerTrace:
    """A meter with irregular samples that sees IDLE_W between events and WATTS in them."""
    rng, end = np.random.default_rng(seed), max(event.end_s for event in log.events) + 1.0
    start = min(event.start_s for event in log.events) - 1.0
    times = np.sort(rng.uniform(start, end, int((end - start) * rate_hz)))
    power = np.full(len(times), IDLE_W)
    for event in log.events:
        power[(times >= event.start_s) & (times < event.end_s)] = WATTS[event.state]
    return PowerTrace(times, power / volts, np.full(len(times), volts))


def _written_log(seed: int, turns: int = 6) -> EventLog:
    """A run as it might have been: load, then turns of seconds with pauses between them."""
    rng, now, events = np.random.default_rng(seed), 3.0, [Event("load", 0.0, 3.0)]
    for turn in range(turns):
        prompt, answer = rng.uniform(0.3, 1.0), rng.uniform(1.0, 4.0)
        events += [Event("prefill", now, prompt, int(prompt * 100), turn),
                   Event("decode", now + prompt, answer, int(answer * 15), turn)]
        now += prompt + answer + rng.uniform(2.0, 4.0)
    return EventLog(tuple(events))


def _energy(seed: int, ablate: bool, metrics: Metrics, measured: EventLog) -> Table:
    """The integrator on integrals that are known, and the account of a run whose watts are known."""
    errors = []
    rng = np.random.default_rng(seed)
    for shape, expected in ((lambda t: np.full_like(t, 3.0), 30.0), (lambda t: 2 * t, 100.0),
                            (lambda t: np.where(np.floor(t) % 2 == 0, 6.0, 1.0), 35.0)):
        times = np.sort(rng.uniform(0, 10, 10_000))
        errors.append(abs(PowerTrace(times, shape(times), np.ones_like(times)).energy_j() / expected - 1))
    metrics["largest error of the integrator"] = max(errors)
    log = _written_log(seed)
    trace = synthetic_trace(log, seed)
    turns = energy_of_turns(trace, log)
    true = {e.turn: 0.0 for e in log.of("decode")}
    for event in log.of("prefill", "decode"):
        true[event.turn] += WATTS[event.state] * event.duration_s
    metrics["largest error of a turn's energy"] = max(abs(t.joules / true[t.turn] - 1) for t in turns)
    busy = sum(e.duration_s for e in log.events)
    idle = trace.times_s[-1] - trace.times_s[0] - busy
    rest = trace.energy_j() - idle * IDLE_W - WATTS["load"] * log.events[0].duration_s
    metrics["sum of the turns over the run less load and pauses"] = sum(t.joules for t in turns) / rest
    if ablate:
        shifted = energy_of_turns(trace, log.shifted(-2.0))
        metrics["error of a turn's energy, clocks 2 s apart"] = min(
            abs(wrong.joules / right.joules - 1) for wrong, right in zip(shifted, turns, strict=True))
        together = energy_of_turns(trace, log, also=("load",))
        metrics["first turn's energy with the load counted, less 1"] = together[0].joules / turns[0].joules - 1
    spoken = EventLog(measured.of("prefill", "decode"))
    shortest = min(event.duration_s for event in spoken.events)
    talk = energy_of_turns(synthetic_trace(spoken, seed, rate_hz=min(max(1000.0, 100 / shortest), 1e6)), spoken)
    return Table("Energy of the talk, watts assumed", ("turn", "tokens", "J", "J per token", "J per prompt token read",
                                                       "J per answer token"),
                 tuple((t.turn, t.tokens, t.joules, t.joules_per_token, *t.split_j) for t in talk))


def _heat(settings: Mapping[str, Any], ablate: bool, metrics: Metrics) -> None:
    """Sustained use of the simulated body: runs of equal work, one after another."""
    work = [settings["turn_s"]] * settings["sustained_turns"]

    def drop(found: Sustained) -> float:
        return 1 - min(found.clocks) / found.clocks[0]

    metrics["drop of speed under sustained use"] = drop(sustain(work))
    if ablate:
        metrics["drop of speed with infinite heat capacity"] = drop(sustain(
            work, replace(Body(), capacity_j_per_k=math.inf)))
        metrics["drop of speed with 60 s of cool-down"] = drop(sustain(work, cool_s=60.0))


def _claims() -> tuple[Claim, ...]:
    card = "card: small-scale check"
    return (
        Claim("Decode gets faster as the weights get smaller", "§5, throughput",
              "least gain of decode speed as bytes fall", 0.0, "order"),
        Claim("4 bits decode at least twice as fast as float32", card, "decode speed, 4 bits over float32", 2.0,
              "at-least"),
        Claim("Prefill is several times as fast per token as decode", card, "prefill over decode speed at 4 bits", 3.0,
              "at-least"),
        Claim("Decode is bound by memory: a second thread helps little", "abstract",
              "decode speed, two threads over one", 1.5, "at-most"),
        Claim("Decode is bound by memory: it takes most of the read bandwidth", "abstract",
              "share of read bandwidth in decode at 4 bits", 0.5, "at-least"),
        Claim("Four sequences at once at least double the speed", card, "speed of four sequences over one", 2.0,
              "at-least"),
        Claim("Matrix products dominate a decode step", "§5, operators", "share of linears in a decode step", 0.6,
              "at-least"),
        Claim("Every step down the ladder costs accuracy", "§6, accuracy", "least step of divergence down the ladder",
              0.0, "order"),
        Claim("8 bits stay within 1 % of float perplexity", card, "perplexity, 8 bits over float", 1.01, "at-most"),
        Claim("4 bits are worse than 8", card, "perplexity, 4 bits over 8 bits, less 1", 0.0, "order"),
        Claim("3 bits are at least 3 % worse than float", card, "perplexity, 3 bits over float", 1.03, "at-least"),
        Claim("The integrator is within 1 % at a kilohertz", card, "largest error of the integrator", 0.01, "at-most"),
        Claim("A turn's energy is within 1 % of the watts that made it", card, "largest error of a turn's energy", 0.01,
              "at-most"),
        Claim("Turns add up to the run less load and pauses", card,
              "sum of the turns over the run less load and pauses", 1.0, "equal", 0.01),
        Claim("Sustained use slows the device down", "§5, sustained", "drop of speed under sustained use", 0.05,
              "at-least"),
        Claim("Without aligned clocks a turn's energy is wrong by more than 10 %", "ablation",
              "error of a turn's energy, clocks 2 s apart", 0.1, "at-least", ablation=True),
        Claim("Without separating the load, a short answer looks costly", "ablation",
              "first turn's energy with the load counted, less 1", 0.1, "at-least", ablation=True),
        Claim("Without warm-up the first run is slower", "ablation",
              "first run over the median of later ones, less 1", 0.0, "order", ablation=True),
        Claim("With infinite heat capacity nothing slows down", "ablation",
              "drop of speed with infinite heat capacity", 0.0, "at-most", 1e-9, ablation=True),
        Claim("With 60 s of cool-down nothing slows down", "ablation", "drop of speed with 60 s of cool-down", 0.0,
              "at-most", 1e-9, ablation=True),
    )


RECIPE = Recipe(
    title="MELT",
    paper="arXiv:2403.12844",
    claims=_claims(),
    scales={
        "smoke": {"model": "random", "hidden": 64, "context": 256, "window": 64, "windows": 1, "prompt": 32,
                  "answer": 16, "repeats": 2, "turns": 3, "turn_s": 20.0, "sustained_turns": 30},
        "small": {"model": "smollm2", "context": 1024, "window": 512, "windows": 2, "prompt": 256, "answer": 64,
                  "repeats": 3, "turns": 4, "turn_s": 20.0, "sustained_turns": 48, "text": "lee_background",
                  "seeds": 3},
        "paper": {"model": "smollm2", "context": 2048, "window": 512, "windows": 64, "prompt": 256, "answer": 256,
                  "repeats": 15, "turns": 6, "turn_s": 20.0, "sustained_turns": 48, "text": "lee_background",
                  "seeds": 5},
    },
    sources={"model": "inferred", "hidden": "inferred", "context": "code", "window": "inferred", "windows": "inferred",
             "prompt": "paper", "answer": "paper", "repeats": "paper", "turns": "code", "turn_s": "inferred",
             "sustained_turns": "code", "text": "inferred"},
    run=run,
)
