"""Driving an engine by hand in tests: submit, step, collect."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

from tests.waiting import PATIENCE

from invivo.engine.engine import Engine, EngineConfig
from invivo.engine.types import Output, Request, SamplingParams
from invivo.models.load import LoadedModel

_numbers = itertools.count()

KV_BYTES = 4 << 20


def small_engine(model: LoadedModel, **options: Any) -> Engine:
    """An engine with a small cache; ``options`` are fields of EngineConfig."""
    defaults: dict[str, Any] = {"kv_bytes": KV_BYTES, "max_running": 32, "max_batch_tokens": 128}
    return Engine(model, EngineConfig(**(defaults | options)))


@dataclass
class Inquiry:
    """A request and everything that came back."""

    request: Request
    outputs: list[Output] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return bool(self.outputs) and self.outputs[-1].final

    def of(self, index: int = 0) -> list[Output]:
        return [o for o in self.outputs if o.index == index]

    def tokens(self, index: int = 0) -> list[int]:
        return [t for o in self.of(index) for t in o.tokens]

    def text(self, index: int = 0) -> str:
        return "".join(o.text for o in self.of(index))

    def logprobs(self, index: int = 0) -> list[float]:
        return [r.logprob for o in self.of(index) for r in o.logprobs or ()]

    def prompt_logprobs(self) -> list[float]:
        return [r.logprob for o in self.outputs for r in o.prompt_logprobs or ()]

    def reason(self, index: int = 0) -> str | None:
        return self.of(index)[-1].finish_reason


def ask(engine: Engine, tokens: list[int], /, **fields: Any) -> Inquiry:
    """Submit a request; fields of Request and of SamplingParams may be mixed."""
    own = {k: fields.pop(k) for k in list(fields) if k in Request.__slots__}
    request = Request(
        id=own.pop("id", f"r{next(_numbers)}"),
        tokens=tuple(tokens),
        params=SamplingParams(**fields),
        **own,
    )
    inquiry = Inquiry(request)
    engine.submit(request, inquiry.outputs.append)
    return inquiry


def run(engine: Engine, *inquiries: Inquiry) -> None:
    """Step until all are done; afterwards nothing may be held."""
    deadline = time.monotonic() + PATIENCE
    while not all(i.done for i in inquiries):
        assert time.monotonic() < deadline
        engine.step()
    settle(engine)


def settle(engine: Engine) -> None:
    """Step until idle and check that everything was given back."""
    deadline = time.monotonic() + PATIENCE
    while engine.step():
        assert time.monotonic() < deadline
    assert not engine.scheduler.has_work
    assert engine.scheduler.blocks_used == 0
    assert engine.stats().running == engine.stats().waiting == 0
    assert not engine._tracks
    assert not engine._stepper._sums
    assert all(a.running == 0 for a in engine.adapters.list())
