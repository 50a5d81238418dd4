"""What every test gets: nothing leaves the machine by accident, nothing reads the user's caches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same cases in every run: a change that passes here passes everywhere. New cases are what `make fuzz` is for.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

os.environ["EDGEWISE_TUNING"] = "off"  # what this machine was tuned to is no part of a test
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT
