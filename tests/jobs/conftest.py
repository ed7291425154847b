"""A tiny model and an engine of its own for every service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.engine.drive import small_engine
from tests.tiny import tiny_loaded

from invivo.engine.engine import Engine
from invivo.jobs.service import JobService
from invivo.models.load import LoadedModel


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(Path(tmp_path_factory.mktemp("jobs-model")))


@dataclass
class Running:
    engine: Engine
    jobs: JobService

    def close(self) -> None:
        self.engine.close()
        self.jobs.close()


Open = Callable[..., Running]


@pytest.fixture
def opened(tiny: LoadedModel, tmp_path: Path) -> Iterator[Open]:
    """``opened(folder="state", **engine options)``: a service on a running engine."""
    made: list[Running] = []

    def make(folder: str = "state", *, started: bool = True, **options: Any) -> Running:
        # Whole iterations at a time: the same cuts, hence the same bits.
        engine = small_engine(tiny, **({"policy": "temporal:1"} | options))
        running = Running(engine, JobService(engine, tiny, tmp_path / folder))
        made.append(running)
        if started:
            engine.start()
        return running

    yield make
    for running in made:
        running.close()
