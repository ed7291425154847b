"""Serving and fine-tuning without a device: scheduler and policy over a latency model. No torch.

The same :class:`Scheduler` and :class:`Coserver` that the engine runs decide; an iteration takes
what the latency model of a measured profile says, drawn tokens are all zero, and the clock jumps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace

from invivo.engine.coserve import Coserver, Sizes, work_of
from invivo.engine.latency import LatencyModel, Sample
from invivo.engine.policies import Nothing, Policy, Separate, Slo, Spatial
from invivo.engine.scheduler import Limits, Scheduler
from invivo.engine.trace import Arrival
from invivo.engine.types import BackwardUnit, Plan, Request, SamplingParams, Sequence
from invivo.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Training:
    """Jobs that never run out of texts.

    Attributes:
        length: tokens of a micro-step.
        n_layers: that its backward goes through.
        shares: one weight a job.
        cuts_layers: whether a backward may stop between layers.
    """

    length: int = 2048
    n_layers: int = 32
    shares: tuple[float, ...] = (1.0,)
    cuts_layers: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """What a policy made of one load, per device.

    Attributes:
        rate: requests a second.
        in_slo: share of requests whose first token and mean time per further token are in time.
        finetune: fine-tuning tokens a second (forward and backward done) while requests came,
            after the warm-up.
        inference: output tokens a second in that time.
        alone: fine-tuning tokens a second without inference.
        ttft, tpot: seconds at the 50th and 99th percentile.
        preempted: requests that lost their memory to others.
        reclaimed: training texts that lost theirs to requests.
        by_job: fine-tuning tokens of each job.
    """

    policy: str
    rate: float
    requests: int
    in_slo: float
    finetune: float
    inference: float
    alone: float
    ttft: tuple[float, float]
    tpot: tuple[float, float]
    preempted: int = 0
    reclaimed: int = 0
    by_job: tuple[float, ...] = ()


@dataclass(slots=True)
class SimulatedJob:
    """A trainee whose units run by counting."""

    name: str
    share: float
    training: Training
    seq: Sequence = field(init=False)
    row: int = 0  # rows from here on are done for the layers under way
    layer: int = 0
    window: tuple[int, int] = (0, 0)
    texts: int = 0

    def __post_init__(self) -> None:
        self.next_text()

    @property
    def n_layers(self) -> int:
        return self.training.n_layers

    @property
    def cuts_layers(self) -> bool:
        return self.training.cuts_layers

    def next_text(self) -> None:
        length = self.training.length
        request = Request(f"{self.name}/{self.texts}", ())
        self.seq = Sequence(request, 0, [0] * length, length)
        self.texts += 1
        self.begin()

    def begin(self) -> None:
        self.row, self.layer = self.training.length, self.training.n_layers

    def next_unit(self, tokens: int, layers: int | None) -> BackwardUnit | None:
        """As the window trainer's, all layers of the last rows first."""
        if self.row == 0:
            return None
        fresh = self.layer == self.n_layers
        rows = (max(0, self.row - tokens), self.row) if fresh else self.window
        first = 0
        if layers is not None and self.cuts_layers:
            first = max(0, self.layer - layers)
        return BackwardUnit(self.name, *rows, first, self.layer)

    def run(self, unit: BackwardUnit) -> None:
        assert unit.last_layer == self.layer
        self.window, self.layer = (unit.start, unit.stop), unit.first_layer
        if self.layer == 0:
            self.row, self.layer = unit.start, self.n_layers


@dataclass(slots=True)
class _Served:
    """A request in the simulator: when it came, when its first and its last token did."""

    arrival: Arrival
    first: float = 0.0
    last: float = 0.0


def simulate(
    arrivals: Items[Arrival],
    policy: Policy,
    profile: Items[Sample],
    *,
    slo: Slo | None = None,
    limits: Limits | None = None,
    training: Training | None = None,
    sizes: Sizes | None = None,
    noise: float = 0.0,
    seed: int = 0,
    warm: float = 0.0,
) -> Result:
    """Run a load through a policy to its last token.

    Args:
        arrivals: in order of time.
        profile: iteration times; the policy's model starts from it too and learns.
        limits: of the engine; its cache and rows.
        noise: relative scatter of real iteration times (uniform, to either side).
        warm: seconds at the beginning of which no tokens are counted: until as many requests leave
            as come, an empty machine has more to spare than it will have.

    Raises:
        InvalidRequest: no arrivals, none after the warm-up, or one that can never fit the limits.
    """
    if not arrivals:
        raise InvalidRequest("no request comes", field="trace")
    if not 0 <= warm < max(arrivals[-1].at, 1e-9):
        raise InvalidRequest(
            "no request comes after the warm-up", field="warm", given=warm, remedy="Make it shorter"
        )
    slo, training = slo or Slo(), training or Training()
    limits = limits or simulated_limits()
    rate = len(arrivals) / max(arrivals[-1].at - arrivals[0].at, 1e-9)
    machine = LatencyModel(profile)
    alone = _alone(machine, limits, training, sizes or Sizes())
    if isinstance(policy, Spatial):
        run = _Run(arrivals, Nothing(), machine, profile, slo, limits, training, sizes, warm)
        run.slowdown = policy.slowdown
        result = run.result(policy.name, rate, alone, noise, seed)
        busy = min(run.busy / run.counted, 1.0)
        left = 1 - busy + busy * (1 - 1 / policy.slowdown)
        return replace(result, finetune=alone * left)
    if isinstance(policy, Separate):
        # Fewer devices serve, so each of them sees requests more often.
        denser = [replace(a, at=a.at * policy.inference) for a in arrivals]
        run = _Run(
            denser,
            Nothing(),
            machine,
            profile,
            slo,
            limits,
            training,
            sizes,
            warm * policy.inference,
        )
        result = run.result(policy.name, rate, alone, noise, seed)
        share = policy.inference
        return replace(result, finetune=alone * (1 - share), inference=result.inference * share)
    run = _Run(arrivals, policy, machine, profile, slo, limits, training, sizes, warm)
    return run.result(policy.name, rate, alone, noise, seed)


def simulated_limits(
    *, n_tokens: int = 400_000, max_batch_tokens: int = 2048, max_running: int = 256
) -> Limits:
    """Limits of a simulated engine whose cache holds ``n_tokens``."""
    return Limits(
        n_blocks=n_tokens // 16 + 1,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        max_length=32_768,
        max_training=8,
        prefix_cache=False,
    )


class _Run:
    """One simulation, used once."""

    def __init__(
        self,
        arrivals: Items[Arrival],
        policy: Policy,
        machine: LatencyModel,
        profile: Items[Sample],
        slo: Slo,
        limits: Limits,
        training: Training,
        sizes: Sizes | None,
        warm: float,
    ) -> None:
        self.slo = slo
        self.machine = machine
        self.slowdown = 1.0
        self.now = 0.0
        self.horizon = arrivals[-1].at
        self.warm = warm
        self.busy = 0.0  # seconds of iterations that began between warm-up and last arrival
        self.scheduler = Scheduler(limits)
        self.coserver = Coserver(self.scheduler, LatencyModel(profile), slo, policy, sizes=sizes)
        self.jobs = [
            SimulatedJob(f"job-{i}", share, training) for i, share in enumerate(training.shares)
        ]
        self.trained = [0.0] * len(self.jobs)  # tokens, in that time
        self.drawn = 0  # tokens, in that time
        self._arrivals = list(arrivals)
        self._came = 0
        self._served: dict[Sequence, _Served] = {}

    @property
    def counted(self) -> float:
        """Seconds."""
        return max(self.horizon - self.warm, 1e-9)

    def result(self, name: str, rate: float, alone: float, noise: float, seed: int) -> Result:
        rng = random.Random(seed)
        while self._came < len(self._arrivals) or self.scheduler.has_work:
            self._take_in()
            plan = self.coserver.plan(self.now, self.jobs)
            if plan is None:
                assert not self.scheduler.has_work
                self.now = self._arrivals[self._came].at
                continue
            self._iterate(plan, 1 + noise * rng.uniform(-1, 1))
        return self._summary(name, rate, alone)

    def _take_in(self) -> None:
        while self._came < len(self._arrivals) and self._arrivals[self._came].at <= self.now:
            arrival = self._arrivals[self._came]
            request = Request(
                id=str(self._came),
                tokens=(),
                params=SamplingParams(max_tokens=arrival.response),
                arrival=arrival.at,
            )
            seq = Sequence(request, 0, [0] * arrival.prompt, arrival.prompt)
            self.scheduler.add(seq)
            self._served[seq] = _Served(arrival)
            self._came += 1

    def _iterate(self, plan: Plan, factor: float) -> None:
        work = work_of(plan)
        seconds = self.machine.predict(work) * factor * self.slowdown
        counts = self.warm <= self.now < self.horizon
        self.now += seconds
        self.busy += seconds * counts
        self.coserver.latency.record(work, seconds)
        for span in plan.spans:
            if span.samples:
                served = self._served[span.seq]
                served.first = served.first or self.now
                served.last = self.now
                self.drawn += counts
                self.scheduler.record(span.seq, 0)
                if len(span.seq.tokens) == span.seq.limit:
                    self.scheduler.finish(span.seq)
        self.coserver.folded(plan, self.now)
        self._train(plan, counts=counts)

    def _train(self, plan: Plan, *, counts: bool) -> None:
        jobs = {job.name: (i, job) for i, job in enumerate(self.jobs)}
        for _, job in jobs.values():
            if job.seq in plan.held or job.seq in plan.reclaimed:
                job.begin()
        for span in plan.spans:
            for i, job in jobs.values():
                if span.seq is job.seq and counts:
                    self.trained[i] += (span.stop - span.start) / 2
        for unit in plan.backward:
            i, job = jobs[unit.job]
            job.run(unit)
            if counts:
                layers = (unit.last_layer - unit.first_layer) / job.n_layers
                self.trained[i] += (unit.stop - unit.start) * layers / 2
            if job.row == 0:
                self.scheduler.let_go(job.seq)
                job.next_text()

    def _summary(self, name: str, rate: float, alone: float) -> Result:
        slo = self.slo
        ttft, tpot = [], []
        good = 0
        for served in self._served.values():
            first = served.first - served.arrival.at
            each = (served.last - served.first) / max(served.arrival.response - 1, 1)
            ttft.append(first)
            tpot.append(each)
            good += first <= slo.ttft_ms / 1e3 and each <= slo.tpot_ms / 1e3
        n = len(self._served)
        return Result(
            policy=name,
            rate=rate,
            requests=n,
            in_slo=good / n,
            finetune=sum(self.trained) / self.counted,
            inference=self.drawn / self.counted,
            alone=alone,
            ttft=(_percentile(ttft, 0.5), _percentile(ttft, 0.99)),
            tpot=(_percentile(tpot, 0.5), _percentile(tpot, 0.99)),
            preempted=self.scheduler.n_preemptions,
            reclaimed=self.scheduler.n_reclaimed,
            by_job=tuple(self.trained),
        )


def _alone(machine: LatencyModel, limits: Limits, training: Training, sizes: Sizes) -> float:
    """Fine-tuning tokens a second of a device that does nothing else."""
    job = SimulatedJob("alone", 1.0, training)
    coserver = Coserver(Scheduler(limits), machine, Slo(), Nothing(), sizes=sizes)
    return training.length / coserver.seconds_of(job)


def _percentile(values: list[float], q: float) -> float:
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]
