"""Encoder-decoders: texts read by one stack and answered by another. Without torch; test_t5.py has transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from plans import answer, biased, decoder, encoder_decoder, ids_for, logits, sessions
from reference import MUTATIONS, bucket, forward
from tiny_checkpoints import EOS, llama, t5

from edgewise.core.errors import (
    ContextOverflowError,
    EdgewiseError,
    FormatError,
    InvalidValueError,
    UnsupportedError,
    collect_notices,
)
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import Dense
from edgewise.engine.archs import plan_of
from edgewise.engine.bench import BenchTest, Limits, Reader, bench
from edgewise.engine.conversation import Conversation
from edgewise.engine.loading import model_of, requantised, session_of
from edgewise.engine.memory import kv_bytes, scratch_bytes
from edgewise.engine.plan import AttentionPolicy, RelativeBias
from edgewise.engine.workload import arithmetic, workload_of, workload_of_text
from edgewise.fit.convert import convert
from edgewise.fit.sensitivity import Bench
from edgewise.formats.folder import read_folder
from edgewise.measure.energy import Energy
from edgewise.native import _core

TOLERANCE = 2e-5  # of the largest logit: float32 sums
TEXT = "A text of more than thirty-two tokens."


@pytest.fixture(scope="module")
def model():
    return model_of(t5(), threads=2, kv="fp32")


def miss(found, expected) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# ---- biases by distance -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (12, 20), (32, 17), (8, 1000), (4, 3)])
@pytest.mark.parametrize("both", [True, False])
def test_buckets_are_those_of_the_paper(buckets, most, both):
    bias = RelativeBias(np.zeros((buckets, 1), np.float32), most, both)
    distances = np.arange(-3 * most, 3 * most + 1)
    found = bias.buckets(distances)
    expected = np.array([bucket(bias, int(d)) for d in distances])
    # A distance whose logarithm falls on the edge of two buckets may take either: float32 rounds.
    assert np.abs(found - expected).max() <= 1
    assert np.mean(found != expected) < 0.02
    assert (found >= 0).all()
    assert (found < buckets).all()


def test_a_table_by_distance_has_every_distance_once():
    rng = np.random.default_rng(0)
    bias = RelativeBias(rng.standard_normal((8, 3)).astype(np.float32), 9, True)
    table = bias.by_distance(9)
    assert table.shape == (3, 19)
    for distance in range(-9, 10):
        np.testing.assert_array_equal(table[:, distance + 9], bias.table[bucket(bias, distance)])


@pytest.mark.parametrize("kv", ["fp32", "int8"])
@pytest.mark.parametrize("most", [11, 40, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 1), (14, 1)])
def test_scores_are_biased_by_distance(heads, kv_heads, most, kv):
    """Nearer than a tile, past several, past a chunk of 256 positions; one token at a time too."""
    plan = biased(decoder(heads=heads, kv_heads=kv_heads), most=most)
    ids = ids_for(plan, 330)
    found = logits(session_of(plan, kv=kv, context=330, threads=2), ids)
    expected = forward(plan, ids, kv=kv)
    assert miss(found, expected) < (TOLERANCE if kv == "fp32" else 1e-2)
    if kv == "fp32":
        for name in ("biases of other heads", "nearer distances are one", "distances of one direction"):
            assert miss(found, forward(MUTATIONS[name](plan), ids)) > 20 * TOLERANCE, name
    session = session_of(plan, kv=kv, context=330)
    logits(session, ids[:250])
    np.testing.assert_array_equal(logits(session, ids[250:270], step=1), found[250:270])


@pytest.mark.parametrize("policy", [AttentionPolicy("full"), AttentionPolicy("sliding", 19)])
def test_scores_are_biased_under_other_policies(policy):
    plan = biased(decoder(policy=policy))
    ids = ids_for(plan, 64)
    assert miss(logits(session_of(plan, context=64, batch=64), ids), forward(plan, ids)) < TOLERANCE


# ---- attention across ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kv", ["fp32", "fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("cross_groups", [(4, 4), (6, 2), (13, 1)])
def test_logits_are_the_executors(cross_groups, kv):
    plan = encoder_decoder(cross_groups=cross_groups, layers=2)
    text, ids = ids_for(plan, 40, seed=4), ids_for(plan, 30)
    found = answer(sessions(plan, context=48, kv=kv), text, ids)
    expected = forward(plan, text, decoder_ids=ids, kv=kv)
    assert miss(found, expected) < {"fp32": TOLERANCE, "fp16": 1e-3, "bf16": 1e-2, "int8": 1e-2, "int4": 1e-1}[kv]
    if kv == "fp32":
        for name in ("cross-attention left out", "cross norm epsilon"):
            assert miss(found, forward(MUTATIONS[name](plan), text, decoder_ids=ids)) > 20 * TOLERANCE, name


def test_a_text_of_several_chunks_is_seen_whole():
    plan = encoder_decoder()
    text, ids = ids_for(plan, 600, seed=4), ids_for(plan, 20)
    expected = forward(plan, text, decoder_ids=ids)
    for step, batch in ((None, 256), (1, 256), (7, 7)):
        found = answer(sessions(plan, context=600, batch=batch), text, ids, step=step)
        assert miss(found, expected) < TOLERANCE


def test_states_of_another_width_than_the_decoder():
    """The native core asks for no more than that the keys fit the states."""
    plan = encoder_decoder(layers=1)
    wide = decoder(hidden=80, vocab=plan.vocab, seed=9, first=1, policy=AttentionPolicy("full"))
    wide = replace(biased(wide), kind="encoder", head=None, embedding=replace(wide.embedding, name="wide"))
    cross = plan.layers[0].cross
    other = decoder(hidden=80, heads=cross.kv_heads, kv_heads=cross.kv_heads, seed=11).layers[0].attention
    layer = replace(plan.layers[0], cross=replace(
        cross, k=replace(other.k, name="wide k"), v=replace(other.v, name="wide v")))
    plan = replace(plan, layers=(layer,), encoder=wide)
    text, ids = ids_for(plan, 20, seed=4), ids_for(plan, 12)
    assert miss(answer(sessions(plan, context=32), text, ids), forward(plan, text, decoder_ids=ids)) < TOLERANCE


def test_a_session_says_what_is_wrong_with_a_source():
    plan = encoder_decoder()
    reader, session = sessions(plan, context=32)
    states = np.zeros((3, plan.hidden), np.float32)
    with pytest.raises(ValueError, match="slot 0 has no source"):
        session.prefill(0, np.int32([1]))
    with pytest.raises(ValueError, match="at least one state"):
        session.set_source(0, states[:0])
    with pytest.raises(ValueError, match="states have 47 values; cross-attention reads 48"):
        session.set_source(0, np.zeros((3, 47), np.float32))
    with pytest.raises(_core.ContextOverflow, match="33 states is longer than the 32"):
        session.set_source(0, np.zeros((33, 48), np.float32))
    with pytest.raises(IndexError):
        session.set_source(1, states)
    with pytest.raises(ValueError, match="no cross-attention"):
        reader.set_source(0, states)
    assert session.source_length(0) == 0
    session.set_source(0, states)
    session.prefill(0, np.int32([1, 2]))
    session.set_source(0, states[:2])
    assert (session.source_length(0), session.length(0)) == (2, 0)


# ---- a loaded model -----------------------------------------------------------------------------------------------

def test_forward_states_and_embeddings_are_the_executors(model):
    ids, answers = model.encode(TEXT), [0, 5, 9, 200]
    plan = plan_of(t5())
    assert miss(model.states(ids), forward(plan.encoder, ids)) < TOLERANCE
    assert miss(model.forward(ids, answers), forward(plan, ids, decoder_ids=answers)) < TOLERANCE
    mean = model.states(ids).mean(0)
    assert model.embed(TEXT)[0] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)


def test_a_tied_output_layer_is_scaled():
    checkpoint = t5(gated=False)
    plan = plan_of(checkpoint)
    assert plan.head.weight is plan.embedding.weight
    assert plan.logit_scale == 64**-0.5
    ids = [5, 6, 7]
    found = model_of(checkpoint, kv="fp32").forward(ids, [0, 3])
    assert miss(found, forward(plan, ids, decoder_ids=[0, 3])) < TOLERANCE


def test_generation_takes_the_likeliest_token_again_and_again(model):
    ids = model.encode(TEXT)
    generation = model.generate(TEXT, max_tokens=20, ignore_eos=True).result()
    assert generation.prompt_tokens == len(ids)
    expected = [0]
    for _ in range(20):
        expected.append(int(model.forward(ids, expected)[-1].argmax()))
    assert generation.ids == expected[1:]
    assert len(set(expected)) > 3
    # Its first token is no part of the answer, nor of the text.
    assert generation.text == model.tokenizer.decode(expected[1:])
    again = model.generate(ids, max_tokens=20, ignore_eos=True).result()
    assert (again.ids, again.reused_tokens) == (generation.ids, len(ids))
    other = model.generate("Another text", max_tokens=20, ignore_eos=True).result()
    assert other.ids != generation.ids
    assert other.reused_tokens == 0
    assert model.generate(TEXT, max_tokens=20, ignore_eos=True).result().ids == generation.ids


def test_generation_ends_with_the_end_of_text(model):
    """Rows of the output layer exchanged: where another token was the likeliest, the end of the text is now."""
    ids = model.generate(TEXT, max_tokens=20, ignore_eos=True).result().ids
    last = next(i for i in range(1, 20) if ids[i] not in (*ids[:i], 0, EOS))
    head = np.array(t5().tensors["lm_head.weight"].dense())
    head[[ids[last], EOS]] = head[[EOS, ids[last]]]
    ending = model_of(replace(t5(), tensors={**t5().tensors, "lm_head.weight": Dense(head)}), kv="fp32")
    generation = ending.generate(TEXT, max_tokens=20).result()
    assert generation.finish_reason == "stop"
    assert generation.ids == ids[:last]


def test_a_full_context(model):
    """Text and answer have the context each for itself."""
    small = model_of(t5(), context=16)
    with pytest.raises(ContextOverflowError, match="the prompt has 38 tokens, the context 16"):
        small.generate(TEXT).result()
    with pytest.raises(ContextOverflowError, match="1 tokens of prompt and 17 new ones"):
        small.generate("A text", max_tokens=17).result()
    assert len(small.generate("A text of length", max_tokens=16, ignore_eos=True).result().ids) == 16
    with collect_notices() as notices:
        ended = small.generate("A text", max_tokens=30, overflow="stop", ignore_eos=True).result()
        again = small.generate("A text", max_tokens=30, overflow="restart", ignore_eos=True).result()
    assert (ended.finish_reason, len(ended.ids)) == ("context", 16)
    assert len(again.ids) == 30
    assert {n.kind for n in notices} == {"truncation"}


def test_a_longer_context_than_the_model_was_made_for():
    with collect_notices() as notices:
        model = model_of(t5(), context=100, kv="fp32")
    assert model.context == 100
    assert [n.kind for n in notices] == ["info"]
    ids = list(range(3, 95))
    assert miss(model.forward(ids, [0, 4]), forward(plan_of(t5()), ids, decoder_ids=[0, 4])) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_memory_is_what_was_foretold(kv, batch):
    model = model_of(t5(), kv=kv, context=40, batch=batch, threads=2, slots=2)
    plan = plan_of(t5())
    assert model.memory.scratch_bytes == scratch_bytes(plan, 40, batch, 2)
    assert model.memory.kv_bytes == kv_bytes(plan, kv, 40, 2)


def test_the_context_shrinks_into_the_memory_that_is_given():
    whole = model_of(t5(positions=600), threads=1, context=300).memory.total_bytes
    with collect_notices() as notices:
        model = model_of(t5(positions=600), threads=1, memory_bytes=whole, batch=256)
    assert [n.kind for n in notices] == ["clamp"]
    assert 296 <= model.context <= 304
    assert model.memory.total_bytes <= whole


@pytest.mark.parametrize("form", ["int8/g32/fp16", "int4/g32/fp16/min"])
def test_requantised_weights_run_as_the_plan_says(form):
    """One input that falls on the edge of two codes moves every state of its text a little, and these move others:
    so of eight models most have the executor's logits, and those that have not are as near as rounding brings them."""
    ids, answers, misses = list(range(3, 12)), [0, 5, 9, 200], []
    for seed in range(8):
        with collect_notices():
            model = model_of(t5(seed=seed), format=form, kv="fp32", threads=2)
            plan = requantised(plan_of(t5(seed=seed)), QuantFormat.parse(form))
        expected, exact = (forward(plan, ids, decoder_ids=answers, activations=how) for how in ("plan", "exact"))
        misses.append(miss(model.forward(ids, answers), expected))
        assert misses[-1] < 1.5 * miss(exact, expected)
        assert miss(exact, expected) > 100 * TOLERANCE
    assert sum(one < TOLERANCE for one in misses) >= 5


# ---- how fast -----------------------------------------------------------------------------------------------------

def test_bench_times_texts_and_answers():
    with collect_notices():
        report = bench(t5(), prompts=(12,), generated=(5,), depths=(0, 20), threads=(1, 2), repeats=2,
                       limits=Limits(1e10, 1e12, 1e11))
    rows = [dict(zip(report.tables[1].columns, row, strict=True)) for row in report.tables[1].rows]
    assert [(row["threads"], row["test"]) for row in rows] == [
        (threads, name) for threads in (1, 2) for name in ("pp12", "tg5", "tg5@20")]
    assert all(row["token/s"] > 0 for row in rows)
    model = model_of(t5(), threads=1, cache=False)
    step = workload_of(plan_of(t5()), model.packed.matrices, depth=2, source=20)
    assert rows[2]["GB/s"] == pytest.approx(rows[2]["token/s"] * step.moved_bytes / 1e9)
    read = arithmetic(workload_of_text(plan_of(t5()), model.packed.matrices, tokens=12))["fp32"]
    assert rows[0]["share"] == pytest.approx(rows[0]["token/s"] / 12 * read / 1e11)


def test_a_timed_answer_is_to_its_text():
    """Before the clock starts: the text is read, and the answer begun."""
    said = []

    class Spy:
        def __getattr__(self, name):
            return lambda *arguments: said.append((name, *(len(a) if isinstance(a, np.ndarray) else a
                                                           for a in arguments if not hasattr(a, "sample"))))

    class Meter:
        def measure(self, call):
            said.append(("clock",))
            call()
            return Energy(None, 1.0)

    encoder, decoder = Spy(), Spy()
    encoder.normed = lambda rows: np.zeros((len(rows), 3), np.float32)
    reader, stream = Reader(encoder, 7), np.arange(30, dtype=np.int32)
    reader.run(decoder, BenchTest("decode", 4, 9), stream, Meter())
    assert [item[0] for item in said] == ["truncate", "forward", "truncate", "set_source", "prefill", "generate",
                                          "clock", "generate"]
    assert said[1] == ("forward", 9, 9)
    assert said[3] == ("set_source", 0, 9)
    assert [item[-2] for item in said if item[0] == "generate"] == [1, 4]
    said.clear()
    reader.run(decoder, BenchTest("prefill", 6), stream, Meter())
    assert [item[0] for item in said] == ["clock", "truncate", "forward", "truncate", "set_source"]
    assert said[2] == ("forward", 6, 6)


def test_the_work_of_a_text_and_of_its_answer():
    """Three heads of 24, a feed-forward part with a gate."""
    plan, matrices = plan_of(t5()), model_of(t5(), threads=1, cache=False).packed.matrices
    hidden, inner = plan.hidden, 3 * 24
    ffn = 3 * hidden * plan.layers[0].feed_forward.up.weight.shape[0]
    layers, own = len(plan.layers), 4 * hidden * inner + ffn
    step = workload_of(plan, matrices, depth=4, source=10)
    attention = 2 * inner * (5 + 10) * layers
    assert step.macs == layers * (own + 2 * hidden * inner) + plan.vocab * hidden + attention
    longer = workload_of(plan, matrices, depth=4, source=42)
    assert longer.macs - step.macs == 2 * inner * 32 * layers
    assert longer.moved_bytes - step.moved_bytes == layers * 32 * 3 * (24 + 32) * 2  # values are padded to 32
    text = workload_of_text(plan, matrices, tokens=10)
    assert text.macs == len(plan.encoder.layers) * (10 * own + 2 * inner * 100) + layers * 10 * 2 * hidden * inner
    with pytest.raises(InvalidValueError, match="no text beside its answer"):
        workload_of_text(plan.encoder, matrices, tokens=10)


# ---- what is refused ----------------------------------------------------------------------------------------------

def test_what_is_not_for_encoder_decoders_says_what_is(model):
    plan = plan_of(t5())
    for call, message in (
            (lambda: model.perplexity("x" * 40, window=8), "perplexity needs a decoder; tiny-t5 is an encoder-decoder"),
            (lambda: model.calibrate(["abc"]), "calibrate needs a decoder; tiny-t5 is an encoder-decoder"),
            (lambda: model.forward([1, 2]), "takes ids of the text and decoder_ids"),
            (lambda: model.generate([{"role": "user", "content": "x"}]), "reads one text, without a system message"),
            (lambda: Conversation(model), "answers one text at a time: use generate"),
            (lambda: Bench(t5(), threads=1), "t5 is an encoder-decoder; load it with a format"),
            (lambda: workload_of(plan, model.packed.matrices), "depends on two lengths")):
        with pytest.raises(EdgewiseError, match=message):
            call()
    with pytest.raises(InvalidValueError, match="a decoder takes ids alone"):
        model_of(llama()).forward([1, 2], [3])
    with pytest.raises(UnsupportedError, match=r"read_source needs an encoder-decoder; tiny\.gguf is a decoder"):
        model_of(llama()).read_source([1])


@pytest.mark.parametrize(("key", "value", "message"), [
    ("feed_forward_proj", "gated-mish", "which the engine does not implement"),
    ("relative_attention_max_distance", 16, "expected a distance above half"),
    ("relative_attention_max_distance", 2**30, "from 1 to 65536"),
    ("relative_attention_num_buckets", 3, "from 4 to 65536"),
    ("num_layers", 2**30, "from 1 to"), ("num_heads", 4, "asks for"), ("decoder_start_token_id", 257, "from 0 to 256"),
    ("d_kv", 0, "at least 1")])
def test_a_wrong_configuration(key, value, message):
    with pytest.raises((FormatError, UnsupportedError), match=message), collect_notices():
        plan_of(t5(**{key: value}))


def test_a_missing_tensor_is_named():
    checkpoint = t5()
    tensors = {n: t for n, t in checkpoint.tensors.items() if "decoder.block.1.layer.1.EncDecAttention.k" not in n}
    with pytest.raises(FormatError, match=r"decoder\.block\.1\.layer\.1\.EncDecAttention\.k\.weight"):
        plan_of(replace(checkpoint, tensors=tensors))


def test_an_encoder_alone_runs_as_an_encoder():
    checkpoint = t5()
    tensors = {n: t for n, t in checkpoint.tensors.items() if not n.startswith(("decoder.", "lm_head"))}
    alone = replace(checkpoint, tensors=tensors, config={**checkpoint.config, "architectures": ["T5EncoderModel"]})
    model = model_of(alone, threads=2)
    assert model.kind == "encoder"
    ids = model.encode(TEXT)
    np.testing.assert_array_equal(model.states(ids), model_of(checkpoint, threads=1).states(ids))
    with pytest.raises(UnsupportedError, match="generate needs a decoder; tiny-t5 is an encoder"):
        model.generate(TEXT)


# ---- files and tokenizers -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", ["keep", "Q8_0", "int4/g32/fp16/min"])
def test_a_converted_folder_runs(form, tmp_path):
    """Tables of biases stay as they are; what is embedded, attended and fed forward is rounded."""
    with collect_notices():
        report = convert(t5(), tmp_path / "out", form)
        model = model_of(read_folder(tmp_path / "out"), kv="fp32", activations="float32")
    ids, answers = list(range(3, 40)), [0, 5, 9, 200, 17]
    tensors = {row[0]: row for table in report.tables if table.title == "Tensors" for row in table.rows}
    assert len(tensors) == len(t5().tensors)
    rounded = {name for name, row in tensors.items() if row[2] != row[3]} if form != "keep" else set()
    assert rounded == set() if form == "keep" else rounded == {
        name for name, tensor in t5().tensors.items() if len(tensor.shape) == 2 and "relative" not in name}
    whole = forward(plan_of(t5()), ids, decoder_ids=answers)
    assert miss(model.forward(ids, answers), whole) < {"keep": TOLERANCE, "Q8_0": 0.05}.get(form, 0.5)


def unigram() -> bytes:
    """A SentencePiece tokenizer as T5 has it: Unigram with a score per piece, ▁ for spaces, </s> after a text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁the", -3.0), ("▁leaf", -4.0), ("s", -3.5),
              ("▁is", -3.2), ("▁green", -5.0), ("gr", -6.0), ("een", -6.0), (".", -3.0)]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrtuvwxyz"]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    made.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in ("<pad>", "</s>", "<unk>")])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made.to_str().encode()


def test_a_unigram_tokenizer_reads_and_answers():
    checkpoint = t5(tokenizer=unigram(), vocab=40, layers=1)
    metadata = {**checkpoint.metadata, "generation": {"eos_token_id": 1}}
    model = model_of(replace(checkpoint, metadata=metadata), kv="fp32")
    ids = model.encode("the leafs  is green.")
    assert ids == [4, 5, 6, 7, 8, 11, 1]
    assert model.tokenizer.decode(ids) == "the leafs is green."
    assert model.encode("Ö") == [3, 2, 1]
    generation = model.generate("the leafs is green.", max_tokens=12, ignore_eos=True)
    pieces = [token.text for token in generation]
    assert generation.prompt_tokens == 7
    assert generation.ids == model.generate(ids, max_tokens=12, ignore_eos=True).result().ids
    assert "".join(pieces) == generation.text == model.tokenizer.decode(generation.ids)
    assert generation.text != ""
    assert model.tokenizer.eos_ids == {1}
