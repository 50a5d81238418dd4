"""Input sparsity in torch is that of the engine."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from edgewise import models  # noqa: E402
from edgewise.compress.lowrank.r_sparse import RSparse  # noqa: E402
from edgewise.core.numbers import QuantFormat  # noqa: E402
from edgewise.engine.loading import model_of  # noqa: E402
from edgewise.engine.r_sparse import quantize  # noqa: E402
from edgewise.formats import write_folder  # noqa: E402
from edgewise.models.decoding import continued  # noqa: E402
from edgewise.models.sparse import decode_all  # noqa: E402
from tiny_checkpoint import tiny_checkpoint  # noqa: E402

pytestmark = pytest.mark.slow
TEXT = np.random.default_rng(0).integers(4, 260, 600)


def test_a_folder_decodes_in_torch_as_in_the_engine(tmp_path):
    made = quantize(tiny_checkpoint(), TEXT[:256], QuantFormat.parse("int8/g32"), RSparse(tokens=256, alpha=0.8))
    write_folder(made, tmp_path / "m")
    torch_model = models.load(tmp_path / "m")
    engine = model_of(made, threads=1, cache=False)
    ids = TEXT[300:340]
    batch = torch.from_numpy(ids[None].astype(np.int64))
    with torch.no_grad():
        prompt = torch_model(batch).logits[0].numpy()
        with decode_all(torch_model):
            decoded = torch_model(batch).logits[0].numpy()
        steps, past = [], None
        for i in range(8):
            logits, past = continued(torch_model, batch[:, i:i + 1], past)
            steps.append(logits[0, 0].numpy())
    own_prompt = engine.forward(ids)
    engine.session.decoding = True
    own = engine.forward(ids)
    # The engine rounds inputs to int8, so that some end up on the other side of their threshold a layer later.
    apart = np.abs(decoded - prompt).mean()
    assert np.abs(own - decoded).mean() < 0.4 * apart
    assert np.abs(own_prompt - prompt).mean() < 0.1 * apart
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        linear = torch_model.get_submodule(f"model.layers.1.{name}")
        stored = made.tensors[f"model.layers.1.{name}.weight"]
        with torch.no_grad(), decode_all(torch_model):
            found = linear(torch.from_numpy(x)).numpy()
        assert np.abs(found - stored.decode(x)).max() < 1e-5
        assert np.abs(found - stored.matmul(x)).max() > 0.1
    assert np.abs(np.stack(steps) - decoded[:8]).max() < 1e-4  # a pass of one token decodes
    chosen = [module.__dict__["edgewise_chosen"] for module in torch_model.modules()
              if "edgewise_chosen" in module.__dict__]
    assert sum(each.read for each in chosen) / sum(each.seen for each in chosen) == pytest.approx(0.4, abs=0.05)
