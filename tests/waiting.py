"""Waiting for what must happen, without ever judging how fast the machine is.

``PATIENCE`` only ends a hang: it is far longer than anything here takes on a machine ten times
slower and shared with others.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from invivo.engine.engine import Engine
from invivo.jobs.data import TrainingData

PATIENCE = 300.0  # seconds


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


@contextmanager
def held_after(engine: Engine, tokens: int, until: Callable[[], object]) -> Iterator[None]:
    """Requests of ``engine``, which runs in its thread, stop after ``tokens`` tokens (of them all)
    from now, until ``until()`` or the end of the block.

    So none of them can end before the test has done what it does meanwhile, however late that is.
    """
    step, written, over = engine.step, engine._counters.generated + tokens, threading.Event()

    def held() -> bool:
        inbox = engine._inbox
        if inbox.live and engine._counters.generated >= written:
            wait_for(lambda: until() or inbox.closed or over.is_set())
        return step()

    engine.step = held  # type: ignore[method-assign]
    try:
        yield
    finally:
        over.set()
        del engine.step  # type: ignore[method-assign]


def held_until_cancelled(engine: Engine) -> AbstractContextManager[None]:
    """Requests of ``engine`` go on after some tokens, enough for a first event of a stream, only to
    be cancelled."""
    return held_after(engine, 20, lambda: engine._inbox.aborted)


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
