"""What a model needs: foreseen to the byte, capped by memory_bytes, and kept by the process."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import pytest
from plans import decoder, encoder
from tiny_checkpoints import bert, gguf_file, llama

from edgewise.core.errors import BudgetError, collect_notices
from edgewise.core.numbers import BF16
from edgewise.engine.loading import in_floats, model_of, session_of
from edgewise.engine.memory import kv_bytes, scratch_bytes
from edgewise.engine.plan import AttentionPolicy
from edgewise.measure.memory import run_child

INTERPRETER_BYTES = 90e6
"""What the process may add to weights, KV and scratch: design.md."""

KV = ["fp32", "bf16", "fp16", "int8", "int4"]
PLANS = {
    "plain": decoder(), "wide heads": decoder(heads=3, kv_heads=1, head_dim=80, layers=2, ffn=300),
    "large vocabulary": decoder(vocab=140_000, hidden=16), "encoder": encoder(),
    "bfloat16": in_floats(encoder(), BF16),
    "sinks": decoder(policy=AttentionPolicy("sinks", 20, 3), layers=2),
    "sinks and windows": replace(decoder(), layers=decoder(policy=AttentionPolicy("sinks", 300, 4)).layers + decoder(
        policy=AttentionPolicy("sliding", 40), first=1).layers)}


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", PLANS)
def test_needs_are_foreseen_to_the_byte(name, kv):
    plan = PLANS[name]
    for context, batch, threads, slots in [(64, 64, 1, 1), (37, 5, 3, 2), (1, 1, 1, 1), (60, 256, 2, 3),
                                           (5000, 70, 2, 2)]:
        session = session_of(plan, kv=kv, context=context, batch=batch, threads=threads, slots=slots)
        assert kv_bytes(plan, kv, context, slots, batch) == session.kv_nbytes
        assert scratch_bytes(plan, context, batch, session.threads, kv=kv, slots=slots) == session.scratch_nbytes


class TestCap:
    def test_the_context_shrinks_and_a_notice_says_so(self):
        whole = model_of(llama(context=4096), threads=1)
        cap = whole.memory.total_bytes // 2
        with collect_notices() as notices:
            model = model_of(llama(context=4096), threads=1, memory_bytes=cap)
        assert 256 <= model.context < 4096
        assert cap - 20_000 < model.memory.total_bytes <= cap
        assert [(n.kind, n.where) for n in notices] == [("clamp", "memory")]
        assert f"the context is {model.context} of the model's 4096" in notices[0].message

    def test_a_smaller_cache_leaves_more_context(self):
        cap = model_of(llama(context=4096), threads=1).memory.total_bytes // 2
        with collect_notices():
            contexts = [model_of(llama(context=4096), threads=1, memory_bytes=cap, kv=kv).context for kv in KV]
        assert contexts == sorted(contexts)
        assert contexts[0] < contexts[-1]

    def test_enough_memory_changes_nothing(self):
        with collect_notices() as notices:
            model = model_of(llama(), threads=1, memory_bytes=10**9)
        assert (model.context, notices) == (128, [])

    def test_too_little_names_what_is_needed(self):
        with pytest.raises(BudgetError, match=r"0\.1 MB of memory are too little: weights 0\.\d MB.*need \d\.\d MB"):
            model_of(llama(), threads=1, memory_bytes=100_000)
        needed = model_of(llama(), threads=1, context=128, batch=16).memory.total_bytes
        model = model_of(llama(), threads=1, context=128, memory_bytes=needed)
        assert (model.context, model.session.batch, model.memory.total_bytes) == (128, 16, needed)
        with pytest.raises(BudgetError):
            model_of(llama(), threads=1, context=128, memory_bytes=needed - 1)

    def test_an_encoder_fits_or_does_not(self):
        needed = model_of(bert(), threads=1).memory.total_bytes
        assert model_of(bert(), threads=1, memory_bytes=needed).context == 48
        with pytest.raises(BudgetError):
            model_of(bert(), threads=1, memory_bytes=needed - 1)


CHILD = """
import json, sys, warnings
warnings.simplefilter("ignore")
from edgewise import load
model = load(sys.argv[1], context=int(sys.argv[2]), cache=sys.argv[3] == "cache", threads=2)
model.generate(list(range(3, 203)), max_tokens=24, ignore_eos=True).result()
print(json.dumps([model.packed.cached, model.memory.weights_bytes, model.memory.total_bytes]))
"""


def start(source: str, context: int, how: str, cache_home) -> tuple[bool, float]:
    """(whether the packed cache was used, peak of the process beyond weights + KV + scratch) of one start."""
    done = run_child([sys.executable, "-c", CHILD, source, str(context), how],
                     env={**os.environ, "XDG_CACHE_HOME": str(cache_home), "EDGEWISE_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    cached, _, total = json.loads(done.stdout)
    return cached, done.peak_bytes - total


@pytest.mark.slow
@pytest.mark.parametrize("context", [256, 2048])
def test_the_process_keeps_to_its_memory(context, tmp_path, smollm2_path):
    """First start, which packs and writes the cache; second, which maps it; and one without a cache."""
    beyond = [start(smollm2_path, context, how, tmp_path) for how in ("cache", "cache", "none")]
    assert [cached for cached, _ in beyond] == [True, True, False]
    assert max(extra for _, extra in beyond) <= INTERPRETER_BYTES, beyond


@pytest.mark.slow
@pytest.mark.parametrize("form", ["F32", "Q8_0"])
def test_large_weights_are_never_there_twice(form, tmp_path):
    """Weights of 100 MB or more: a second copy would not fit the bound."""
    path = gguf_file(tmp_path / "large.gguf", form, hidden=1024, ffn=4096, layers=3 if form == "F32" else 8, heads=8,
                     kv_heads=4, context=512)
    assert path.stat().st_size > 100e6
    for how in ("cache", "cache", "none"):
        assert start(str(path), 512, how, tmp_path)[1] <= INTERPRETER_BYTES, how
