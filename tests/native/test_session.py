"""The Session by itself: slots, steps, truncation, capture, and what it refuses."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
from plans import decoder, encoder, encoder_decoder, ids_for, logits, read, sessions
from reference import forward

from edgewise.core.errors import InvalidValueError
from edgewise.core.storage import Dense
from edgewise.engine.loading import session_of
from edgewise.engine.plan import Experts, Linear
from edgewise.engine.tuning import Tuning
from edgewise.native import _core

PLAN = decoder(layers=3)
IDS = ids_for(PLAN, 40)
ZEROS = np.zeros(64, np.int32)
ROWS = np.arange(64, dtype=np.int32)


def made(**changes):
    return session_of(PLAN, **{"context": 40, "batch": 40, **changes})


def test_layer_by_layer_is_the_same_pass():
    whole = logits(made(), IDS)
    session = made()
    session.begin(IDS, ZEROS[:40])
    for layer in range(3):
        session.run_layers(layer, layer + 1)
    assert np.array_equal(session.logits(ROWS[:40]), whole)


def test_states_can_be_changed_between_layers():
    """A policy written in Python: layer 1 is skipped, or its output undone."""
    session = made()
    session.begin(IDS, ZEROS[:40])
    session.run_layers(0, 1)
    before = session.hidden()
    session.run_layers(1, 2)
    assert not np.array_equal(session.hidden(), before)
    session.set_hidden(before)
    session.run_layers(2, 3)
    skipped = session.logits(ROWS[:40])
    session = made()
    session.begin(IDS, ZEROS[:40])
    session.run_layers(0, 1)
    session.run_layers(2, 3)
    assert np.array_equal(session.logits(ROWS[:40]), skipped)
    with pytest.raises(ValueError, match="not \\(tokens, hidden\\)"):
        session.set_hidden(before[:3])


def test_rows_in_any_order_and_number():
    session = made()
    session.forward(IDS, ZEROS[:40])
    whole = session.logits(ROWS[:40])
    rows = np.array([7, 39, 7, 0], np.int32)
    assert np.array_equal(session.logits(rows), whole[rows])
    assert np.array_equal(session.logits(rows[:1]), whole[7:8])
    states = session.normed(rows)
    assert states.shape == (4, PLAN.hidden)
    assert np.array_equal(states[0], states[2])


def test_log_probs_are_those_of_the_logits():
    session = made()
    session.forward(IDS, ZEROS[:40])
    wide = session.logits(ROWS[:39]).astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    found = session.log_probs(ROWS[:39], IDS[1:])
    assert found == pytest.approx(expected[np.arange(39), IDS[1:]], abs=1e-6)


def test_truncate_goes_back():
    session = made()
    whole = logits(session, IDS)
    session.truncate(0, 11)
    assert session.length(0) == 11
    assert np.array_equal(logits(session, IDS[11:]), whole[11:])
    session.truncate(0, 0)
    assert np.array_equal(logits(session, IDS), whole)
    with pytest.raises(ValueError, match="truncate to 41 positions, but the slot holds 40"):
        session.truncate(0, 41)


def test_slots_are_apart():
    session = made(slots=3)
    whole = logits(made(), IDS)
    other = logits(made(), IDS[::-1].copy())
    tokens = np.stack([IDS[:20], IDS[::-1][:20]], axis=1).reshape(-1)  # two sequences, turn by turn
    session.forward(np.ascontiguousarray(tokens), np.tile(np.int32([2, 0]), 20))
    found = session.logits(ROWS[:40])
    assert np.array_equal(found[::2], whole[:20])
    assert np.array_equal(found[1::2], other[:20])
    assert [session.length(slot) for slot in range(3)] == [20, 0, 20]
    session.truncate(0, 0)
    assert np.array_equal(logits(session, IDS[20:], slot=2), whole[20:])


def test_generation_in_the_core_is_prefill_step_by_step():
    session = made()
    session.prefill(0, IDS[:10])
    greedy = session.generate(0, _core.Sampler(), 12, [])
    assert len(greedy) == 12
    assert session.length(0) == 21  # the last token has not been read
    text = [*IDS[:10].tolist(), *(choice.token for choice in greedy)]
    rows = logits(made(), np.int32(text))
    assert rows[9:21].argmax(1).tolist() == text[10:]
    again = made()
    again.prefill(0, IDS[:10])
    stop = greedy[4].token
    stopped = again.generate(0, _core.Sampler(), 12, [stop])
    assert [c.token for c in stopped] == [c.token for c in greedy[:text[10:].index(stop) + 1]]


def test_generation_in_parts_is_generation_at_once():
    parts, session = [], made()
    session.prefill(0, IDS[:10])
    sampler = _core.Sampler(temperature=1.0, seed=3)
    for n in (1, 2, 0, 5):
        parts += [c.token for c in session.generate(0, sampler, n, [])]
    whole = made()
    whole.prefill(0, IDS[:10])
    assert parts == [c.token for c in whole.generate(0, _core.Sampler(temperature=1.0, seed=3), 8, [])]


def test_capture_keeps_what_the_linears_read():
    session = made()
    session.set_capture(True)
    session.begin(IDS, ZEROS[:40])
    session.run_layers(0, 1)
    layer = PLAN.layers[0]
    h = PLAN.embedding.weight.dense()[IDS].astype(np.float64)
    expected = h / np.sqrt((h**2).mean(1, keepdims=True) + layer.attention_norm.eps) * layer.attention_norm.weight
    assert session.captured("attention") == pytest.approx(expected, abs=1e-5)
    assert session.captured("output").shape == (40, 64)
    assert session.captured("feed_forward").shape == (40, PLAN.hidden)
    assert session.captured("down").shape == (40, 40)
    with pytest.raises(ValueError, match="unknown site knee"):
        session.captured("knee")


def test_a_context_is_what_was_asked_for():
    session = made(context=37)
    assert session.context == 37
    logits(session, IDS[:37])
    with pytest.raises(_core.ContextOverflow, match="position 37 is beyond the context of 37"):
        session.forward(IDS[:1], ZEROS[:1])
    assert session.length(0) == 37
    session.truncate(0, 36)
    with pytest.raises(_core.ContextOverflow, match="38 tokens do not fit the context of 37"):
        session.prefill(0, IDS[:2])
    assert session.length(0) == 36


def test_an_encoder_has_no_logits_and_no_more_positions_than_its_table():
    plan = encoder(positions=20)
    session = session_of(plan, context=30, batch=30)
    with pytest.raises(_core.ContextOverflow, match="position 20 has no position embedding"):
        session.forward(IDS[:21], ZEROS[:21])
    session.forward(IDS[:20], ZEROS[:20])
    with pytest.raises(ValueError, match="encoder: it has no logits"):
        session.logits(ROWS[:1])
    expected = forward(plan, IDS[:20])
    assert session.normed(ROWS[:20]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("call", "message"), [
    (lambda s: s.forward(np.int32([50]), ZEROS[:1]), "token 50 is outside the vocabulary of 50"),
    (lambda s: s.forward(np.int32([-1]), ZEROS[:1]), "token -1 is outside the vocabulary"),
    (lambda s: s.forward(IDS[:1], np.int32([1])), "slot 1, but the session has 1"),
    (lambda s: s.forward(IDS[:2], ZEROS[:1]), "differ in length"),
    (lambda s: s.forward(IDS[:0], ZEROS[:0]), "a pass takes 1 to 16 tokens; given 0"),
    (lambda s: s.forward(IDS[:17], ZEROS[:17]), "a pass takes 1 to 16 tokens; given 17"),
    (lambda s: s.prefill(0, IDS[:0]), "at least one token"),
    (lambda s: s.logits(np.int32([3])), "row 3 of a pass of 2 tokens"),
    (lambda s: s.normed(np.int32([-1])), "row -1 of a pass of 2 tokens"),
    (lambda s: s.log_probs(ROWS[:1], np.int32([77])), "target 77 is outside"),
    (lambda s: s.run_layers(1, 4), "layers 1 to 4 of 3"),
    (lambda s: s.generate(0, _core.Sampler(), 1, []), "call prefill\\(\\) first"),
])
def test_refusals_leave_the_session_as_it_was(call, message):
    session = made(batch=16)
    session.forward(IDS[:2], ZEROS[:2])
    before = session.logits(ROWS[:2])
    with pytest.raises(ValueError, match=message):
        call(session)
    assert session.length(0) == 2
    assert np.array_equal(session.logits(ROWS[:2]), before)
    assert np.array_equal(logits(session, IDS[2:18]), logits(made(), IDS)[2:18])


def test_slots_beyond_the_session_are_refused():
    session = made()
    for call in (lambda: session.length(1), lambda: session.truncate(1, 0), lambda: session.prefill(1, IDS[:2])):
        with pytest.raises(IndexError):
            call()


@pytest.mark.parametrize(("name", "value", "message"), [
    ("kv", "int3", "unknown KV format int3")])
def test_unknown_names(name, value, message):
    with pytest.raises(InvalidValueError, match=message):
        made(**{name: value})


def test_an_unknown_instruction_tier(monkeypatch):
    monkeypatch.setenv("EDGEWISE_ISA", "foo")
    with pytest.raises(InvalidValueError, match=r"foo.*reference"):
        made()


def test_a_model_checks_its_shapes():
    matrix = _core.PackedFormat("float32")
    weight = _core.PackedMatrix(matrix, 16, 16, np.zeros(1024, np.uint8))
    model = _core.Model(16, 50, 64)
    with pytest.raises(ValueError, match="embedding is not \\(vocab, hidden\\)"):
        model.set_embedding(_core.Linear(weight))
    with pytest.raises(ValueError, match="a bias has 3 values; its weight has 16 rows"):
        _core.Linear(weight, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="unknown norm group"):
        _core.Norm("group", None, None, 1e-5)
    linear, norm = _core.Linear(weight), _core.Norm("rms", np.ones(16, np.float32), None, 1e-5)
    good = {"q": linear, "k": linear, "v": linear, "o": linear, "gate": None, "up": linear, "down": linear,
            "attention_norm": norm, "feed_forward_norm": norm, "heads": 1, "kv_heads": 1, "head_dim": 16, "scale": 1.0,
            "rope": -1, "visible": "causal", "window": 0, "function": "relu", "post_norm": False,
            "q_norm": None, "k_norm": None, "after_attention": None, "after_feed_forward": None}
    for changes, message in [
            ({"heads": 3, "kv_heads": 2}, "heads is not a multiple of kv_heads"), ({"head_dim": 1024}, "at most 512"),
            ({"heads": 2}, r"q is \(16, 16\); expected \(32, 16\)"), ({"rope": 0}, "rope index out of range"),
            ({"visible": "some"}, "unknown policy some"), ({"function": "sin"}, "unknown function sin")]:
        with pytest.raises(ValueError, match=message):
            model.add_layer(**{**good, **changes})
    assert model.layers == 0
    model.add_layer(**good)
    assert model.layers == 1


def test_packed_bytes_live_as_long_as_the_model():
    data = np.ones(2 * 4 * 16 * 16, np.uint8)
    alive = weakref.ref(data)
    matrix = _core.PackedMatrix(_core.PackedFormat("float32"), 32, 16, data)
    linear = _core.Linear(matrix)
    del data, matrix
    gc.collect()
    assert alive() is not None
    del linear
    gc.collect()
    assert alive() is None


TUNINGS = [{"runs_per_thread": 1}, {"runs_per_thread": 64}, {"ahead_nbytes": 0, "farthest_nbytes": 0},
           {"ahead_nbytes": 1 << 16, "farthest_nbytes": 1 << 20}, {"spins_before_yield": 0, "spins_before_sleep": 0}]


@pytest.mark.parametrize("settings", TUNINGS, ids=str)
def test_a_tuning_changes_no_bit(settings):
    plan = decoder(layers=3, forms={"all": "Q4_1", "head": "Q8_0"}, hidden=64, ffn=320)
    ids = ids_for(plan, 40)
    expected = session_of(plan, context=80)
    whole = logits(expected, ids)
    expected.truncate(0, 0)
    expected.prefill(0, ids[:1])
    tokens = [choice.token for choice in expected.generate(0, _core.Sampler(), 30, [])]
    for threads in (1, 3):
        session = session_of(plan, context=80, threads=threads, tuning=Tuning(**settings))
        assert np.array_equal(logits(session, ids), whole)
        session.truncate(0, 0)
        session.prefill(0, ids[:1])
        assert [choice.token for choice in session.generate(0, _core.Sampler(), 30, [])] == tokens


def test_a_tuning_is_checked():
    assert _core.Tuning(runs_per_thread=3).runs_per_thread == 3
    assert _core.Tuning().spins_before_yield == 20_000
    for wrong in ({"runs_per_thread": 0}, {"spins_before_sleep": -1}):
        with pytest.raises(ValueError, match="at least one run per thread"):
            _core.Tuning(**wrong)


class TestProfile:
    def work(self, session):
        session.truncate(0, 0)
        session.prefill(0, IDS)
        session.truncate(0, 5)
        session.prefill(0, IDS[5:6])
        return [choice.token for choice in session.generate(0, _core.Sampler(), 20, [])], session.last_logits()

    @pytest.mark.parametrize("threads", [1, 3])
    def test_it_changes_no_bit(self, threads):
        session = made(threads=threads)
        tokens, last = self.work(session)
        session.set_profile(True)
        for _ in range(2):
            found, again = self.work(session)
            assert found == tokens
            assert np.array_equal(again, last)
        assert session.profile()["down"] > 0

    @pytest.mark.parametrize("threads", [1, 2])
    def test_the_parts_are_of_the_calls_and_of_nothing_else(self, threads):
        session = made(threads=threads)
        session.set_profile(True)
        started = time.perf_counter()
        self.work(session)
        wall = time.perf_counter() - started
        time.sleep(0.05)  # between calls nothing is counted
        parts = session.profile()
        for name in ("embed", "inputs", "qkv", "attention", "out", "gate_up", "down", "head", "sampling", "other"):
            assert parts.pop(name) > 0, name
        waited = parts.pop("wait")
        assert (waited == 0) if threads == 1 else (waited >= 0)  # the other thread may be late, or rest
        assert parts == {"experts": 0, "cross": 0}
        assert sum(session.profile().values()) <= wall

    def test_it_starts_at_zero_and_stops(self):
        session = made()
        self.work(session)
        assert sum(session.profile().values()) == 0
        session.set_profile(True)
        self.work(session)
        session.set_profile(False)
        assert sum(session.profile().values()) == 0
        self.work(session)
        assert sum(session.profile().values()) == 0

    def test_layer_by_layer(self):
        session = made()
        session.set_profile(True)
        session.begin(IDS, ZEROS[:40])
        assert {name for name, seconds in session.profile().items() if seconds} <= {"embed", "other", "wait"}
        session.run_layers(0, 1)
        parts = session.profile()
        assert parts["qkv"] > 0
        assert parts["head"] == parts["sampling"] == 0

    def test_routed_feed_forwards_and_cross_attention_are_operators_of_their_own(self):
        plan = replace(PLAN, layers=tuple(replace(layer, feed_forward=Experts(
            Linear("router", Dense(np.eye(2, PLAN.hidden, dtype=np.float32)), None, "float32"),
            (layer.feed_forward, replace(layer.feed_forward)), 1, True)) for layer in PLAN.layers[:1]))
        session = session_of(plan, context=40, batch=40)
        session.set_profile(True)
        self.work(session)
        parts = session.profile()
        assert parts["experts"] > 0
        assert parts["gate_up"] == parts["down"] == parts["cross"] == 0
        plan = encoder_decoder(layers=1, context=40)
        reader, session = sessions(plan, context=40)
        session.set_profile(True)
        read((reader, session), ids_for(plan, 7))
        after_source = session.profile()
        assert after_source["cross"] > 0
        assert after_source["qkv"] == 0
        session.forward(ids_for(plan, 5), ZEROS[:5])
        parts = session.profile()
        assert parts["cross"] > after_source["cross"]
        assert parts["experts"] == 0
