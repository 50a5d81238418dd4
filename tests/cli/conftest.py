"""Small models on disk for the verbs, and a cache of the tests' own."""

from __future__ import annotations

import pytest

from tiny_checkpoint import tiny_encoder, tiny_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """The folder of a random Llama model with a chat template."""
    return str(tiny_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> str:
    """The folder of a random BERT encoder."""
    return str(tiny_folder(tmp_path_factory.mktemp("models") / "encoder", tiny_encoder()))
