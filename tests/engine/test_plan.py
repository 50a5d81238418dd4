"""From a Checkpoint to a Plan: what is kept as stored, and what a wrong checkpoint says. No torch here."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from reference import forward, round_activations

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import FormatError, UnsupportedError, collect_notices
from edgewise.core.numbers import QuantFormat, quantize
from edgewise.core.storage import Dense, LazyTensors, QuantizedTensor, Stored
from edgewise.engine.archs import known_archs, plan_of

LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 20, "max_position_embeddings": 64, "tie_word_embeddings": True}
BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
        "vocab_size": 20, "max_position_embeddings": 12, "type_vocab_size": 2, "pad_token_id": 1}


def _dense(*shape: int) -> Dense:
    seed = sum(shape)
    return Dense(np.random.default_rng(seed).standard_normal(shape, np.float32))


def llama(arch: str = "llama", **changes: object) -> Checkpoint:
    tensors: dict[str, Stored] = {"model.embed_tokens.weight": _dense(20, 16), "model.norm.weight": _dense(16)}
    for i in range(2):
        name = f"model.layers.{i}"
        for part, shape in (("self_attn.q_proj", (16, 16)), ("self_attn.k_proj", (8, 16)),
                            ("self_attn.v_proj", (8, 16)), ("self_attn.o_proj", (16, 16)), ("mlp.gate_proj", (24, 16)),
                            ("mlp.up_proj", (24, 16)), ("mlp.down_proj", (16, 24)), ("input_layernorm", (16,)),
                            ("post_attention_layernorm", (16,))):
            tensors[f"{name}.{part}.weight"] = _dense(*shape)
    return Checkpoint(arch, {**LLAMA, **changes}, tensors, source="model.safetensors")


def bert(arch: str = "bert", prefix: str = "", **changes: object) -> Checkpoint:
    tensors: dict[str, Stored] = {
        "embeddings.word_embeddings.weight": _dense(20, 16), "embeddings.position_embeddings.weight": _dense(12, 16),
        "embeddings.token_type_embeddings.weight": _dense(2, 16)}
    layer = "encoder.layer.0"
    for name in ("embeddings.LayerNorm", f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"):
        tensors |= {f"{name}.weight": _dense(16), f"{name}.bias": _dense(16)}
    for part, out, inputs in (("attention.self.query", 16, 16), ("attention.self.key", 16, 16),
                              ("attention.self.value", 16, 16), ("attention.output.dense", 16, 16),
                              ("intermediate.dense", 24, 16), ("output.dense", 16, 24)):
        tensors |= {f"{layer}.{part}.weight": _dense(out, inputs), f"{layer}.{part}.bias": _dense(out)}
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    return Checkpoint(arch, {**BERT, **changes}, tensors, source="model.safetensors")


def without(checkpoint: Checkpoint, *names: str, **more: Stored) -> Checkpoint:
    return replace(checkpoint, tensors={**{n: t for n, t in checkpoint.tensors.items() if n not in names}, **more})


def test_known_architectures():
    assert {"llama", "mistral", "bert", "roberta", "xlm-roberta"} <= set(known_archs())


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(UnsupportedError, match=r"'mamba'.*bert.*llama.*mistral"):
        plan_of(llama(arch="mamba"))


def test_planning_does_not_import_torch():
    code = ("import sys; from edgewise.engine.archs import known_archs; known_archs(); "
            "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestLlama:
    def test_a_tied_head_is_the_embedding_itself(self):
        plan = plan_of(llama())
        assert plan.head.weight is plan.embedding.weight

    @pytest.mark.parametrize("tied", [None, False])
    def test_an_untied_head(self, tied):
        head = _dense(20, 16)
        plan = plan_of(without(llama(tie_word_embeddings=tied), **{"lm_head.weight": head}))
        assert plan.head.weight is head

    def test_without_a_word_on_tying_a_missing_head_means_tied(self):
        plan = plan_of(llama(tie_word_embeddings=None))
        assert plan.head.weight is plan.embedding.weight

    def test_an_untied_head_that_is_missing(self):
        with pytest.raises(FormatError, match=r"model.safetensors.*'lm_head.weight'.*no such tensor.*\(20, 16\)"):
            plan_of(llama(tie_word_embeddings=False))

    def test_weights_stay_as_stored_and_each_is_read_once(self):
        """A quantised weight is never made dense here, and asks for int8 inputs; a float one keeps float inputs."""
        fmt = QuantFormat.parse("int8/g8")
        codes, scales, _ = quantize(_dense(24, 16).data, fmt)

        class Undensable(QuantizedTensor):
            def dense(self):
                raise AssertionError("densified")

        checkpoint = llama()
        weight = Undensable(codes, scales, fmt)
        reads: dict[str, int] = {}

        def maker(name: str, tensor: Stored):
            def make() -> Stored:
                reads[name] = reads.get(name, 0) + 1
                return weight if name == "model.layers.1.mlp.up_proj.weight" else tensor
            return make

        makers = {name: maker(name, tensor) for name, tensor in checkpoint.tensors.items()}
        plan = plan_of(replace(checkpoint, tensors=LazyTensors(makers)))
        assert plan.layers[1].feed_forward.up.weight is weight
        assert plan.layers[1].feed_forward.up.activation == "int8"
        assert plan.layers[0].feed_forward.up.activation == "float32"
        assert set(reads.values()) == {1}

    def test_sliding_window_is_mistrals(self):
        policy = plan_of(llama("mistral", sliding_window=5)).layers[0].attention.policy
        assert (policy.kind, policy.window) == ("sliding", 5)
        assert plan_of(llama("mistral", sliding_window=None)).layers[0].attention.policy.kind == "causal"
        with collect_notices() as notices:
            assert plan_of(llama("llama", sliding_window=5)).layers[0].attention.policy.kind == "causal"
        assert ["sliding_window" in n.message for n in notices] == [True]

    def test_shapes_may_differ_per_layer(self):
        narrow = without(llama(intermediate_size=[24, 8]), **{
            f"model.layers.1.mlp.{part}_proj.weight": _dense(*shape)
            for part, shape in (("gate", (8, 16)), ("up", (8, 16)), ("down", (16, 8)))})
        plan = plan_of(narrow)
        assert [layer.feed_forward.up.weight.shape[0] for layer in plan.layers] == [24, 8]
        assert forward(plan, [1, 2, 3]).shape == (3, 20)

    def test_biases_are_read_where_they_are_unless_the_configuration_says_no(self):
        biases = {f"model.layers.{i}.self_attn.{p}_proj.bias": _dense(n)
                  for i in range(2) for p, n in (("q", 16), ("k", 8), ("v", 8), ("o", 16))}
        plan = plan_of(without(llama(), **biases))
        np.testing.assert_array_equal(plan.layers[1].attention.k.bias,
                                      biases["model.layers.1.self_attn.k_proj.bias"].data)
        with collect_notices() as notices:
            plan = plan_of(without(llama(attention_bias=False), **biases))
        assert plan.layers[1].attention.k.bias is None
        assert [(n.kind, "and 5 more" in n.message) for n in notices] == [("ignored", True)]
        with pytest.raises(FormatError, match=r"self_attn.q_proj.bias.*no such tensor.*\(16,\)"):
            plan_of(llama(attention_bias=True))

    def test_old_rotary_buffers_are_information(self):
        buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": _dense(2)}
        with collect_notices(strict=True) as notices:
            plan_of(without(llama(), **buffer))
        assert [n.kind for n in notices] == ["info"]

    def test_an_unused_tensor_is_told(self):
        with collect_notices() as notices:
            plan_of(without(llama(), **{"model.extra": _dense(3)}))
        assert [(n.kind, n.message) for n in notices] == [("ignored", "the model does not use model.extra")]

    def test_a_missing_tensor(self):
        with pytest.raises(FormatError, match=r"layers.1.mlp.up_proj.weight.*no such tensor.*\(24, 16\)") as caught:
            plan_of(without(llama(), "model.layers.1.mlp.up_proj.weight"))
        assert caught.value.tensor == "model.layers.1.mlp.up_proj.weight"

    def test_a_wrong_shape(self):
        with pytest.raises(FormatError, match=r"k_proj.weight'.*\(16, 16\) found.*\(8, 16\)"):
            plan_of(without(llama(), **{"model.layers.0.self_attn.k_proj.weight": _dense(16, 16)}))

    @pytest.mark.parametrize(("key", "value", "message"), [
        ("hidden_size", None, "'hidden_size' is missing; expected a whole number"),
        ("hidden_size", "16", "'hidden_size' is '16'"),
        ("hidden_size", True, "'hidden_size' is True"),
        ("num_hidden_layers", 0, "'num_hidden_layers' is 0; expected a whole number from 1 to 20"),
        ("num_hidden_layers", 10**30, "'num_hidden_layers' is 1000"),
        ("num_hidden_layers", 3, "layers.2.self_attn.q_proj.weight.*no such tensor"),
        ("num_attention_heads", -4, "'num_attention_heads' is -4"),
        ("num_key_value_heads", 3, "4 is not a multiple of num_key_value_heads 3"),
        ("intermediate_size", [24], "'intermediate_size' is .24.; expected .* each of the 2 layers"),
        ("intermediate_size", [24, -1], "'intermediate_size'"),
        ("head_dim", 2**39, "q_proj.weight.*found"),
        ("rms_norm_eps", float("nan"), "'rms_norm_eps' is nan"),
        ("rms_norm_eps", 0, "'rms_norm_eps' is 0"),
        ("tie_word_embeddings", "yes", "'tie_word_embeddings' is 'yes'; expected true or false"),
        ("rope_theta", 1.0, "'rope_theta' is 1.0; expected a finite number above 1"),
        ("rope_scaling", "linear", "'rope_scaling' is 'linear'; expected a mapping"),
        ("rope_scaling", {"type": "linear"}, "'rope_scaling.factor' is missing"),
        ("rope_scaling", {"rope_type": "linear", "factor": 0}, "'rope_scaling.factor' is 0"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
         "'rope_scaling.high_freq_factor' is 4.0; expected a finite number above 4"),
    ])
    def test_a_wrong_configuration(self, key, value, message):
        with pytest.raises(FormatError, match=message):
            plan_of(llama(**{key: value}))

    @pytest.mark.parametrize(("changes", "message"), [
        ({"hidden_act": "mish"}, "'hidden_act' is 'mish'.*gelu.*silu"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "'ntk'.*default.*llama3.*yarn"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters.rope_type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ by kind of layer .full_attention."),
    ])
    def test_an_unsupported_configuration(self, changes, message):
        with pytest.raises(UnsupportedError, match=message):
            plan_of(llama(**changes))


class TestRope:
    """The frequencies against the published equations, term by term."""

    DIM, BASE, FACTOR, ORIGINAL = 64, 10_000.0, 8.0, 4096

    def frequencies(self, **scaling):
        from edgewise.engine.archs._reading import Config
        from edgewise.engine.archs._rope import rope_of

        config = {"rope_theta": self.BASE, "rope_scaling": {**scaling, "factor": self.FACTOR}} if scaling else {}
        return rope_of(Config(config, ""), self.DIM, 32768)

    def plain(self, i: int) -> float:
        return self.BASE ** (-2 * i / self.DIM)

    def test_plain(self):
        rope = self.frequencies()
        np.testing.assert_array_equal(rope.inverse_frequency, np.float32([self.plain(i) for i in range(32)]))
        assert rope.attention_factor == 1.0

    def test_linear(self):
        rope = self.frequencies(rope_type="linear")
        np.testing.assert_array_equal(rope.inverse_frequency, np.float32([self.plain(i) / 8 for i in range(32)]))

    def test_llama3(self):
        rope = self.frequencies(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0,
                                original_max_position_embeddings=self.ORIGINAL)
        expected = []
        for i in range(32):
            wavelength = 2 * np.pi / self.plain(i)
            if wavelength < self.ORIGINAL / 4.0:
                expected.append(self.plain(i))
            elif wavelength > self.ORIGINAL / 1.0:
                expected.append(self.plain(i) / self.FACTOR)
            else:
                smooth = (self.ORIGINAL / wavelength - 1.0) / (4.0 - 1.0)
                expected.append((1 - smooth) * self.plain(i) / self.FACTOR + smooth * self.plain(i))
        np.testing.assert_allclose(rope.inverse_frequency, expected, rtol=1e-7)

    def test_divisors_of_a_gguf_file_stand_for_llama3(self):
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8}
        scaled = plan_of(llama(rope_scaling=scaling)).layers[0].attention.rope
        plain = plan_of(llama()).layers[0].attention.rope
        assert not np.array_equal(scaled.inverse_frequency, plain.inverse_frequency)
        divisors = Dense(plain.inverse_frequency / scaled.inverse_frequency)
        rope = plan_of(without(llama(), **{"rope_freqs.weight": divisors})).layers[0].attention.rope
        np.testing.assert_allclose(rope.inverse_frequency, scaled.inverse_frequency, rtol=2e-7)

    @pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
    def test_impossible_divisors(self, bad):
        with pytest.raises(FormatError, match=r"rope_freqs.weight.*finite and positive"):
            plan_of(without(llama(), **{"rope_freqs.weight": Dense(np.float32([1.0, bad]))}))

    def test_yarn(self):
        """arXiv:2309.00071, equations 17 to 22, with the rounding of the ramp's ends that the authors' code does."""
        rope = self.frequencies(rope_type="yarn", original_max_position_embeddings=self.ORIGINAL)
        ends = [self.DIM * np.log(self.ORIGINAL / (turns * 2 * np.pi)) / (2 * np.log(self.BASE)) for turns in (32, 1)]
        low, high = np.floor(ends[0]), np.ceil(ends[1])
        expected = []
        for i in range(32):
            gamma = 1 - min(max((i - low) / (high - low), 0.0), 1.0)
            expected.append((1 - gamma) * self.plain(i) / self.FACTOR + gamma * self.plain(i))
        np.testing.assert_allclose(rope.inverse_frequency, expected, rtol=1e-7)
        assert rope.attention_factor == pytest.approx(0.1 * np.log(self.FACTOR) + 1)

    @pytest.mark.parametrize(("options", "expected"), [
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 0.5, "mscale_all_dim": 0}, 0.1 * np.log(8) + 1),
        ({"mscale": 0.5, "mscale_all_dim": 1.0}, (0.05 * np.log(8) + 1) / (0.1 * np.log(8) + 1)),
    ])
    def test_yarns_attention_factor(self, options, expected):
        rope = self.frequencies(rope_type="yarn", original_max_position_embeddings=self.ORIGINAL, **options)
        assert rope.attention_factor == pytest.approx(expected, rel=1e-12)


class TestBert:
    @pytest.mark.parametrize(("arch", "prefix"), [("bert", ""), ("bert", "bert."), ("roberta", "roberta."),
                                                  ("xlm-roberta", "roberta."), ("xlm-roberta", "")])
    def test_prefixes_and_positions(self, arch, prefix):
        plan = plan_of(bert(arch, prefix))
        offset = 0 if arch == "bert" else 2
        assert (plan.kind, plan.position_offset, plan.context) == ("encoder", offset, 12 - offset)
        assert plan.head is None
        assert plan.layers[0].order == "post"
        assert plan.layers[0].attention.q.activation == "float32"
        assert forward(plan, [3, 4, 5]).shape == (3, 16)

    def test_pooler_buffers_and_heads_are_information(self):
        extra = {"pooler.dense.weight": _dense(16, 16), "embeddings.position_ids": _dense(1, 12),
                 "cls.predictions.bias": _dense(20)}
        with collect_notices(strict=True) as notices:
            plan_of(without(bert(), **extra))
        assert [n.kind for n in notices] == ["info"] * 3

    def test_quantised_weights_take_int8_inputs(self):
        fmt = QuantFormat.parse("int4/g16/fp16/min")
        codes, scales, minima = quantize(_dense(24, 16).data, fmt)
        weight = QuantizedTensor(codes, scales, fmt, minima=minima)
        plan = plan_of(without(bert(), **{"encoder.layer.0.intermediate.dense.weight": weight}))
        assert plan.layers[0].feed_forward.up.activation == "int8"
        assert plan.layers[0].feed_forward.down.activation == "float32"

    @pytest.mark.parametrize(("changes", "kind", "message"), [
        ({"position_embedding_type": "relative_key"}, UnsupportedError, "'relative_key'.*absolute"),
        ({"is_decoder": True}, UnsupportedError, "is_decoder"),
        ({"hidden_act": "tanh"}, UnsupportedError, "'tanh'.*gelu"),
        ({"num_attention_heads": 3}, FormatError, "16 is not a multiple of num_attention_heads 3"),
        ({"max_position_embeddings": 13}, FormatError, r"position_embeddings.weight.*\(12, 16\) found.*\(13, 16\)"),
        ({"type_vocab_size": 1}, FormatError, r"token_type_embeddings.weight.*\(2, 16\) found.*\(1, 16\)"),
    ])
    def test_a_wrong_configuration(self, changes, kind, message):
        with pytest.raises(kind, match=message):
            plan_of(bert(**changes))

    def test_more_padding_than_positions(self):
        with pytest.raises(FormatError, match="first position of this model is 12"):
            plan_of(bert("roberta", pad_token_id=11))


def test_rounded_activations_are_on_the_grid_of_their_block():
    x = np.random.default_rng(0).standard_normal((3, 70)).astype(np.float32)
    x[1, 32:64] = 0
    y = round_activations(x)
    for start, stop in ((0, 32), (32, 64), (64, 70)):
        scale = np.abs(x[:, start:stop]).max(axis=1, keepdims=True) / 127
        assert (np.abs(y - x)[:, start:stop] <= scale / 2 * (1 + 1e-6)).all()
    assert (y[1, 32:64] == 0).all()
    assert np.abs(y - x).max() > 0
