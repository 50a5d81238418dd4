"""What every test gets: nothing leaves the machine by accident, nothing reads the user's caches."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT
