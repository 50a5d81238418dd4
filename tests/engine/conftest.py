"""Real models, once per run: the wheels' SmolLM2 and MiniLM, as we read them and in torch, and the evaluation text."""

from __future__ import annotations

import hashlib

import pytest

LEE_SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
"""Of lee_background.cor; the reference values of the tests hold for this text only."""


@pytest.fixture(scope="session")
def lee_text() -> str:
    """The 300 news articles of lee_background.cor, the text of every perplexity."""
    from edgewise.formats import resolve

    data = resolve("pip:gensim==4.4.0:gensim/test/test_data/lee_background.cor").read_bytes()
    assert hashlib.sha256(data).hexdigest() == LEE_SHA256
    return data.decode("utf-8")


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct: a RealModel whose torch side holds the dequantised weights in float32."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(2)
    from real_models import RealModel, torch_decoder

    from edgewise.data.tokenizer import tokenizer_of
    from edgewise.formats import open_checkpoint

    checkpoint = open_checkpoint("smollm2")
    return RealModel(checkpoint, torch_decoder(checkpoint), tokenizer_of(checkpoint))


@pytest.fixture(scope="session")
def minilm():
    """all-MiniLM-L6-v2: a RealModel in float32."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(2)
    from real_models import RealModel, torch_encoder

    from edgewise.data.tokenizer import tokenizer_of
    from edgewise.formats import open_checkpoint

    checkpoint = open_checkpoint("minilm")
    return RealModel(checkpoint, torch_encoder(checkpoint), tokenizer_of(checkpoint))


@pytest.fixture(scope="session")
def lee_ids(smollm2, lee_text) -> list[int]:
    """The tokens of the whole text by SmolLM2's tokenizer, without BOS."""
    return smollm2.tokenizer.encode(lee_text, add_special=False)


@pytest.fixture(scope="session")
def lee_losses(smollm2, lee_ids):
    """(8, 511) float64: what torch loses on the first eight windows of 512. Their perplexity is 33.060."""
    from real_models import window_losses

    return window_losses(smollm2, lee_ids, 8)


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    """The file of SmolLM2-135M-Instruct, for starts with a cache of their own."""
    from edgewise.formats import resolve

    return str(resolve("smollm2"))
