"""Tiny models that the engine's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import tiny_loaded

from invivo.models.load import LoadedModel


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A random Llama of 42,000 parameters; tests may not change it."""
    return tiny_loaded(Path(tmp_path_factory.mktemp("tiny")))
