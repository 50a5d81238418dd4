"""Checkpoints in torch: the outputs are those of the model they came from, and of the engine."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import DECODERS, ENCODERS, build, checkpoint_of, ids_of, torch_output  # noqa: E402

from edgewise import models  # noqa: E402
from edgewise.core.checkpoint import Step  # noqa: E402
from edgewise.core.errors import EdgewiseWarning, FormatError, InvalidValueError, UnsupportedError  # noqa: E402
from edgewise.core.numbers import QuantFormat, quantize  # noqa: E402
from edgewise.core.storage import Dense, QuantizedTensor  # noqa: E402
from edgewise.engine.loading import model_of  # noqa: E402
from edgewise.formats import write_folder  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_outputs_are_the_originals(name):
    model = build(name)
    ids = ids_of(model, 40)
    loaded = models.load(checkpoint_of(model))
    assert type(loaded) is type(model)
    assert np.abs(torch_output(loaded, ids) - torch_output(model, ids)).max() < 1e-5


def test_a_tied_output_layer_is_one_tensor():
    loaded = models.load(checkpoint_of(build("llama tied")))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_folder_of_ours_loads_in_torch_and_in_the_engine(tmp_path):
    source = checkpoint_of(build("llama tied"))
    fmt = QuantFormat.parse("int4/g32/fp16/min")

    def rounded(values):
        codes, scales, minima = quantize(values, fmt)
        return QuantizedTensor(codes, scales, fmt, minima=minima)

    made = source.with_tensors({name: rounded(stored.dense()) if "_proj" in name else stored
                                for name, stored in source.tensors.items()}, Step("rounded"))
    folder = write_folder(made, tmp_path / "m")
    loaded = models.load(folder)
    ids = ids_of(loaded, 40)
    run = model_of(made, threads=1, kv="fp32", activations="float32").forward(ids)
    assert np.abs(torch_output(loaded, ids) - run).max() < 1e-3 * np.abs(run).max()
    assert np.abs(torch_output(loaded, ids) - torch_output(models.load(source), ids)).max() > 0.05
    back = models.checkpoint_of(loaded, source, Step("back"))
    for name in source.tensors:
        assert np.array_equal(back.tensors[name].dense(), made.tensors[name].dense()), name


def test_what_does_not_fit_is_named():
    source = checkpoint_of(build("llama"))
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(FormatError, match="up_proj"):
        models.load(source.with_tensors({k: v for k, v in source.tensors.items() if k != name}, Step("x")))
    with pytest.raises(FormatError, match=r"shape \(2, 2\)"):
        models.load(source.with_tensors({**source.tensors, name: Dense(np.ones((2, 2), np.float32))}, Step("x")))
    with pytest.raises(InvalidValueError, match="not finite"):
        models.load(source.with_tensors({**source.tensors, name: Dense(np.full((96, 64), np.nan, np.float32))},
                                        Step("x")))
    other = checkpoint_of(build("llama"))
    object.__setattr__(other, "arch", "no-such-model")
    with pytest.raises(UnsupportedError, match="no architecture"):
        models.load(other)
    with pytest.warns(EdgewiseWarning, match="does not use extra"):
        models.load(source.with_tensors({**source.tensors, "extra": Dense(np.ones(3, np.float32))}, Step("x")))
    with pytest.warns(EdgewiseWarning, match="says of kv"):
        models.load(source.with_tensors(source.tensors, Step("x"), quantization_config={"kv": "int8"}))
