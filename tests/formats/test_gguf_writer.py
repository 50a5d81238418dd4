"""Writing GGUF: the `gguf` package and our own reader find in the file what went in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import BudgetError, EdgewiseWarning, FormatError, InvalidValueError, UnsupportedError
from edgewise.core.numbers import BF16, QuantFormat, quantize
from edgewise.core.storage import Blocks, Dense, Factored, QuantizedTensor, Stored
from edgewise.formats.ggml_blocks import codec, encode
from edgewise.formats.gguf import read_gguf, read_gguf_raw, write_gguf, write_gguf_raw

CONFIG = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
          "rope_theta": 10000.0, "max_position_embeddings": 128, "vocab_size": 40, "tie_word_embeddings": True,
          "hidden_act": "silu"}
SHAPES = {"model.embed_tokens": (40, 64), "model.norm": (64,), "model.layers.0.input_layernorm": (64,),
          "model.layers.0.post_attention_layernorm": (64,), "model.layers.0.self_attn.q_proj": (64, 64),
          "model.layers.0.self_attn.k_proj": (32, 64), "model.layers.0.self_attn.v_proj": (32, 64),
          "model.layers.0.self_attn.o_proj": (64, 64), "model.layers.0.mlp.gate_proj": (96, 64),
          "model.layers.0.mlp.up_proj": (96, 64), "model.layers.0.mlp.down_proj": (64, 96)}
TOKENIZER = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
             "tokenizer.ggml.tokens": [f"t{i}" for i in range(40)],
             "tokenizer.ggml.token_type": np.ones(40, np.int32), "tokenizer.ggml.merges": ["t 1"],
             "tokenizer.ggml.add_bos_token": False}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def llama(*, tensors: dict[str, Stored] | None = None, **config: Any) -> Checkpoint:
    rng = np.random.default_rng(0)
    made: dict[str, Stored] = {
        f"{name}.weight": Dense(rng.standard_normal(shape).astype(np.float32)) for name, shape in SHAPES.items()}
    return Checkpoint("llama", CONFIG | config, made | (tensors or {}),
                      {"tokenizer": TOKENIZER, "generation": {"eos_token_id": [2, 3], "bos_token_id": 1},
                       "name": "Tiny", "chat_template": "{{ x }}", "licence": "mit"},
                      (Step("rescale", {"by": 2}, "0.1", 7),), "test")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_what_is_written_is_read_back(tmp_path: Path, kind: str) -> None:
    given = llama()
    write_gguf(given, tmp_path / "m.gguf", kind)
    back = read_gguf(tmp_path / "m.gguf")
    assert set(back.tensors) == set(given.tensors)
    for name in given.tensors:
        value = given.tensors[name].dense()
        expected = value if value.ndim < 2 else encode(value, kind).dense()
        assert np.array_equal(back.tensors[name].dense(), expected), name
    assert {key: back.config[key] for key in CONFIG} == CONFIG
    assert back.lineage == given.lineage
    assert {key: back.metadata[key] for key in ("generation", "name", "chat_template", "licence")} == {
        key: given.metadata[key] for key in ("generation", "name", "chat_template", "licence")}
    tokenizer = dict(back.metadata["tokenizer"])
    assert {key: tokenizer[key] for key in TOKENIZER if key != "tokenizer.ggml.token_type"} == {
        key: TOKENIZER[key] for key in TOKENIZER if key != "tokenizer.ggml.token_type"}


def test_the_gguf_package_reads_it_with_its_own_rotary_order(tmp_path: Path) -> None:
    given = llama()
    write_gguf(given, tmp_path / "m.gguf", "F32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weight = given.tensors[Q_PROJ].dense()
    permuted = weight.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)  # the converter's own line
    assert np.array_equal(tensors["blk.0.attn_q.weight"].data, permuted)
    down = given.tensors["model.layers.0.mlp.down_proj.weight"].dense()
    assert np.array_equal(tensors["blk.0.ffn_down.weight"].data, down)
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert reader.fields["llama.rope.dimension_count"].contents() == 16
    assert reader.fields["tokenizer.ggml.eot_token_id"].contents() == 3
    assert reader.fields["tokenizer.ggml.tokens"].contents()[:2] == ["t0", "t1"]
    assert all(int(tensor.data_offset) % 32 == 0 for tensor in reader.tensors)


def test_blocks_of_any_type_are_copied_byte_for_byte(tmp_path: Path) -> None:
    form = codec("Q4_K")
    raw = np.random.default_rng(1).integers(0, 0x78, (64, form.block_nbytes), dtype=np.uint8)
    head = Dense(np.ones((40, 64), np.float32))
    stored = Blocks(raw, form, (64, 256))
    given = llama(tensors={"model.layers.0.mlp.down_proj.weight": stored, "lm_head.weight": head})
    write_gguf(given, tmp_path / "m.gguf")
    _, tensors = read_gguf_raw(tmp_path / "m.gguf")
    assert "output.weight" not in tensors  # tied
    kept = tensors["blk.0.ffn_down.weight"]
    assert isinstance(kept, Blocks)
    assert np.array_equal(kept.raw, raw)


def test_codes_of_ours_are_packed_and_rotated_without_rounding(tmp_path: Path) -> None:
    fmt = QuantFormat.parse("int4/g32/fp16/min")
    codes, scales, minima = quantize(np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32), fmt)
    tensor = QuantizedTensor(codes, scales, fmt, minima=minima)
    write_gguf(llama(tensors={Q_PROJ: tensor}), tmp_path / "m.gguf")
    back = read_gguf(tmp_path / "m.gguf").tensors[Q_PROJ]
    assert isinstance(back, Blocks)
    assert back.codec.name == "Q4_1"
    assert np.array_equal(back.dense(), tensor.dense())


def test_types_by_name_and_by_function(tmp_path: Path) -> None:
    write_gguf(llama(), tmp_path / "a.gguf", {Q_PROJ: "Q8_0"})
    write_gguf(llama(), tmp_path / "b.gguf", lambda name, stored: "Q8_0" if name == Q_PROJ else "F16")
    for name, others in (("a", "F32"), ("b", "F16")):
        tensors = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        assert tensors.pop("blk.0.attn_q.weight") == "Q8_0"
        assert tensors.pop("output_norm.weight") == "F32"
        assert tensors["blk.0.attn_k.weight"] == tensors["token_embd.weight"] == others


def test_rows_that_are_not_whole_blocks_fall_back_with_a_notice(tmp_path: Path) -> None:
    odd = Dense(np.ones((64, 90), np.float32))
    with pytest.warns(EdgewiseWarning, match="rows of 90 values, which are not whole blocks of Q4_0; written as F16"):
        write_gguf(llama(tensors={"model.layers.0.mlp.down_proj.weight": odd}), tmp_path / "m.gguf", "Q4_0")


def test_forms_without_a_block_type_fall_back_with_a_notice(tmp_path: Path) -> None:
    factored = Factored(Dense(np.ones((64, 2), np.float32)), Dense(np.ones((2, 96), np.float32)))
    with pytest.warns(EdgewiseWarning, match="a form that no block type holds"):
        write_gguf(llama(tensors={"model.layers.0.mlp.down_proj.weight": factored}), tmp_path / "m.gguf")
    back = read_gguf(tmp_path / "m.gguf").tensors["model.layers.0.mlp.down_proj.weight"]
    assert np.array_equal(back.dense(), np.full((64, 96), 2.0))


def test_tensors_without_a_place_are_reported(tmp_path: Path) -> None:
    with pytest.warns(EdgewiseWarning, match=r"tensor score\.weight has no place in GGUF's llama"):
        write_gguf(llama(tensors={"score.weight": Dense(np.ones((2, 64), np.float32))}), tmp_path / "m.gguf")


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192}])
def test_rotary_scaling_survives(tmp_path: Path, rope: dict[str, Any]) -> None:
    write_gguf(llama(rope_scaling=rope), tmp_path / "a.gguf")
    assert read_gguf(tmp_path / "a.gguf").config["rope_scaling"] == rope
    write_gguf(llama(rope_parameters=rope | {"rope_theta": 5e5}), tmp_path / "b.gguf")
    assert read_gguf(tmp_path / "b.gguf").config["rope_scaling"] == rope
    assert read_gguf(tmp_path / "b.gguf").config["rope_theta"] == 5e5


def test_mistral_and_its_window_survive(tmp_path: Path) -> None:
    given = llama(sliding_window=64, model_type="mistral")
    write_gguf(Checkpoint("mistral", given.config, given.tensors, given.metadata), tmp_path / "m.gguf")
    back = read_gguf(tmp_path / "m.gguf")
    assert (back.arch, back.config["sliding_window"]) == ("mistral", 64)


def test_bert_survives(tmp_path: Path) -> None:
    shapes = {"bert.embeddings.word_embeddings": (9, 32), "bert.embeddings.position_embeddings": (16, 32),
              "bert.embeddings.LayerNorm": (32,), "bert.encoder.layer.0.attention.self.query": (32, 32)}
    tensors = {f"{name}.weight": Dense(np.full(shape, i + 1, np.float32))
               for i, (name, shape) in enumerate(shapes.items())}
    config = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
              "vocab_size": 9, "layer_norm_eps": 1e-12, "max_position_embeddings": 16, "hidden_act": "gelu"}
    given = Checkpoint("bert", config, tensors, {"tokenizer": TOKENIZER, "pooling": {"mode": "cls"}})
    write_gguf(given, tmp_path / "m.gguf", "Q8_0")
    back = read_gguf(tmp_path / "m.gguf")
    assert {key: back.config[key] for key in config} == config
    assert back.metadata["pooling"]["mode"] == "cls"
    assert set(back.tensors) == {name.removeprefix("bert.") for name in tensors}
    assert isinstance(back.tensors["embeddings.position_embeddings.weight"], Dense)
    assert isinstance(back.tensors["embeddings.word_embeddings.weight"], Blocks)
    with pytest.raises(UnsupportedError, match="hidden_act is 'relu'; GGUF's bert implies 'gelu'"):
        write_gguf(Checkpoint("bert", config | {"hidden_act": "relu"}, tensors), tmp_path / "n.gguf")


def test_progress_counts_all_bytes(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    write_gguf(llama(), tmp_path / "m.gguf", "F16", progress=lambda *step: seen.append(step))
    assert len(seen) == len(SHAPES)
    assert seen[-1][0] == "writing m.gguf"
    assert seen[-1][1] == seen[-1][2] == sum(2 * np.prod(s) if len(s) > 1 else 4 * s[0] for s in SHAPES.values())
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    class Full:
        shape, nbytes = (40, 64), 0

        def dense(self) -> np.ndarray:
            raise OSError(28, "No space left on device")

        def matmul(self, x: np.ndarray) -> np.ndarray:
            return x

    with pytest.raises(BudgetError, match="no space left"):
        write_gguf(llama(tensors={"model.embed_tokens.weight": Full()}), tmp_path / "m.gguf", "F16")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(UnsupportedError, match=r"cannot write 'Q4_K'; expected keep, F32"):
        write_gguf(llama(), path, "Q4_K")
    with pytest.raises(UnsupportedError, match="models of type 'gpt2' are not written as GGUF; llama, mistral"):
        write_gguf(Checkpoint("gpt2", {}, {}), path)
    with pytest.raises(UnsupportedError, match="rotary scaling 'longrope' has no GGUF key"):
        write_gguf(llama(rope_scaling={"rope_type": "longrope"}), path)
    with pytest.raises(FormatError, match="lacks intermediate_size"):
        write_gguf(llama(intermediate_size=None), path)
    with pytest.raises(FormatError, match="no token embedding"):
        write_gguf(Checkpoint("llama", CONFIG, {}), path)
    with pytest.raises(InvalidValueError, match="1 values are NaN"):
        bad = np.ones((64, 64), np.float32)
        bad[3, 3] = np.nan
        write_gguf(llama(tensors={Q_PROJ: Dense(bad)}), path, "Q8_0")
    with pytest.raises(InvalidValueError, match="key k: a list of int, str has no GGUF type"):
        write_gguf_raw(path, {"k": [1, "a"]}, {})
    with pytest.raises(InvalidValueError, match="does not fit 64 bits"):
        write_gguf_raw(path, {"k": 1 << 64}, {})
    assert not path.exists()
    path.write_bytes(b"mine")
    with pytest.raises(InvalidValueError, match="exists"):
        write_gguf(llama(), path, overwrite=False)
    assert path.read_bytes() == b"mine"


def test_raw_keys_and_tensors_come_back(tmp_path: Path) -> None:
    keys = {"a": 1, "b": -1, "c": 2**40, "d": -2**40, "e": 0.5, "f": True, "g": "ü", "h": ["x", "y"], "i": [1, 2],
            "j": [1.5, 2.0], "k": np.array([1, 2], np.uint16), "l": [True]}
    values = Dense(np.arange(24, dtype=np.uint16).reshape(2, 3, 4), BF16)
    write_gguf_raw(tmp_path / "m.gguf", keys, {"x": ("BF16", values)})
    back, tensors = read_gguf_raw(tmp_path / "m.gguf")
    assert {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in back.items()} == {
        key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in keys.items()}
    assert np.array_equal(tensors["x"].dense(), values.dense())
    assert tensors["x"].shape == (2, 3, 4)


def byte_level(pre: Any, post: Any = None) -> bytes:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "<end>": 3, "Ġa": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    if post is not None:
        tokenizer.post_processor = post
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.add_tokens(["<tool>"])
    return tokenizer.to_str().encode()


def tokenizer_keys(tmp_path: Path, raw: bytes) -> dict[str, Any]:
    given = llama()
    write_gguf(Checkpoint("llama", given.config, given.tensors, {"tokenizer": raw}), tmp_path / "m.gguf")
    keys = dict(read_gguf(tmp_path / "m.gguf").metadata["tokenizer"])
    return {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()}


def test_byte_level_tokenizers_become_keys(tmp_path: Path) -> None:
    pre = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                   pre_tokenizers.ByteLevel(add_prefix_space=False)])
    post = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 3)])
    keys = tokenizer_keys(tmp_path, byte_level(pre, post))
    assert (keys["model"], keys["pre"], keys["merges"]) == ("gpt2", "smollm", ["a b"])
    assert keys["tokens"][:7] == ["a", "b", "ab", "<end>", "Ġa", "<tool>", "[PAD6]"]
    assert keys["token_type"].tolist() == [1, 1, 1, 3, 1, 4] + [5] * 34
    assert (keys["add_bos_token"], keys["bos_token_id"], keys["add_eos_token"]) == (True, 3, False)


def test_a_way_of_cutting_text_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'Whitespace'.* has no GGUF name that edgewise knows; gpt-2, smollm"):
        tokenizer_keys(tmp_path, byte_level(pre_tokenizers.Whitespace()))


def test_byte_fallback_tokenizers_become_keys(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<0x41>": 1, "a": 2, "b": 3, "ab": 4, "▁": 5, "▁ab": 6}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("▁", "ab")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    keys = tokenizer_keys(tmp_path, tokenizer.to_str().encode())
    assert keys["model"] == "llama"
    assert keys["token_type"][:7].tolist() == [2, 6, 1, 1, 1, 1, 1]
    assert keys["scores"][:7].tolist() == [0, 0, -2, -2, 0, -2, -1]
    assert keys["add_space_prefix"] is True


def test_word_piece_tokenizers_become_keys(tmp_path: Path) -> None:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "un": 4, "##do": 5}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    keys = tokenizer_keys(tmp_path, tokenizer.to_str().encode())
    assert (keys["model"], keys["normalizer.lowercase"]) == ("bert", True)
    assert keys["tokens"][:6] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁un", "do"]
    assert (keys["bos_token_id"], keys["seperator_token_id"], keys["padding_token_id"]) == (2, 3, 0)


@pytest.mark.parametrize(("raw", "error"), [
    (b"[", "not valid JSON"), (b"[1]", "has no 'model'"), (b'{"model": {"type": "BPE"}}', r"malformed|no GGUF name"),
    (b'{"model": {"type": "Unigram"}}', "of type 'Unigram' is not written"),
    (json.dumps({"model": {"type": "WordPiece", "vocab": {"a": 99}}}).encode(), "has id 99, but the embedding has 40"),
])
def test_malformed_tokenizers_are_refused(tmp_path: Path, raw: bytes, error: str) -> None:
    with pytest.raises((FormatError, UnsupportedError), match=error):
        tokenizer_keys(tmp_path, raw)
