"""Speed of a model on this machine, against what the machine can do: the columns of llama-bench, and the roofline.

ppN@D reads N tokens of prompt after D tokens of context; tgN@D feeds N tokens one by one, each chosen from the logits
of the one before. Every round runs each test once, in random order, so that a slow moment of the machine falls on all
of them; rounds after the warm-up count, and the median is the result. What the machine can do is measured right after.

An encoder-decoder's ppN reads a text of N tokens, and writes the keys and values of it that answers see; its tgN@D is
an answer of N tokens to a text of D, and without a depth to one of a single token.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.device import Device
from edgewise.core.errors import ContextOverflowError, InvalidValueError, notice
from edgewise.core.numbers import BF16
from edgewise.core.report import Quantity, Report, Table
from edgewise.core.workload import Workload
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import PLAIN, fitted_run, model_of
from edgewise.engine.model import LanguageModel, native_errors, read_share
from edgewise.engine.plan import AttentionPolicy, Plan, with_attention
from edgewise.engine.profile import profile, profile_table
from edgewise.engine.workload import arithmetic, workload_of, workload_of_text
from edgewise.formats.sources import open_checkpoint
from edgewise.measure.energy import Energy, EnergyMeter
from edgewise.measure.machine import usable_cores
from edgewise.measure.memory import memory_use
from edgewise.measure.repeat import Sample
from edgewise.native import _core  # type: ignore[attr-defined]
from edgewise.native import probe as native_probe

__all__ = ["BenchTest", "Limits", "Timing", "bench", "limits_of", "modelled_joules", "time_tests"]

Progress = Callable[[str, int, int], None]
COLUMNS = ("threads", "test", "token/s", "low", "high", "GB/s", "roof", "share", "J/token", "energy")
"""low, high: 95 % interval of the median from six repeats on, else the range. GB/s: weights, keys and values read.
share: of the roof. energy: measured, modelled or unknown."""


@dataclass(frozen=True)
class BenchTest:
    """tokens: read (prefill) or fed one by one (decode) after `depth` tokens of context."""

    phase: Literal["prefill", "decode"]
    tokens: int
    depth: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.depth < 0:
            raise InvalidValueError(f"a test has at least one token after no negative depth; given {self.tokens} "
                                    f"after {self.depth}")

    @property
    def name(self) -> str:
        return f"{'pp' if self.phase == 'prefill' else 'tg'}{self.tokens}{f'@{self.depth}' if self.depth else ''}"

    @property
    def positions(self) -> int:
        return self.depth + self.tokens + 2  # what is fed before the clock starts included


@dataclass(frozen=True)
class Limits:
    """What the machine can do with so many threads; None where unknown."""

    read_bytes_per_s: float | None = None
    int8_ops_per_s: float | None = None
    fp32_ops_per_s: float | None = None


@dataclass
class Timing:
    """Runs of one test: seconds and joules of each; joules are None where nothing counts them."""

    test: BenchTest
    seconds: list[float] = field(default_factory=list)
    energy: list[Energy] = field(default_factory=list)

    @property
    def speed(self) -> Sample:
        """Tokens per second of each run."""
        return Sample(tuple(self.test.tokens / s for s in self.seconds))

    @property
    def joules_per_token(self) -> float | None:
        """Median over the runs that were counted."""
        known = [e.joules / self.test.tokens for e in self.energy if e.joules is not None]
        return statistics.median(known) if known else None


def limits_of(threads: int, *, nbytes: int = 2**28, seconds: float = 0.2) -> Limits:
    """Measured now: streaming reads of `nbytes`, and multiply-adds in registers for about `seconds` each."""
    return Limits(max(native_probe.read_rates(nbytes, threads, repeats=3)),
                  max(native_probe.int8_rate(threads, seconds / 3) for _ in range(3)),
                  max(native_probe.fp32_rate(threads, seconds / 3) for _ in range(3)))


def time_tests(session: Any, vocab: int, tests: Sequence[BenchTest], *, repeats: int = 7, warmup: int = 1,
               seed: int = 0, meter: EnergyMeter | None = None, encoder: bool = False, reader: Reader | None = None,
               after: Callable[[], object] = lambda: None) -> list[Timing]:
    """Time every test on a native session, slot 0, in rounds. after: called after each run, outside the clock.

    reader: of an encoder-decoder, whose decoder `session` is.
    """
    if repeats < 1 or warmup < 0:
        raise InvalidValueError(f"repeats is at least 1, warm-up at least 0; given {repeats} and {warmup}")
    order, rng = random.Random(seed), np.random.default_rng(seed)
    stream = rng.integers(0, vocab, max(test.positions for test in tests)).astype(np.int32)
    timings = [Timing(test) for test in tests]
    meter = meter or EnergyMeter()
    for turn in range(warmup + repeats):
        # Ascending depth, so that a round reads its context once.
        for timing in sorted(timings, key=lambda t: (t.test.depth, order.random())):
            energy = (_run(session, timing.test, stream, meter, encoder) if reader is None
                      else reader.run(session, timing.test, stream, meter))
            after()
            if turn >= warmup:
                timing.seconds.append(energy.seconds)
                timing.energy.append(energy)
        session.truncate(0, 0)
    return timings


def _run(session: Any, test: BenchTest, stream: np.ndarray[Any, np.dtype[np.int32]], meter: EnergyMeter,
         encoder: bool) -> Energy:
    depth, tokens = test.depth, stream[test.depth:test.depth + test.tokens]
    if encoder:
        session.truncate(0, 0)
        slots = np.zeros(len(tokens), np.int32)
        return meter.measure(lambda: session.forward(tokens, slots))
    held = session.resumable(0, min(session.length(0), depth))
    session.truncate(0, held)
    if held < depth:
        session.prefill(0, stream[held:depth])
    if test.phase == "prefill":
        return meter.measure(lambda: session.prefill(0, tokens))
    # One token is sampled before the clock starts and fed after: so many fed, so many sampled.
    session.prefill(0, stream[depth:depth + 1])
    sampler = _core.Sampler()
    session.generate(0, sampler, 1, [])
    return meter.measure(lambda: session.generate(0, sampler, test.tokens, []))


@dataclass(frozen=True)
class Reader:
    """What reads the texts of an encoder-decoder. session: of its encoder; start: what every answer begins with."""

    session: Any
    start: int

    def run(self, decoder: Any, test: BenchTest, stream: np.ndarray[Any, np.dtype[np.int32]],
            meter: EnergyMeter) -> Energy:
        """One run of a test."""
        if test.phase == "prefill":
            return meter.measure(lambda: self._read(decoder, stream[:test.tokens]))
        self._read(decoder, stream[:max(test.depth, 1)])
        decoder.prefill(0, np.array([self.start], np.int32))
        sampler = _core.Sampler()  # as in _run
        decoder.generate(0, sampler, 1, [])
        return meter.measure(lambda: decoder.generate(0, sampler, test.tokens, []))

    def _read(self, decoder: Any, text: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        self.session.truncate(0, 0)
        self.session.forward(text, np.zeros(len(text), np.int32))
        decoder.truncate(0, 0)
        decoder.set_source(0, self.session.normed(np.arange(len(text), dtype=np.int32)))


def modelled_joules(workload: Workload, seconds: float, device: Device) -> tuple[float | None, str]:
    """Joules of a workload by a device's table, and the numbers used; None and what the table lacks.

    idle_w * seconds + j_per_byte of the first tier that has one * bytes + j_per_op * operations.
    """
    tier = next((t for t in device.tiers if t.j_per_byte is not None), None)
    costs = {name: cost for unit in device.units for name, cost in unit.j_per_op.items()}
    wanted = arithmetic(workload)
    lacking = [name for name, known in (("idle_w", device.idle_w), ("j_per_byte", tier)) if known is None]
    lacking += [f"j_per_op of {name}" for name in wanted if name not in costs]
    if lacking or tier is None or device.idle_w is None or tier.j_per_byte is None:
        return None, f"the table of {device.name} has no {', '.join(lacking)}"
    joules = (device.idle_w * seconds + tier.j_per_byte * workload.moved_bytes
              + sum(costs[name] * count for name, count in wanted.items()))
    return joules, f"table of {device.name}: idle power, {tier.name} bytes, operations"


def bench(source: str | os.PathLike[str] | Checkpoint, *, prompts: Sequence[int] = (512,),
          generated: Sequence[int] = (128,), depths: Sequence[int] = (0,), threads: Sequence[int] = (),
          kv: str | None = None, attention: str | None = None, format: str | None = None, batch: int | None = None,
          repeats: int = 7, warmup: int = 1, seed: int = 0, device: Device | None = None, limits: Limits | None = None,
          cache: bool = True, operators: bool = False, meter: EnergyMeter | None = None,
          progress: Progress | None = None) -> Report:
    """Speed, share of the roofline, bandwidth, memory and energy of a model, test by test.

    prompts, generated: tokens of the pp and tg tests, each at every depth; 0 or nothing leaves them out.
    threads: counts to try, by default the physical cores. limits: what the machine can do, by default measured.
    device: a table whose energy numbers stand in where no counter is readable; without either, energy is unknown.
    operators: a table of each test that says where its time goes, measured apart, since counting costs 2 to 3 %.
    Memory is that of this process, which has loaded nothing else when `edgewise bench` runs.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(os.fspath(source), progress=progress)
    counts = list(dict.fromkeys(threads)) or [usable_cores().usable]
    plan = plan_of(checkpoint)
    attention = attention or fitted_run(checkpoint).attention
    if attention is not None:
        plan = with_attention(plan, AttentionPolicy.parse(attention))
    encoder = plan.kind == "encoder"
    tests = _tests(prompts, generated, depths, plan.kind)
    context = max(test.positions for test in tests)
    if encoder:
        context = max(test.tokens for test in tests)
    model = model_of(checkpoint, format=format, threads=counts[0], context=context, kv=kv, attention=attention,
                     batch=batch, cache=cache, progress=progress)
    if model.context < context:
        raise ContextOverflowError(f"the tests need {context} positions, and the model has {model.context}; take "
                                   "smaller -p, -n or -d")
    meter = meter or EnergyMeter()
    memory = _MemoryPeak()
    timings: list[tuple[int, Timing]] = []
    read: dict[int, float] = {}
    for done, count in enumerate(counts):
        if progress is not None:
            progress(f"{count} threads", done, len(counts))
        session = model.session
        with native_errors():
            if count != counts[0] and model.encoder is not None:
                model = model_of(checkpoint, format=format, threads=count, context=context, kv=kv,
                                 attention=attention, batch=batch, cache=cache)
                session = model.session
            elif count != counts[0]:
                session = _core.Session(model.native, model.kv, model.context, 1, count, int(model.session.batch),
                                        tuning=model.tuning.native)
            timings += [(count, timing) for timing in time_tests(
                session, model.vocab, tests, repeats=repeats, warmup=warmup, seed=seed, meter=meter, encoder=encoder,
                reader=None if model.encoder is None else Reader(model.encoder, model.start or 0), after=memory.look)]
        if model.input_sparse and session.tokens_decoded:
            read[count] = read_share(session, model.shapes)
    quantities = memory.quantities()
    quantities += [Quantity(f"weights read by a decoded token, {count} thread{'s' if count > 1 else ''}", share,
                            "share") for count, share in read.items()]
    ceilings = {count: limits or limits_of(count) for count in counts}  # after the memory was looked at
    for count, ceiling in ceilings.items():
        quantities += [Quantity(f"{label}, {count} thread{'s' if count > 1 else ''}", value, unit)
                       for label, value, unit in (("memory read", ceiling.read_bytes_per_s, "B/s"),
                                                  ("int8 peak", ceiling.int8_ops_per_s, "op/s"),
                                                  ("fp32 peak", ceiling.fp32_ops_per_s, "op/s"))]
    rows = [(count, *_row(timing, plan, model, ceilings[count], format, meter, device, read.get(count, 1.0)))
            for count, timing in timings]
    tables = []
    if operators and plan.kind == "decoder":
        tables = [_operators(model, plan, count, timing.test, ceilings[count], format, repeats)
                  for count, timing in timings]
    elif operators:
        notice("ignored", "operators are counted in decoders", where="bench")
    name = str(checkpoint.metadata.get("name") or checkpoint.source)
    described = (name, model.packed.nbytes, _parameters(model), f"edgewise {model.tier}", model.kv,
                 model.attention)
    return Report(f"Speed of {name}", tuple(quantities), (
        Table("Model", ("model", "size", "params", "backend", "kv", "attention"), (described,),
              ("", "B", "", "", "", "")),
        Table("Tests", COLUMNS, tuple(rows)), *tables),
        environment={"model": checkpoint.source, "repeats": repeats, "warmup": warmup, "seed": seed,
                     "processor": native_probe.processor_name(), "tier": model.tier, "format": format,
                     "batch": int(model.session.batch), "tuning": model.tuning.changed})


def _operators(model: LanguageModel, plan: Plan, threads: int, test: BenchTest, limits: Limits, format: str | None,
               repeats: int) -> Table:
    found = profile(model, plan, phase=test.phase, tokens=test.tokens, depth=test.depth, repeats=repeats,
                    threads=threads, int8=True if format is not None else None)
    return profile_table(found, f"Operators of {test.name}{', one token' if test.phase == 'decode' else ''}, "
                         f"{threads} thread{'s' if threads > 1 else ''}", read_bytes_per_s=limits.read_bytes_per_s,
                         int8_ops_per_s=limits.int8_ops_per_s, fp32_ops_per_s=limits.fp32_ops_per_s)


def _tests(prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int], kind: str) -> list[BenchTest]:
    if kind == "encoder" and (any(generated) or any(depths)):
        notice("ignored", "an encoder does not generate and has no depth: only -p is run", where="bench")
        generated, depths = (), (0,)
    tests = []
    for depth in dict.fromkeys(depths or (0,)):
        if kind != "encoder-decoder" or depth == min(depths):  # a text has nothing before it
            tests += [BenchTest("prefill", count, 0 if kind == "encoder-decoder" else depth)
                      for count in dict.fromkeys(prompts) if count]
        tests += [BenchTest("decode", count, depth) for count in dict.fromkeys(generated) if count]
    if not tests:
        raise InvalidValueError("nothing to run: give at least one of -p and -n that is not 0")
    return tests


def _parameters(model: LanguageModel) -> int:
    """Of the matrices; norms and biases are a fraction of a per cent."""
    return sum(int(matrix.rows * matrix.cols) for matrix in model.packed.matrices.values())


def _row(timing: Timing, plan: Plan, model: LanguageModel, limits: Limits, format: str | None, meter: EnergyMeter,
         device: Device | None, read: float) -> tuple[Any, ...]:
    """The rest of COLUMNS. read: share of the layers' codes that a decoded token reads."""
    test, speed = timing.test, timing.speed
    low, high = speed.interval or (min(speed.values), max(speed.values))
    decode = test.phase == "decode"
    load = _load(test, plan, model, None if format is None else format.lower() not in PLAIN)
    per_s = speed.median if decode else speed.median / test.tokens
    bandwidth = per_s * (load.moved_bytes - (_codes_bytes(model) * (1 - read) if decode else 0))
    work = arithmetic(load)
    kind = "int8" if work.get("int8") else "fp32"
    peak = limits.int8_ops_per_s if kind == "int8" else limits.fp32_ops_per_s
    if format is not None and PLAIN.get(format.lower()) == BF16:
        kind, peak, work = "bf16", None, {"bf16": sum(work.values())}  # a peak of its own, which is not probed
    if decode:
        roof, share = "memory read", _share(bandwidth, limits.read_bytes_per_s)
    else:
        roof, share = f"{kind} peak", _share(per_s * work[kind], peak)
    joules, origin = timing.joules_per_token, "measured"
    if joules is None:
        origin, why = "unknown", next((e.reason for e in timing.energy if e.reason), "no counter")
        if device is not None:
            modelled, why = modelled_joules(load, 1 / per_s, device)
            if modelled is not None:
                joules, origin = modelled / (1 if decode else test.tokens), "modelled"
        notice("info", f"energy is {origin}: {why}", where="bench")
    return test.name, speed.median, low, high, bandwidth / 1e9, roof, share, joules, origin


def _codes_bytes(model: LanguageModel) -> float:
    """Of the layers whose inputs are chosen, without scales."""
    if not model.input_sparse:
        return 0.0
    bits = [matrix.bits for matrix in model.packed.matrices.values() if matrix.columns]
    return sum(rows * cols for layer in model.shapes for rows, cols in layer) * max(bits, default=0) / 8


def _load(test: BenchTest, plan: Plan, model: LanguageModel, int8: bool | None) -> Workload:
    """Of a whole prompt, or of the decode step halfway through the test, which stands for all of them."""
    matrices, decode = model.packed.matrices, test.phase == "decode"
    if plan.encoder is None:
        return workload_of(plan, matrices, tokens=1 if decode else test.tokens, kv=model.kv, int8=int8,
                           depth=test.depth + test.tokens // 2 if decode else test.depth,
                           batch=int(model.session.batch))
    if decode:
        return workload_of(plan, matrices, depth=test.tokens // 2, kv=model.kv, int8=int8, source=max(test.depth, 1))
    return workload_of_text(plan, matrices, tokens=test.tokens, kv=model.kv, int8=int8)


def _share(value: float, limit: float | None) -> float | None:
    return None if limit is None else value / limit


class _MemoryPeak:
    """The largest anonymous and file-backed memory of this process that was seen between runs."""

    def __init__(self) -> None:
        self.anonymous_bytes = self.file_bytes = self.peak_bytes = 0

    def look(self) -> None:
        use = memory_use()
        self.anonymous_bytes = max(self.anonymous_bytes, use.anonymous_bytes)
        self.file_bytes = max(self.file_bytes, use.file_bytes)
        self.peak_bytes = use.peak_bytes

    def quantities(self) -> list[Quantity]:
        return [Quantity("peak memory", self.peak_bytes, "B"),
                Quantity("anonymous memory", self.anonymous_bytes, "B"),
                Quantity("file pages", self.file_bytes, "B")]

