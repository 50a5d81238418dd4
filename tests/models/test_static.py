"""Static activations in torch: each site is where its name says, and nothing changes without sites."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import DECODERS, build, checkpoint_of, ids_of, torch_output  # noqa: E402

from edgewise import models  # noqa: E402
from edgewise.core.activation import StaticActivation, activations_to_config  # noqa: E402
from edgewise.core.checkpoint import Step  # noqa: E402
from edgewise.core.errors import UnsupportedError  # noqa: E402
from edgewise.models.static import Rounding, install, layers_of  # noqa: E402

pytestmark = pytest.mark.slow

LAYER = "model.layers.1"
SITES = [f"{LAYER}.{site}" for site in (
    "input_layernorm.input", "post_attention_layernorm.input", "self_attn.q_proj.input", "self_attn.k_proj.input",
    "self_attn.v_proj.input", "self_attn.o_proj.input", "self_attn.q_proj.output", "self_attn.k_proj.output",
    "self_attn.v_proj.output", "self_attn.o_proj.output", "self_attn.query", "self_attn.key", "self_attn.softmax_in",
    "self_attn.softmax_out", "mlp.gate_proj.input", "mlp.up_proj.input", "mlp.gate_proj.output", "mlp.up_proj.output",
    "mlp.sigmoid", "mlp.act", "mlp.down_proj.input", "mlp.down_proj.output")]


def test_rounding_is_the_cores_to_the_bit():
    x = (10 * np.random.default_rng(0).standard_normal(100_000)).astype(np.float32)
    for item in (StaticActivation.from_range(-3.3, 21.0, 8), StaticActivation.from_range(-1.0, 1.0, 16),
                 StaticActivation.from_range(-2.0, 5.0, 4, symmetric=True)):
        assert np.array_equal(Rounding(item)(torch.tensor(x)).numpy(), item.round(x))


@pytest.mark.parametrize("name", ["llama", "llama tied", "mistral", "qwen3", "phi3", "gemma3"])
def test_sites_that_do_nothing_change_nothing(name):
    model, seen = build(name), {}
    ids = ids_of(model, 40)
    before = torch_output(model, ids)
    assert name in DECODERS
    sites = [site for site in SITES if name != "phi3" or not any(part in site for part in ("q_proj", "k_proj", "v_proj",
                                                                                          "gate_proj", "up_proj",
                                                                                          "mlp."))]
    if name == "gemma3":
        sites.remove(f"{LAYER}.mlp.sigmoid")

    def noted(site):
        def function(x):
            seen[site] = tuple(x.shape)
            return x
        return function

    install(model, {site: noted(site) for site in sites})
    assert np.abs(torch_output(model, ids) - before).max() < 1e-5
    assert set(seen) == set(sites)
    assert seen[f"{LAYER}.self_attn.softmax_in"] == seen[f"{LAYER}.self_attn.softmax_out"] == (1, 4, 40, 40)
    assert seen[f"{LAYER}.self_attn.key"][1] == 2


@pytest.mark.parametrize("site", SITES)
def test_each_site_rounds_alone_and_is_what_a_transcription_computes(site):
    model = build("llama")
    ids = ids_of(model, 24)
    item = StaticActivation.from_range(-0.9, 1.1, 4)
    before = torch_output(model, ids)
    states = transcribed(model, ids, {})
    install(model, {site: Rounding(item)})
    after = torch_output(model, ids)
    assert np.abs(after - before).max() > 1e-3
    assert np.abs(states - before).max() < 1e-4
    assert np.abs(transcribed(model, ids, {site: item}) - after).max() < 1e-4


def transcribed(model, ids, sites):
    """A llama in NumPy's words, with roundings by name."""
    state = {name: value.detach().double() for name, value in model.state_dict().items()}

    def at(site, x):
        return torch.tensor(sites[site].round(x.float().numpy())).double() if site in sites else x

    def norm(x, weight):
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + model.config.rms_norm_eps) * weight

    n, heads, kv, size = len(ids), 4, 2, 16
    h = state["model.embed_tokens.weight"][torch.tensor(ids)]
    angle = torch.arange(n)[:, None].double() * model.model.rotary_emb.inv_freq.double()[None]
    cos, sin = torch.cos(angle).repeat(1, 2), torch.sin(angle).repeat(1, 2)

    def turned(x):
        return x * cos + torch.cat([-x[..., size // 2:], x[..., :size // 2]], -1) * sin

    for i in range(3):
        name = f"model.layers.{i}"

        def linear(part, x, name=name):
            return at(f"{name}.{part}.output", at(f"{name}.{part}.input", x) @ state[f"{name}.{part}.weight"].T)

        def ported(port, x, name=name):
            return at(f"{name}.{port}", x)

        x = norm(ported("input_layernorm.input", h), state[f"{name}.input_layernorm.weight"])
        q, k, v = (linear(f"self_attn.{part}_proj", x).view(n, -1, size).transpose(0, 1) for part in "qkv")
        q, k = ported("self_attn.query", turned(q)), ported("self_attn.key", turned(k))
        out = []
        for head in range(heads):
            scores = ported("self_attn.softmax_in", q[head] @ k[head // (heads // kv)].T / size**0.5)
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
            out.append(ported("self_attn.softmax_out", torch.softmax(scores, -1)) @ v[head // (heads // kv)])
        h = h + linear("self_attn.o_proj", torch.stack(out, 1).reshape(n, -1))
        x = norm(ported("post_attention_layernorm.input", h), state[f"{name}.post_attention_layernorm.weight"])
        gate = linear("mlp.gate_proj", x)
        act = ported("mlp.act", gate * ported("mlp.sigmoid", torch.sigmoid(gate)))
        h = h + linear("mlp.down_proj", act * linear("mlp.up_proj", x))
    return (norm(h, state["model.norm.weight"]) @ state["lm_head.weight"].T).numpy()


def test_a_configuration_is_applied_and_what_it_cannot_name_is_refused():
    source = checkpoint_of(build("llama"))
    sites = {f"{LAYER}.mlp.down_proj.input": StaticActivation.from_range(-0.5, 0.5, 4)}

    def named(sites):
        return source.with_tensors(source.tensors, Step("x"),
                                   quantization_config=activations_to_config(source.config, sites))

    ids = ids_of(build("llama"), 24)
    model = build("llama")
    install(model, {site: Rounding(item) for site, item in sites.items()})
    assert np.array_equal(torch_output(models.load(named(sites)), ids), torch_output(model, ids))
    for site in ("model.layers.9.mlp.act", f"{LAYER}.mlp.query", f"{LAYER}.self_attn.scores"):
        with pytest.raises(UnsupportedError, match=site):
            models.load(named({site: sites[f"{LAYER}.mlp.down_proj.input"]}))


def test_the_stack_of_layers_is_found():
    assert layers_of(build("llama"))[0] == "model.layers"
    assert layers_of(build("bert"))[0] == "encoder.layer"
