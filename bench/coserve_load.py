"""A load of requests on an engine that trains beside them, and what both got."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from invivo.engine.engine import Engine
from invivo.engine.job_spec import Text
from invivo.engine.trace import Arrival
from invivo.engine.types import Output, Request, SamplingParams

ENOUGH = 64  # tokens by which the pace of a request that was cut off is judged


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal number of tokens, cut to [least, most]."""

    log_mean: float
    log_sd: float
    least: int
    most: int

    def draw(self, rng: random.Random) -> int:
        return min(
            self.most, max(self.least, round(rng.lognormvariate(self.log_mean, self.log_sd)))
        )


@dataclass
class RandomTexts:
    """Random token ids without end; what they say does not matter to their speed."""

    vocab_size: int
    shortest: int
    longest: int
    at: int = 0

    def next(self) -> Text:
        rng = random.Random(self.at)
        self.at += 1
        n = rng.randint(self.shortest, self.longest)
        tokens = [rng.randrange(self.vocab_size) for _ in range(n)]
        return Text(tokens, [*tokens[1:], -100])

    def position(self) -> Any:
        return self.at

    def seek(self, position: Any) -> None:
        self.at = position


@dataclass(slots=True)
class Served:
    """A request and when its tokens came, seconds from the start of the measurement."""

    arrival: Arrival
    counts: bool
    times: list[float] = field(default_factory=list)
    ended: bool = False
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        return self.times[0] - self.arrival.at if self.times else None

    @property
    def tpot(self) -> float | None:
        n = len(self.times) - 1
        return (self.times[-1] - self.times[0]) / n if n > 0 else None


@dataclass(slots=True)
class Point:
    """What one policy made of one load.

    Attributes:
        rate: requests a second; 0 = none.
        in_slo: share of judged requests whose first token and mean time per further token are in
            time; None without requests.
        finetune: fine-tuning tokens a second: half for a token's forward, half for its backward.
        restarts: texts that began anew, whose first attempt counts above all the same.
        inference: output tokens a second.
        ttft, tpot: seconds at the 50th, 95th and 99th percentile.
        longest_gap: seconds between two tokens of a request, the 99th percentile.
        prediction: real over predicted time of iterations, 5th, 50th and 95th percentile.
    """

    policy: str
    rate: float
    round: int
    seconds: float
    requests: int
    judged: int
    in_slo: float | None
    finetune: float
    texts: int
    restarts: int
    inference: float
    ttft: list[float]
    tpot: list[float]
    longest_gap: list[float]
    prediction: list[float]
    preemptions: int
    errors: list[str] = field(default_factory=list)


def equilibrium(
    rate: float, prompt: Lengths, answer: Lengths, residence: float, at: float, seed: int
) -> list[Arrival]:
    """What is being answered at a moment of a load that has long been going on.

    Args:
        residence: seconds a token that a request is expected to stay.
        at: when they are submitted.
    """
    rng = random.Random(seed)
    drawn = [answer.draw(rng) for _ in range(2000)]
    n = round(rate * residence * sum(drawn) / len(drawn))
    # A long answer is met more often than a short one, somewhere within.
    met = rng.choices(drawn, weights=drawn, k=n)
    return [Arrival(at, prompt.draw(rng), max(1, round(rng.random() * each))) for each in met]


def serve(
    engine: Engine,
    arrivals: Sequence[Arrival],
    *,
    policy: str,
    rate: float,
    seconds: float,
    tpot: float,
    ttft: float,
    drain: bool,
    number: int = 0,
) -> Point:
    """Serve ``arrivals`` (those before 0 to warm up, not judged) and measure over [0, seconds].

    Args:
        tpot, ttft: the promise, seconds.
        drain: wait for all answers; otherwise what is left at the end is cut off, and judged if
            it has ENOUGH tokens.
    """
    # Of their own for every point: else all but the first would find them in the prefix cache.
    rng = random.Random(f"{policy}-{rate:g}-{number}")
    vocabulary = engine.model.config.vocab_size
    prompts = [tuple(rng.randrange(vocabulary) for _ in range(a.prompt)) for a in arrivals]
    served = [Served(arrival, arrival.at >= 0) for arrival in arrivals]
    first = min((a.at for a in arrivals), default=0.0)
    start = time.monotonic() - min(first, 0.0)
    begun: tuple[float, float, int, int] | None = None
    came = preempted = 0
    while True:
        now = time.monotonic() - start
        if begun is None and now >= 0:
            begun = progress(engine)
            preempted = engine.stats().preemptions
            zero = now
        while came < len(arrivals) and arrivals[came].at <= now:
            submit(engine, served[came], prompts[came], f"{policy}-{rate}-{number}-{came}", start)
            came += 1
        if now >= seconds:  # everybody has come: arrivals end before
            break
        if not engine.step():
            time.sleep(0.0005)
    assert begun is not None
    length = now - zero
    done = [after - before for after, before in zip(progress(engine), begun, strict=True)]
    preempted = engine.stats().preemptions - preempted
    drawn = sum(sum(t >= 0 for t in one.times) for one in served)
    if drain:
        while not all(one.ended for one in served):
            engine.step()
    for i, one in enumerate(served):
        if not one.ended:
            engine.abort(f"{policy}-{rate}-{number}-{i}")
    while not all(one.ended for one in served[:came]):
        engine.step()
    counted = [one for one in served if one.counts]
    verdicts = [v for one in counted if (v := verdict(one, seconds, tpot, ttft)) is not None]
    model = engine.latency_model
    gaps = [b - a for one in counted for a, b in pairwise(one.times)]
    return Point(
        policy=policy,
        rate=rate,
        round=number,
        seconds=length,
        requests=len(counted),
        judged=len(verdicts),
        in_slo=sum(verdicts) / len(verdicts) if verdicts else None,
        finetune=(done[0] + done[1]) / 2 / length,
        texts=int(done[2]),
        restarts=int(done[3]),
        inference=drawn / length,
        ttft=percentiles([one.ttft for one in counted if one.ttft is not None]),
        tpot=percentiles([one.tpot for one in counted if one.tpot is not None]),
        longest_gap=percentiles(gaps),
        prediction=[] if model is None else percentiles(model.ratios, (0.05, 0.5, 0.95)),
        preemptions=preempted,
        errors=[one.error for one in counted if one.error is not None][:5],
    )


def submit(engine: Engine, one: Served, prompt: tuple[int, ...], name: str, start: float) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=one.arrival.response, ignore_eos=True)
    request = Request(id=name, tokens=prompt, params=params, arrival=start + one.arrival.at)
    engine.submit(request, partial(listen, one, start))


def listen(one: Served, start: float, output: Output) -> None:
    now = time.monotonic() - start
    one.times.extend([now] * len(output.tokens))
    one.ended = one.ended or output.final
    if output.error is not None:
        one.error = str(output.error)


def verdict(one: Served, end: float, tpot: float, ttft: float) -> bool | None:
    """Whether the promise was kept; None where too little is known."""
    if one.error is not None:
        return False
    if one.ttft is None:
        return False if end - one.arrival.at > ttft else None
    if one.ttft > ttft:
        return False
    n = len(one.times)
    if n < min(one.arrival.response, ENOUGH):
        return None
    return one.tpot is None or one.tpot <= tpot


def progress(engine: Engine) -> tuple[float, float, int, int]:
    """Rows run forward and backward, optimizer steps, and restarts of all live jobs."""
    jobs = [job for job in engine.stats().jobs if job["state"] == "running"]
    return (
        sum(job["forward_tokens"] for job in jobs),
        sum(job["backward_tokens"] for job in jobs),
        sum(job["step"] for job in jobs),
        sum(job["restarts"] for job in jobs),
    )


def percentiles(values: Sequence[float], at: Sequence[float] = (0.5, 0.95, 0.99)) -> list[float]:
    ordered = sorted(values)
    return [round(ordered[min(int(q * len(ordered)), len(ordered) - 1)], 5) for q in at if ordered]
