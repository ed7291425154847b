"""What the engine counts about itself, cheaply, and the snapshot that others read.

The snapshot's shape is described in ``docs/architecture.md`` ("live snapshot").
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invivo.engine.types import AdapterInfo, Purpose

# Bucket borders in seconds, those of vLLM's metrics.
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0,
    60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip

WINDOW = 60  # seconds over which percentiles are taken
HISTORY = 300  # seconds of token counts that are kept
RECENT = 50  # requests that are listed

# Fine logarithmic bins for percentiles: 5 % wide from 10 microseconds to some 20 minutes.
_FIRST, _WIDTH, _BINS = 1e-5, math.log(1.05), 384


class Latency:
    """One kind of waiting time: a histogram since the start and percentiles of the last minute."""

    __slots__ = ("_bins", "_bounds", "_second_of", "_seconds_sum", "counts")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = np.asarray(bounds)
        self.counts: NDArray[np.int64] = np.zeros(len(bounds) + 1, np.int64)
        self._seconds_sum = 0.0
        self._bins: NDArray[np.int32] = np.zeros((WINDOW, _BINS), np.int32)
        self._second_of = [0] * WINDOW

    def add(self, values: Sequence[float], second: int) -> None:
        """Note ``values`` (seconds) that were seen in the whole Unix second ``second``."""
        some = np.asarray(values)
        np.add.at(self.counts, np.searchsorted(self._bounds, some), 1)
        self._seconds_sum += float(some.sum())
        row = second % WINDOW
        if self._second_of[row] != second:
            self._bins[row] = 0
            self._second_of[row] = second
        fine = np.log(np.maximum(some, _FIRST) / _FIRST) / _WIDTH
        np.add.at(self._bins[row], np.minimum(fine.astype(np.int64), _BINS - 1), 1)

    def histogram(self) -> dict[str, Any]:
        """Counts between the borders since the start; one more than there are borders."""
        return {
            "le": self._bounds.tolist(),
            "counts": self.counts.tolist(),
            "sum": self._seconds_sum,
        }

    def percentiles(self, second: int) -> dict[str, float | int | None]:
        """p50, p95 and p99 of the last minute, right to the width of a bin (5 %)."""
        fresh = [row for row, at in enumerate(self._second_of) if second - WINDOW < at <= second]
        total = self._bins[fresh].sum(axis=0)
        count = int(total.sum())
        out: dict[str, float | int | None] = {"p50": None, "p95": None, "p99": None, "count": count}
        if count:
            rising = total.cumsum()
            for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
                at = int(np.searchsorted(rising, share * count))
                out[name] = _FIRST * math.exp((at + 0.5) * _WIDTH)
        return out


@dataclass(slots=True)
class RequestRecord:
    """One request as the page lists it; times in seconds, ``started`` in Unix seconds."""

    id: str
    kind: str
    adapter: str | None
    started: float
    prompt_tokens: int
    cached_tokens: int = 0
    output_tokens: int = 0
    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None
    state: str = "waiting"


@dataclass(slots=True)
class EngineStats:
    """A snapshot; ``as_dict`` has the names of the live snapshot."""

    time: float
    uptime: float
    adapters: list[AdapterInfo]
    running: int
    waiting: int
    max_running: int
    preemptions: int
    kv: dict[str, int]
    prefix: dict[str, int]
    totals: dict[str, int]
    tokens: dict[str, list[int]]
    latency: dict[str, Any]
    slo: dict[str, float]
    step: dict[str, float | int | None]
    recent: list[dict[str, Any]]
    histograms: dict[str, Any]
    jobs: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_PURPOSES = ("decode", "prefill", "score", "train")  # in the order of Purpose
assert [p.name.lower() for p in Purpose] == list(_PURPOSES)


@dataclass(slots=True)
class Counters:
    """Written by the engine's thread alone; read from any."""

    started: float = field(default_factory=time.time)
    ttft: Latency = field(default_factory=lambda: Latency(TTFT_BUCKETS))
    itl: Latency = field(default_factory=lambda: Latency(ITL_BUCKETS))
    e2e: Latency = field(default_factory=lambda: Latency(REQUEST_BUCKETS))
    queue: Latency = field(default_factory=lambda: Latency(REQUEST_BUCKETS))
    step: Latency = field(default_factory=lambda: Latency(ITL_BUCKETS))
    tokens: list[int] = field(default_factory=lambda: [0] * len(_PURPOSES))
    prompt_tokens: int = 0
    backward: float = 0.0  # trained rows that ran backward through all layers
    generated: int = 0  # tokens drawn, the first one after each prefill included
    ends: dict[str, int] = field(
        default_factory=lambda: {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
    )
    requests: int = 0
    recent: deque[RequestRecord] = field(default_factory=lambda: deque(maxlen=RECENT))
    # Tokens of each of the last seconds, by purpose and, last, those that ran backward: a ring
    # whose rows know their second.
    _ring: NDArray[np.float64] = field(
        default_factory=lambda: np.zeros((HISTORY, len(_PURPOSES) + 1))
    )
    _ring_second: list[int] = field(default_factory=lambda: [0] * HISTORY)

    def count_tokens(self, by_purpose: Sequence[int], second: int) -> None:
        """Add the token rows of one step."""
        row = self._row(second)
        for purpose, n in enumerate(by_purpose):
            if n:
                self.tokens[purpose] += n
                self._ring[row, purpose] += n

    def count_backward(self, rows: float, second: int) -> None:
        """Add trained rows that ran backward; of a part of the layers, that part of the rows."""
        self.backward += rows
        self._ring[self._row(second), -1] += rows

    def _row(self, second: int) -> int:
        row = second % HISTORY
        if self._ring_second[row] != second:
            self._ring[row] = 0
            self._ring_second[row] = second
        return row

    def history(self, now: float) -> dict[str, list[int]]:
        """Tokens in each whole second that has passed, oldest first."""
        last = int(now) - 1
        first = max(int(self.started), last - HISTORY + 2)
        seconds = list(range(first, last + 1))
        rows = [s % HISTORY if self._ring_second[s % HISTORY] == s else -1 for s in seconds]
        out: dict[str, list[int]] = {"seconds": seconds}
        for i, name in enumerate((*_PURPOSES, "backward")):
            column = self._ring[:, i]
            out[name] = [round(column[row]) if row >= 0 else 0 for row in rows]
        return out

    def totals(self) -> dict[str, int]:
        named = dict(zip(_PURPOSES, self.tokens, strict=True))
        return named | {
            "backward": round(self.backward),
            "prompt": self.prompt_tokens,
            "generated": self.generated,
            "requests": self.requests,
            **self.ends,
        }

    def latency(self, now: float) -> dict[str, Any]:
        second = int(now)
        return {
            "window": WINDOW,
            "ttft": self.ttft.percentiles(second),
            "itl": self.itl.percentiles(second),
            "e2e": self.e2e.percentiles(second),
            "queue": self.queue.percentiles(second),
        }

    def histograms(self) -> dict[str, Any]:
        return {
            "ttft": self.ttft.histogram(),
            "itl": self.itl.histogram(),
            "e2e": self.e2e.histogram(),
            "queue": self.queue.histogram(),
        }
