"""Every family of GGUF's table, from a tiny Hugging Face model through a file: the same logits; what files mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from reference import forward
from tiny_checkpoints import t5

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import FormatError, UnsupportedError, collect_notices
from edgewise.core.storage import Blocks, Dense, Stored
from edgewise.engine.archs import plan_of
from edgewise.formats.gguf import read_gguf, write_gguf, write_gguf_raw
from edgewise.formats.gguf_file import GgufShards

IDS = np.arange(3, 75)


def written(checkpoint: Checkpoint, path: Path, types: Any = "keep") -> Checkpoint:
    with collect_notices():
        write_gguf(checkpoint, path, types)
        return read_gguf(path)


def gemma3(**changes: Any) -> Checkpoint:
    """Gemma 3 of one layer without torch."""
    rng = np.random.default_rng(0)
    shapes = {"embed_tokens": (32, 64), "norm": (64,)}
    for part, shape in (("self_attn.q_proj", (64, 64)), ("self_attn.k_proj", (32, 64)), ("self_attn.v_proj", (32, 64)),
                        ("self_attn.o_proj", (64, 64)), ("self_attn.q_norm", (32,)), ("self_attn.k_norm", (32,)),
                        ("mlp.gate_proj", (96, 64)), ("mlp.up_proj", (96, 64)), ("mlp.down_proj", (64, 96)),
                        ("input_layernorm", (64,)), ("post_attention_layernorm", (64,)),
                        ("pre_feedforward_layernorm", (64,)), ("post_feedforward_layernorm", (64,))):
        shapes[f"layers.0.{part}"] = shape
    tensors: dict[str, Stored] = {f"model.{name}.weight": Dense(rng.normal(0, 0.3, shape).astype(np.float32))
                                  for name, shape in shapes.items()}
    config = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 32, "max_position_embeddings": 64,
              "sliding_window": 8, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, **changes}
    return Checkpoint("gemma3_text", config, tensors, source="tiny")


def test_norms_of_gemma3_are_raised_by_one_in_the_file_alone(tmp_path: Path) -> None:
    checkpoint = gemma3()
    back = written(checkpoint, tmp_path / "m.gguf")
    raw = GgufShards.open(tmp_path / "m.gguf")
    for theirs, ours in (("blk.0.attn_norm", "layers.0.input_layernorm"), ("output_norm", "norm"),
                         ("blk.0.attn_q_norm", "layers.0.self_attn.q_norm"),
                         ("blk.0.post_ffw_norm", "layers.0.post_feedforward_layernorm"),
                         ("blk.0.ffn_norm", "layers.0.pre_feedforward_layernorm")):
        weight = checkpoint.tensors[f"model.{ours}.weight"].dense()
        np.testing.assert_array_equal(raw.stored(f"{theirs}.weight").dense(), weight + np.float32(1))
        np.testing.assert_allclose(back.tensors[f"model.{ours}.weight"].dense(), weight, atol=1.2e-7)
    assert back.arch == "gemma3_text"
    assert raw.metadata["gemma3.rope.freq_base_swa"] == 10_000.0
    assert "gemma3.attention.scale" not in raw.metadata


def test_gemma3_multiplies_by_the_very_weight_of_the_file(tmp_path: Path) -> None:
    """Lowered by one and raised again, a weight comes back to the bit."""
    first = written(gemma3(), tmp_path / "a.gguf")
    raw = GgufShards.open(tmp_path / "a.gguf").stored("blk.0.attn_norm.weight").dense()
    np.testing.assert_array_equal(plan_of(first).layers[0].attention_norm.weight, raw)


def test_a_scale_that_gguf_does_not_imply_has_its_key_and_a_notice(tmp_path: Path) -> None:
    with collect_notices() as notices:
        write_gguf(gemma3(query_pre_attn_scalar=20), tmp_path / "m.gguf")
    assert any("query_pre_attn_scalar" in n.message for n in notices)
    assert plan_of(read_gguf(tmp_path / "m.gguf")).layers[0].attention.scale == pytest.approx(20**-0.5, rel=1e-6)


@pytest.mark.parametrize(("changes", "message"), [
    ({"layer_types": ["sliding_attention"], "num_hidden_layers": 1}, None),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6},
                          "sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "local layers scale"),
])
def test_what_gemma3s_keys_cannot_say(tmp_path: Path, changes: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert plan_of(written(gemma3(**changes), tmp_path / "m.gguf")).layers[0].attention.policy.window == 8
        return
    with pytest.raises(UnsupportedError, match=message):
        write_gguf(gemma3(**changes), tmp_path / "m.gguf")


@pytest.mark.slow
class TestFamilies:
    NAMES = ("qwen2", "qwen3", "qwen3 biases", "phi3", "phi3 window", "phi3 short", "phi3 long", "phi3 part", "gemma3",
             "gemma3 scaled", "mixtral", "qwen2 moe", "qwen3 moe")

    @pytest.mark.parametrize("name", NAMES)
    def test_logits_survive_a_file(self, name: str, tmp_path: Path) -> None:
        import tiny_models

        checkpoint = tiny_models.checkpoint_of(tiny_models.build(name))
        back = written(checkpoint, tmp_path / "m.gguf")
        with collect_notices():
            plan, expected = plan_of(back), forward(plan_of(checkpoint), IDS)
        assert back.arch == checkpoint.arch
        # The file holds attention factors and norms in float32, and so two roundings more.
        assert np.abs(forward(plan, IDS) - expected).max() < 2e-6 * np.abs(expected).max()

    def test_stacked_experts_are_split_without_a_copy(self, tmp_path: Path) -> None:
        import tiny_models

        checkpoint = tiny_models.checkpoint_of(tiny_models.build("mixtral"))
        back = written(checkpoint, tmp_path / "m.gguf", "Q8_0")
        stack = GgufShards.open(tmp_path / "m.gguf").stored("blk.1.ffn_down_exps.weight")
        assert stack.shape == (5, 64, 96)
        experts = [back.tensors[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"] for e in range(5)]
        assert all(isinstance(expert, Blocks) and not expert.raw.flags.owndata for expert in experts)
        np.testing.assert_array_equal(np.stack([expert.dense() for expert in experts]), stack.dense())
        twice = written(back, tmp_path / "again.gguf")
        np.testing.assert_array_equal(
            twice.tensors["model.layers.2.block_sparse_moe.experts.4.w1.weight"].raw,
            back.tensors["model.layers.2.block_sparse_moe.experts.4.w1.weight"].raw)

    def test_an_expert_that_is_missing_and_layers_without_experts(self, tmp_path: Path) -> None:
        import tiny_models

        checkpoint = tiny_models.checkpoint_of(tiny_models.build("mixtral"))
        less = {n: t for n, t in checkpoint.tensors.items() if "layers.1.block_sparse_moe.experts.3.w2" not in n}
        with pytest.raises(FormatError, match=r"ffn_down_exps.* each of the 5 experts; the checkpoint has 4"):
            write_gguf(replace(checkpoint, tensors=less), tmp_path / "m.gguf")
        mixed = tiny_models.checkpoint_of(tiny_models.build("qwen3 moe sparse step"))
        with pytest.raises(UnsupportedError, match="some layers have no experts"):
            write_gguf(mixed, tmp_path / "m.gguf")

    def test_a_file_with_another_number_of_experts_than_it_says(self, tmp_path: Path) -> None:
        import tiny_models

        written(tiny_models.checkpoint_of(tiny_models.build("mixtral")), tmp_path / "m.gguf")
        raw = GgufShards.open(tmp_path / "m.gguf")
        keys = {**raw.metadata.below(""), "llama.expert_count": 4}
        write_gguf_raw(tmp_path / "bad.gguf", keys, {name: ("F32", raw.stored(name)) for name in raw.home})
        with pytest.raises(FormatError, match=r"expected a matrix for each of the 4 experts"):
            read_gguf(tmp_path / "bad.gguf")


def t5_file(checkpoint: Checkpoint, path: Path, **keys: Any) -> Path:
    """A T5 as other tools write it: their names, in which a gate and an output layer say that it is of version 1.1."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, checkpoint.config["num_layers"])
    tensors = {names.get_name(name, try_suffixes=(".weight",)): ("F32", stored)
               for name, stored in checkpoint.tensors.items()}
    config = checkpoint.config
    made = {
        "general.architecture": "t5", "t5.block_count": config["num_layers"], "t5.context_length": 48,
        "t5.embedding_length": config["d_model"], "t5.feed_forward_length": config["d_ff"],
        "t5.attention.head_count": config["num_heads"], "t5.attention.key_length": config["d_kv"],
        "t5.attention.value_length": config["d_kv"], "t5.attention.layer_norm_epsilon": 1e-6,
        "t5.attention.layer_norm_rms_epsilon": 1e-6, "t5.attention.relative_buckets_count": 32,
        "t5.decoder_start_token_id": 0, "tokenizer.ggml.eos_token_id": 1, **keys}
    write_gguf_raw(path, made, tensors)
    return path


@pytest.mark.parametrize("gated", [True, False])
def test_t5_says_by_its_tensors_which_version_it_is(gated: bool, tmp_path: Path) -> None:
    checkpoint = t5(gated=gated)
    with collect_notices(strict=True):
        back = read_gguf(t5_file(checkpoint, tmp_path / "m.gguf"))
        plan = plan_of(back)
    assert set(back.tensors) == set(checkpoint.tensors)
    assert back.config["feed_forward_proj"] == ("gated-gelu" if gated else "relu")
    assert (plan.context, plan.start, plan.kind) == (48, 0, "encoder-decoder")
    expected = forward(plan_of(checkpoint), IDS, decoder_ids=[0, 4, 5])
    np.testing.assert_array_equal(forward(plan, IDS, decoder_ids=[0, 4, 5]), expected)
    with pytest.raises(UnsupportedError, match="type 't5' are not written as GGUF"):
        write_gguf(back, tmp_path / "n.gguf", "keep")


def test_t5_with_a_table_of_biases_for_each_layer_keeps_them(tmp_path: Path) -> None:
    """umT5, which files call t5 too."""
    checkpoint = t5()
    name = "decoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    own = Dense(np.random.default_rng(5).standard_normal((32, 3)).astype(np.float32))
    with collect_notices():
        plan = plan_of(read_gguf(t5_file(replace(checkpoint, tensors={**checkpoint.tensors, name: own}),
                                         tmp_path / "m.gguf")))
    biases = [layer.attention.bias for layer in plan.layers]
    np.testing.assert_array_equal(biases[1].table, own.data)
    assert biases[0] is not biases[1]


def test_the_encoder_of_a_t5_alone(tmp_path: Path) -> None:
    checkpoint = t5()
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(("shared", "encoder"))}
    path = t5_file(replace(checkpoint, tensors=tensors), tmp_path / "m.gguf")
    keys = {key.replace("t5.", "t5encoder.", 1): value for key, value in GgufShards.open(path).metadata.items()}
    raw = GgufShards.open(path)
    write_gguf_raw(tmp_path / "n.gguf", {**keys, "general.architecture": "t5encoder"},
                   {name: ("F32", raw.stored(name)) for name in raw.home})
    with collect_notices():
        plan = plan_of(read_gguf(tmp_path / "n.gguf"))
    assert plan.kind == "encoder"
    np.testing.assert_array_equal(forward(plan, IDS), forward(plan_of(checkpoint).encoder, IDS))


@pytest.mark.parametrize(("keys", "message"), [
    ({"t5.block_count": 3}, "block_count is 3, but the tensors are of 2 layers"),
    ({"t5.decoder_block_count": 5}, r"decoder\.block\.2\..*no such tensor"),
    ({"t5.decoder_start_token_id": 4000}, "decoder_start_token_id"),
    ({"t5.attention.key_length": 0}, "expected a positive number")])
def test_a_t5_file_that_lies(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message), collect_notices():
        plan_of(read_gguf(t5_file(t5(), tmp_path / "m.gguf", **keys)))
