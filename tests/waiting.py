"""Waiting for what must happen, without ever judging how fast the machine is.

``PATIENCE`` only ends a hang: it is far longer than anything here takes on a machine ten times
slower and shared with others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from invivo.engine.engine import Engine
from invivo.jobs.data import TrainingData

PATIENCE = 200.0  # seconds


def wait_for(holds: Callable[[], object], told: Callable[[], object] = lambda: "") -> None:
    """Look until ``holds()``; ``told()`` is what the failure shows."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, ("waited in vain", told())
        time.sleep(0.005)


async def await_for(holds: Callable[[], object]) -> None:
    """The same inside an event loop."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


def hold_at_texts(patch: pytest.MonkeyPatch, engine: Engine, *numbers: int) -> None:
    """Jobs of ``engine`` stop before text number ``numbers`` (from 0, over all epochs), each until
    the next order (a pause, a stop) reaches the engine.

    So a job of few steps cannot end before the test has spoken, however late that comes.
    """
    left = set(numbers)
    given = TrainingData.next

    def next_text(data: TrainingData) -> Any:
        at = data.position()
        number = at["epoch"] * len(data._examples) + at["index"]
        if number in left:
            left.discard(number)
            wait_for(lambda: engine._finetuning._orders or engine._inbox.closed)
        return given(data)

    patch.setattr(TrainingData, "next", next_text)
