"""Reading GGUF: against files that the `gguf` package wrote, and against transcriptions of its converter's rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import EdgewiseWarning, FormatError, SourceError, UnsupportedError
from edgewise.core.numbers import QuantFormat
from edgewise.core.storage import Blocks, Dense, QuantizedTensor
from edgewise.formats.ggml_blocks import READ, codec
from edgewise.formats.gguf import check_finite, read_gguf, read_gguf_raw

HIDDEN, HEADS, KV_HEADS, WIDE, VOCABULARY, LAYERS = 64, 4, 2, 96, 40, 2
ROWS = {"attn_q": HIDDEN, "attn_k": HIDDEN // 2, "attn_v": HIDDEN // 2, "attn_output": HIDDEN, "ffn_gate": WIDE,
        "ffn_up": WIDE, "ffn_down": HIDDEN}


def llama_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """A tiny Llama under GGUF's names; its values are all different."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    weights = {"token_embd.weight": draw(VOCABULARY, HIDDEN), "output_norm.weight": draw(HIDDEN)}
    for i in range(LAYERS):
        weights |= {f"blk.{i}.{name}.weight": draw(HIDDEN) for name in ("attn_norm", "ffn_norm")}
        weights |= {f"blk.{i}.{name}.weight": draw(rows, WIDE if name == "ffn_down" else HIDDEN)
                    for name, rows in ROWS.items()}
    return weights


def write_llama(path: Path, weights: dict[str, np.ndarray], *, kind: str = "F32",
                more: Callable[[GGUFWriter], Any] | None = None) -> Path:
    """Write with the reference package; matrices in block type `kind`."""
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_chat_template("{{ messages }}")
    if more is not None:
        more(writer)
    for name, value in weights.items():
        plain = kind == "F32" or value.ndim < 2
        quantised = value if plain else gguf.quants.quantize(value, GGMLQuantizationType[kind])
        writer.add_tensor(name, quantised, raw_dtype=None if plain else GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converter_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: pair j of a head, (j, j + half), becomes rows (2j, 2j + 1)."""
    half = weight.shape[0] // heads // 2
    moved = np.empty_like(weight)
    for head in range(heads):
        for j in range(half):
            moved[head * 2 * half + 2 * j] = weight[head * 2 * half + j]
            moved[head * 2 * half + 2 * j + 1] = weight[head * 2 * half + half + j]
    return moved


def test_configuration_and_metadata_become_hugging_faces(tmp_path: Path) -> None:
    checkpoint = read_gguf(write_llama(tmp_path / "m.gguf", llama_weights()))
    assert checkpoint.arch == "llama"
    assert checkpoint.config == {
        "model_type": "llama", "hidden_act": "silu", "num_hidden_layers": LAYERS, "max_position_embeddings": 128,
        "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HIDDEN // HEADS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": None, "vocab_size": VOCABULARY, "tie_word_embeddings": True, "attention_bias": False,
        "mlp_bias": False}
    assert checkpoint.metadata["generation"] == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    assert checkpoint.metadata["chat_template"] == "{{ messages }}"
    assert (checkpoint.metadata["name"], checkpoint.metadata["licence"]) == ("Tiny", "apache-2.0")
    tokenizer = checkpoint.metadata["tokenizer"]
    assert tokenizer["tokenizer.ggml.tokens"][:2] == ["t0", "t1"]
    assert tokenizer["tokenizer.ggml.token_type"].tolist() == [1] * VOCABULARY
    assert checkpoint.files == (str(tmp_path / "m.gguf"),)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "MXFP4"])
def test_tensors_have_their_names_values_and_rotary_order(tmp_path: Path, kind: str) -> None:
    weights = llama_weights()
    ours = {"embed_tokens": weights["token_embd.weight"], "layers.1.self_attn.q_proj": weights["blk.1.attn_q.weight"],
            "layers.1.self_attn.k_proj": weights["blk.1.attn_k.weight"],
            "layers.0.mlp.down_proj": weights["blk.0.ffn_down.weight"]}
    permuted = dict(weights)
    for i in range(LAYERS):
        for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            permuted[f"blk.{i}.{name}.weight"] = converter_permute(weights[f"blk.{i}.{name}.weight"], heads)
    checkpoint = read_gguf(write_llama(tmp_path / "m.gguf", permuted, kind=kind))
    assert len(checkpoint.tensors) == len(weights)
    for name, value in ours.items():
        expected = value
        if kind != "F32":
            expected = gguf.quants.dequantize(gguf.quants.quantize(value, GGMLQuantizationType[kind]),
                                              GGMLQuantizationType[kind])
        assert np.array_equal(checkpoint.tensors[f"model.{name}.weight"].dense(), expected), name
    assert np.array_equal(checkpoint.tensors["model.layers.1.post_attention_layernorm.weight"].dense(),
                          weights["blk.1.ffn_norm.weight"])


@pytest.mark.parametrize("kind", [name for name in READ if codec(name).block > 1])
def test_every_block_type_is_a_view_of_the_file(tmp_path: Path, kind: str) -> None:
    form = codec(kind)
    raw = np.random.default_rng(5).integers(0, 0x78, (6, 2 * form.block_nbytes), dtype=np.uint8)
    writer = GGUFWriter(str(tmp_path / "m.gguf"), "anything")
    writer.add_tensor("x", raw, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    keys, tensors = read_gguf_raw(tmp_path / "m.gguf")
    stored = tensors["x"]
    assert keys["general.architecture"] == "anything"
    assert isinstance(stored, Blocks)
    assert stored.shape == (6, 2 * form.block)
    assert not stored.raw.flags.owndata
    assert not stored.raw.flags.writeable
    assert np.array_equal(stored.dense(), gguf.quants.dequantize(raw, GGMLQuantizationType[kind]))


def test_keys_of_every_type_come_back(tmp_path: Path) -> None:
    writer = GGUFWriter(str(tmp_path / "m.gguf"), "x")
    values = {"u8": 200, "i8": -3, "u16": 60000, "i16": -300, "u32": 4_000_000_000, "i32": -70000, "u64": 2**63,
              "i64": -2**40, "f32": 0.5, "f64": 1e300, "bool": True, "text": "grüße"}
    for name, add in (("u8", writer.add_uint8), ("i8", writer.add_int8), ("u16", writer.add_uint16),
                      ("i16", writer.add_int16), ("u32", writer.add_uint32), ("i32", writer.add_int32),
                      ("u64", writer.add_uint64), ("i64", writer.add_int64), ("f32", writer.add_float32),
                      ("f64", writer.add_float64), ("bool", writer.add_bool), ("text", writer.add_string)):
        add(name, values[name])
    writer.add_array("flags", [True, False])
    writer.add_array("texts", ["a", "", "ü"])
    writer.add_array("numbers", [1, -2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    keys, tensors = read_gguf_raw(tmp_path / "m.gguf")
    assert {name: keys[name] for name in values} == values
    assert type(keys["bool"]) is bool
    assert keys["flags"].tolist() == [True, False]
    assert keys["texts"] == ["a", "", "ü"]
    assert keys["numbers"].tolist() == [1, -2, 3]
    assert len(tensors) == 0


def test_output_of_its_own_and_biases_are_seen(tmp_path: Path) -> None:
    weights = llama_weights()
    weights["output.weight"] = np.ones((VOCABULARY, HIDDEN), np.float32)
    weights["blk.0.attn_q.bias"] = np.arange(HIDDEN, dtype=np.float32)
    checkpoint = read_gguf(write_llama(tmp_path / "m.gguf", weights))
    assert not checkpoint.config["tie_word_embeddings"]
    assert checkpoint.config["attention_bias"]
    assert checkpoint.tensors["lm_head.weight"].shape == (VOCABULARY, HIDDEN)
    restored = converter_permute(checkpoint.tensors["model.layers.0.self_attn.q_proj.bias"].dense(), HEADS)
    assert np.array_equal(restored, np.arange(HIDDEN))


def test_sliding_window_makes_a_mistral(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", llama_weights(), more=lambda w: w.add_sliding_window(32))
    checkpoint = read_gguf(path)
    assert (checkpoint.arch, checkpoint.config["sliding_window"]) == ("mistral", 32)


def test_rotary_scaling_is_read(tmp_path: Path) -> None:
    def linear(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    checkpoint = read_gguf(write_llama(tmp_path / "m.gguf", llama_weights(), more=linear))
    assert checkpoint.config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def llama3_divisors_by_the_converter(factor: float, size: int) -> np.ndarray:
    """The loop of the reference converter, wavelengths in positions."""
    divisors = []
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * 10000.0 ** (i / size)
        if wavelength < 8192 / 4.0:
            divisors.append(1.0)
        elif wavelength > 8192 / 1.0:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama3_divisors_become_their_rule_or_stay_a_tensor(tmp_path: Path) -> None:
    weights = llama_weights() | {"rope_freqs.weight": llama3_divisors_by_the_converter(32.0, 16)}
    checkpoint = read_gguf(write_llama(tmp_path / "a.gguf", weights))
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}
    assert "rope_freqs.weight" not in checkpoint.tensors
    weights["rope_freqs.weight"][0] = 1.5
    checkpoint = read_gguf(write_llama(tmp_path / "b.gguf", weights))
    assert checkpoint.config["rope_scaling"] is None
    assert np.array_equal(checkpoint.tensors["rope_freqs.weight"].dense(), weights["rope_freqs.weight"])


def test_shards_are_joined(tmp_path: Path) -> None:
    weights = llama_weights()
    names = list(weights)
    halves = ({n: weights[n] for n in names[:7]}, {n: weights[n] for n in names[7:]})
    paths = []
    for number, half in enumerate(halves):
        def split(writer: GGUFWriter, number: int = number) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 2)
            writer.add_int32("split.tensors.count", len(names))
        paths.append(write_llama(tmp_path / f"m-{number + 1:05}-of-00002.gguf", half, more=split))
    for path in paths:
        checkpoint = read_gguf(path)
        assert len(checkpoint.tensors) == len(names)
        assert checkpoint.files == tuple(map(str, paths))
        assert np.array_equal(checkpoint.tensors["model.embed_tokens.weight"].dense(), weights["token_embd.weight"])
    paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(FormatError, match=r"one of 2 shards, and its name should end in -00001-of-00002\.gguf"):
        read_gguf(tmp_path / "renamed.gguf")
    with pytest.raises(SourceError, match=r"m-00001-of-00002\.gguf: no such file; .* all must lie side by side"):
        read_gguf(paths[1])
    paths[1].rename(paths[0])
    write_llama(paths[1], {"token_embd.weight": weights["token_embd.weight"]})
    with pytest.raises(FormatError, match=r"by its name this is shard 1 of 2, but its keys say split\.no 1"):
        read_gguf(paths[0])


def test_bert_is_read(tmp_path: Path) -> None:
    writer = GGUFWriter(str(tmp_path / "m.gguf"), "bert")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    for name, shape in (("token_embd", (9, 8)), ("position_embd", (64, 8)), ("token_types", (2, 8)),
                        ("blk.0.attn_q", (8, 8)), ("blk.0.layer_output_norm", (8,))):
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = read_gguf(tmp_path / "m.gguf")
    assert checkpoint.arch == "bert"
    assert checkpoint.config["layer_norm_eps"] == 1e-12
    assert checkpoint.config["type_vocab_size"] == 2
    assert checkpoint.config["hidden_act"] == "gelu"
    assert checkpoint.metadata["pooling"] == {"mode": "mean", "normalize": True, "max_tokens": 64}
    assert set(checkpoint.tensors) == {
        "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight",
        "embeddings.token_type_embeddings.weight", "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.0.output.LayerNorm.weight"}


def test_what_has_no_place_is_reported(tmp_path: Path) -> None:
    weights = llama_weights() | {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    path = write_llama(tmp_path / "m.gguf", weights, more=lambda w: w.add_float32("llama.logit_scale", 2.0))
    with pytest.warns(EdgewiseWarning) as caught:
        checkpoint = read_gguf(path)
    messages = [str(warning.message) for warning in caught]
    assert any("key llama.logit_scale has no place" in message for message in messages)
    assert any("tensor blk.0.attn_sinks.weight has no place" in message for message in messages)
    assert len(checkpoint.tensors) == len(weights) - 1


def test_unknown_architectures_name_the_known_ones(tmp_path: Path) -> None:
    writer = GGUFWriter(str(tmp_path / "m.gguf"), "wavenet")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="architecture 'wavenet'; edgewise reads llama, deci, bert"):
        read_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(("damage", "message"), [
    (lambda w: w.pop("token_embd.weight"), "there is no tensor token_embd.weight"),
    (lambda w: [w.pop(name) for name in list(w) if name.startswith("blk.1.")],
     "block_count is 2, but the tensors are of 1 layers"),
    (lambda w: w.update({"blk.0.attn_q.weight": np.ones((60, HIDDEN), np.float32)}),
     "60 rows do not divide into 4 heads"),
    (lambda w: w.update({"rope_freqs.weight": np.zeros(8, np.float32)}), "expected 8 positive divisors"),
])
def test_tensors_that_contradict_the_keys_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    weights = llama_weights()
    damage(weights)
    with pytest.raises(FormatError, match=message):
        read_gguf(write_llama(tmp_path / "m.gguf", weights))


def test_a_scale_that_is_not_finite_names_tensor_and_byte(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", llama_weights(), kind="Q4_1")
    raw = bytearray(path.read_bytes())
    reader = gguf.GGUFReader(path)
    tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    place = int(tensor.data_offset) + 7 * 20
    raw[place:place + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(raw)
    checkpoint = read_gguf(path)
    assert isinstance(checkpoint.tensors["model.norm.weight"], Dense)
    with pytest.raises(FormatError, match=r"a Q4_1 block has a scale or value that is NaN or infinite") as caught:
        check_finite(checkpoint)
    assert (caught.value.tensor, caught.value.offset) == ("blk.1.ffn_down.weight", place)


def test_scales_of_other_origin_are_checked_too() -> None:
    raw = np.zeros((2, 18), np.uint8)
    raw[1, :2] = 0xFF
    for broken in (Blocks(raw, codec("Q4_0"), (2, 32)), Dense(np.array([1.0, np.inf], np.float32)),
                   QuantizedTensor(np.zeros((1, 32), np.int8), np.full((1, 1), np.nan, np.float32),
                                   QuantFormat.parse("int4/g32/fp16"))):
        with pytest.raises(FormatError, match=r"tensor 'x': holds scales or values that are NaN or infinite"):
            check_finite(Checkpoint("llama", {}, {"x": broken}))
    check_finite(Checkpoint("llama", {}, {"x": Dense(np.ones(3, np.float32))}))
