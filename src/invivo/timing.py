"""How long answers take: first token, time between tokens, throughput. Seconds throughout.

Used by ``invivo bench`` and the demo; written against :class:`invivo.lm.LM`'s streams alone, so
that a model in this process and one behind HTTP are measured by the same code.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

from invivo.lm import Delta


@dataclass(slots=True)
class Timing:
    """One request as its client saw it; times are ``time.perf_counter()``."""

    started: float
    first: float | None = None
    ended: float | None = None
    tokens: int = 0
    text: str = ""
    finish_reason: str | None = None

    @property
    def ttft(self) -> float | None:
        """Time to the first token."""
        return None if self.first is None else self.first - self.started

    @property
    def tpot(self) -> float | None:
        """Mean time of a token after the first."""
        if self.first is None or self.ended is None or self.tokens < 2:
            return None
        return (self.ended - self.first) / (self.tokens - 1)


@dataclass(slots=True)
class Summary:
    """Many requests together; ``tokens_per_second`` is over the wall time of all of them."""

    requests: int
    output_tokens: int
    seconds: float
    ttft_p50: float | None
    ttft_p95: float | None
    tpot_p50: float | None
    tpot_p95: float | None
    tokens_per_second: float = field(default=0.0)


async def time_stream(deltas: AsyncIterator[Delta]) -> Timing:
    """Read a stream of one choice to its end and note when its tokens came."""
    timing = Timing(started=time.perf_counter())
    parts: list[str] = []
    async for delta in deltas:
        now = time.perf_counter()
        if delta.tokens:
            if timing.first is None:
                timing.first = now
            timing.ended = now
        timing.tokens += len(delta.tokens)
        parts.append(delta.text)
        timing.finish_reason = delta.finish_reason or timing.finish_reason
    timing.text = "".join(parts)
    if timing.ended is None:
        timing.ended = time.perf_counter()
    return timing


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between the nearest ranks; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(timings: Iterable[Timing]) -> Summary:
    """Percentiles over requests and throughput over the time from first start to last end."""
    done = list(timings)
    ttft = [t.ttft for t in done if t.ttft is not None]
    tpot = [t.tpot for t in done if t.tpot is not None]
    ends = [t.ended for t in done if t.ended is not None]
    seconds = max(ends) - min(t.started for t in done) if ends else 0.0
    tokens = sum(t.tokens for t in done)
    return Summary(
        requests=len(done),
        output_tokens=tokens,
        seconds=seconds,
        ttft_p50=percentile(ttft, 50),
        ttft_p95=percentile(ttft, 95),
        tpot_p50=percentile(tpot, 50),
        tpot_p95=percentile(tpot, 95),
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
    )
