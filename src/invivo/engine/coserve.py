"""Fine-tuning in what inference leaves: how much training joins the next iteration. No torch here.

Inference first: the scheduler plans it as if there were no training, and nothing here changes that
plan. Then

    slack = min over requests (when their next token is due) - when the iteration starts - f(plan)

is filled with forward windows, which join the flat batch, and with units of backward, which follow
it. How much fits is found by inverting the latency model with its safety factor. Without any
inference an iteration lasts a quantum, so that an arrival waits at most that long. Jobs take turns
by tokens served over their share. Policies that alternate instead of filling hand whole training
iterations (one text forward and backward) to one job at a time.
"""

from __future__ import annotations

import math
from collections.abc import Container
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

from invivo.engine.closings import Closing, ClosingTimes
from invivo.engine.latency import LatencyModel, Work
from invivo.engine.packing import parts
from invivo.engine.policies import Load, Policy, Slo
from invivo.engine.scheduler import Scheduler
from invivo.engine.types import BackwardUnit, Plan, Purpose, Sequence, Span, Status
from invivo.errors import InvalidRequest

_GATHERED = 0.45  # of the slack that a burst allows, from which training joins
_DEAR = 1.5  # iterations of decodes that beginning to train must cost for slack to be gathered
_LATE = 0.02  # of the promise is left free in addition for each request that was late,
_FIRST_LATE = 0.1  # or more while few requests are over: this for the first,
_FEW = 4.0  # half of it for the fourth, and so on
_MAY_BE_LATE = 0.01  # share of requests, to which the headroom settles
_MOST_HEADROOM = 0.4
_PROBE = 64  # iterations that leave time and yet nothing fits, after which a piece is tried


class Trainee(Protocol):
    """A job that has something to compute, as far as policy must know it.

    Attributes:
        name: of the job; its units bear it.
        share: weight among the jobs, positive.
        seq: the text being learned; its memory and ``n_computed`` (rows planned forward) are kept
            here. A new text is a new sequence.
        n_layers: that a backward goes through.
        cuts_layers: whether a unit may stop between layers.
    """

    @property
    def name(self) -> str: ...
    @property
    def share(self) -> float: ...
    @property
    def seq(self) -> Sequence: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def cuts_layers(self) -> bool: ...

    def next_unit(self, tokens: int, layers: int | None) -> BackwardUnit | None:
        """The unit that must run next, at most that large; None when the backward is done.

        Asked only once the forward is planned to its end. Neither argument makes it smaller by
        growing.
        """
        ...


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of training's pieces.

    Attributes:
        min_window: fewest rows worth a window or a unit (or the text's rest); each costs a start.
        max_unit: most rows of a unit.
        quantum_ms: length of an iteration without inference.
    """

    min_window: int = 16
    max_unit: int = 2048
    quantum_ms: float = 50.0


@dataclass(slots=True)
class _Pace:
    """When a sequence's tokens came: the first, the latest, and how many."""

    first: float
    last: float
    n: int


def servable(policy: Policy) -> Policy:
    """The policy, if an engine can follow it.

    Raises:
        InvalidRequest: only the simulator knows it.
    """
    if policy.simulated:
        raise InvalidRequest(
            "this policy exists in the simulator only",
            field="policy",
            given=policy.name,
            remedy="Serve with co-serve, temporal:N, dynamic-temporal or none; "
            "compare with `invivo simulate`",
        )
    return policy


class Coserver:
    """Plans iterations of inference and training. Used from the scheduler's thread.

    Attributes:
        served: tokens by job: half for a row's forward, half for its backward through all layers.
        closings: how long ends of optimizer steps take.
        headroom: share of the promised time per token that training leaves alone now. It begins
            with the promise's own and follows what became of requests: each that was late adds to
            it, each that was in time takes a hundredth of that away (more after a hundred in a
            row: what made the first ones late, a cold machine say, may be over), so that it settles
            where one in a hundred is late (a quantile found by stochastic approximation).
    """

    def __init__(
        self,
        scheduler: Scheduler,
        latency: LatencyModel,
        slo: Slo,
        policy: Policy,
        *,
        sizes: Sizes | None = None,
    ) -> None:
        """
        Raises:
            InvalidRequest: a policy that only the simulator knows.
        """
        self.scheduler = scheduler
        self.latency = latency
        self.slo = slo
        self.policy = servable(policy)
        self.sizes = sizes or Sizes()
        self.served: dict[str, float] = {}
        self.closings = ClosingTimes()
        self._paces: dict[Sequence, _Pace] = {}
        self.forget_lateness()
        self._gathered = 0  # iterations in a row that waited for more slack
        self._idle = 0  # iterations that left time in which no piece was thought to fit
        self._turn: Sequence | None = None  # the text of a whole training iteration under way
        self._since = 0  # iterations of inference since the last one
        self._iteration = 0.0  # running mean of their predicted seconds
        self._lacks_memory = False  # for the text that was last to begin

    def forget_lateness(self) -> None:
        """Begin with the promise's own headroom again: under another policy, say."""
        self.headroom = self.slo.headroom
        self._judged = 0
        self._in_time = 0  # requests in a row

    def plan(
        self,
        now: float,
        trainees: Items[Trainee],
        *,
        busy_until: float | None = None,
        closings: Items[Closing] = (),
    ) -> Plan | None:
        """The next iteration, committed as by :meth:`Scheduler.schedule`: it must be run.

        Args:
            now: seconds on the clock of ``Request.arrival``.
            trainees: jobs that have work now.
            busy_until: when a step that is still running will be done.
            closings: optimizer steps that wait for their end; those that fit are in
                ``plan.closing`` and run before the flat batch. Policies that alternate are given
                none.

        Returns:
            None when nothing can run.
        """
        start = now if busy_until is None else max(now, busy_until)
        order = self._in_turn(trainees)
        chosen = self._whole_iteration(order)
        if chosen is not None:
            plan = Plan(spans=[])
            self._add(plan, Work(0), chosen, math.inf)
            if plan.spans or plan.backward:
                return plan
        if self.policy.sharing == "fill" and order:
            unit = self._tail(order[0], start)
            if unit is not None:
                plan = Plan(spans=[], backward=[unit])
                self._count(order[0], unit)
                return plan
        inference = self.scheduler.schedule(now, admit=not self._newcomers_wait(order, start))
        if inference is not None:
            self._since += 1
        if self.policy.sharing != "fill" or not (order or closings):
            if inference is not None:
                self._average(self.latency.predict(work_of(inference)))
            return inference
        if inference is None and self.scheduler.has_work:
            return None  # all wait for a token in flight: their next iteration comes first
        plan = inference or Plan(spans=[])
        work = work_of(plan)
        budget = self.budget(plan, work, start)
        budget -= self._close(plan, work, closings, budget, start)
        if plan.spans and self._gathers(work, order, budget):
            return plan
        self._fill(plan, work, order, budget)
        if inference is not None and order:
            self._probe(plan, work, order, budget)
        if not plan.spans and not plan.backward and not plan.closing:
            # The smallest piece outlasts the quantum: nobody is here to mind.
            for trainee in order:
                self._add(plan, work, trainee, math.inf, smallest=True)
                if plan.spans or plan.backward:
                    return plan
            return None
        return plan

    def folded(self, plan: Plan, at: float) -> None:
        """The tokens of ``plan`` have been known since ``at``."""
        paces = self._paces
        for span in plan.spans:
            if not span.samples:
                continue
            pace = paces.get(span.seq)
            if pace is None:
                paces[span.seq] = _Pace(at, at, 1)
            else:
                pace.last, pace.n = at, pace.n + 1
                if span.seq.status is Status.FINISHED:
                    self._judge(paces.pop(span.seq))
        if len(paces) > 64 + 2 * (self.scheduler.n_running + self.scheduler.n_waiting):
            self._paces = {s: p for s, p in paces.items() if s.status is not Status.FINISHED}

    @property
    def pace(self) -> float:
        """Seconds per token that training aims at."""
        return self.slo.tpot_ms * (1 - self.headroom) / 1e3

    def _judge(self, pace: _Pace) -> None:
        """Learn from a request that is over; not beside whole iterations, which no headroom
        shortens."""
        if self.policy.sharing != "fill":
            return
        late = pace.last - pace.first > (pace.n - 1) * self.slo.tpot_ms / 1e3
        gain = max(_LATE, _FIRST_LATE / (1 + self._judged / _FEW))
        self._in_time = 0 if late else self._in_time + 1
        faster = max(1.0, self._in_time * _MAY_BE_LATE)
        step = gain if late else -gain * faster * _MAY_BE_LATE / (1 - _MAY_BE_LATE)
        least = self.slo.headroom
        self.headroom = min(max(self.headroom + step, least), max(_MOST_HEADROOM, least))
        self._judged += 1

    def obstacle(self, start: float) -> str:
        """What keeps training out of the iterations of the requests that are there now, in words
        for whoever waits for it."""
        slo = self.slo
        if self._impatient(start):
            return f"requests wait for their first token ({slo.ttft_ms:g} ms promised, ttft_ms)"
        alone = self.latency.predict(self._next_tokens())
        if alone * self.latency.safety >= self.pace:
            return (
                f"requests alone take about {1e3 * alone:.3g} ms a token "
                f"({slo.tpot_ms:g} promised, tpot_ms); it trains when they pause"
            )
        if self._lacks_memory:
            return "requests hold the memory that its text needs"
        return f"requests leave too little of their time ({slo.tpot_ms:g} ms a token, tpot_ms)"

    def budget(self, plan: Plan, work: Work, start: float) -> float:
        """Seconds that the whole iteration may last, safety included, from ``start`` on.

        ``plan`` holds inference alone, and ``work`` is its work. It is never more than the quantum:
        a first token may be due much later, but need not come late for that.
        """
        quantum = self.sizes.quantum_ms / 1e3
        if not self.scheduler.has_work:
            return quantum
        if self._impatient(start):
            return 0.0
        alone = self.latency.predict(work) * self.latency.safety if plan.spans else 0.0
        planned = {span.seq for span in plan.spans if span.samples}
        return min(self._due(planned, alone, start) - start, quantum)

    def _impatient(self, start: float) -> bool:
        """Whether a request has waited so long that nothing trains until it runs."""
        patience = self.slo.patience * self.slo.ttft_ms / 1e3
        return any(start - seq.request.arrival > patience for seq in self.scheduler.waiting)

    def _due(self, planned: Container[Sequence], alone: float, start: float) -> float:
        """When an iteration that begins at ``start`` must be over.

        Args:
            planned: sequences that get a token by it; all others need one more iteration after it,
                of ``alone`` seconds.
        """
        slo = self.slo
        due = math.inf
        ahead = 0  # rows of prompts that must run before and with the one looked at
        for seq in (*self.scheduler.running, *self.scheduler.waiting):
            in_flight = seq.n_pending - (seq in planned)
            if in_flight and seq not in planned and seq.n_tokens >= seq.limit:
                continue  # its last token is on its way
            pace = self._paces.get(seq)
            if pace is None and in_flight:
                pace = _Pace(start, start, 1)
            elif pace is not None and in_flight:
                pace = _Pace(pace.first, start, pace.n + 1)
            rows = seq.n_tokens - seq.n_computed - (seq in planned)
            if pace is not None:
                mean = pace.first + pace.n * self.pace
                deadline = min(mean, pace.last + slo.burst * self.pace)
                if seq not in planned:
                    deadline -= alone
            else:
                deadline = seq.request.arrival + slo.ttft_ms / 1e3
            if seq not in planned and rows > 1:
                ahead += rows
                deadline -= self._prompts(ahead)
            due = min(due, deadline)
        return due

    def _tail(self, trainee: Trainee, start: float) -> BackwardUnit | None:
        """The rest of the trainee's text, where it can run before the requests' next tokens and
        leave time: beside them it would end the iteration early, and what is left of it would go to
        waste, as the next text comes after it."""
        scheduler, sizes = self.scheduler, self.sizes
        if not scheduler.running or _left(trainee) or self._impatient(start):
            return None
        unit = trainee.next_unit(sizes.max_unit, trainee.n_layers)
        if unit is None or unit.start > 0:
            return None
        layers = unit.last_layer - unit.first_layer
        rest = Work(0).with_backward(unit.stop - unit.start, layers)
        safety = self.latency.safety
        alone = self.latency.predict(self._next_tokens()) * safety
        left = self._due((), alone, start) - start
        return unit if self.latency.predict(rest) * safety <= left else None

    def _close(
        self, plan: Plan, work: Work, closings: Items[Closing], budget: float, start: float
    ) -> float:
        """End the optimizer steps that fit, and one that has waited too long for that (one that
        outlasts every slack would wait for ever); the seconds that this takes."""
        left = budget - (self.latency.predict(work) * self.latency.safety if plan.spans else 0.0)
        patience = self.slo.patience * self.slo.ttft_ms / 1e3
        taken = 0.0
        for closing in closings:
            seconds = self.closings.seconds(closing)
            if taken + seconds <= left or (not taken and start - closing.since > patience):
                plan.closing.append(closing.job)
                taken += seconds
        return taken

    def _gathers(self, work: Work, order: Items[Trainee], budget: float) -> bool:
        """Whether an iteration with inference waits for more slack.

        Where requests may run ahead of their pace, a few iterations without training gather the
        slack of one large piece, whose start is paid once. No more than ``burst`` of them in a row:
        a request that has just begun is ahead of nothing, and where many come and go there is
        always one.
        """
        waits = self._wants_more(work, order, budget)
        self._gathered = self._gathered + 1 if waits else 0
        return waits

    def _wants_more(self, work: Work, order: Items[Trainee], budget: float) -> bool:
        """Whether more slack than ``budget`` would be of use to training beside ``work``.

        Of the time of an iteration with training that lasts T, all is of use but a constant c: its
        start and the decodes in it. Decodes alone take d, and bring p - d of slack at a pace of p.
        Then (1 - d / p) (T - c) / (T - d) of all time is of use, which rises with T where c is
        more than d: elsewhere there is nothing to gather for (and little where they are near).
        """
        burst = self.slo.burst
        if burst == 1 or not order:
            return False
        alone = self.latency.predict(work)
        enough = alone + _GATHERED * (burst * self.pace - alone)
        if budget >= enough or self._gathered >= burst:
            return False
        size = min(len(order[0].seq.tokens), self.sizes.max_unit)
        half, whole = (
            self.latency.predict(work.with_window(0, n).with_backward(n, order[0].n_layers))
            for n in (size // 2, size)
        )
        return 2 * half - whole > _DEAR * alone

    def _newcomers_wait(self, order: Items[Trainee], start: float) -> bool:
        """Whether prompts that have just come wait for the next iteration that trains.

        While slack is gathered, iterations of decodes alone are quick (on a GPU they replay a
        graph), and each that a prompt joins is not; beside training it costs hardly more than its
        rows. A prompt waits no longer than between two tokens of a burst.
        """
        scheduler, slo = self.scheduler, self.slo
        if slo.burst == 1 or not (order and scheduler.running and scheduler.waiting):
            return False
        longest = slo.burst * self.pace
        if any(start - seq.request.arrival > longest for seq in scheduler.waiting):
            return False
        if any(seq.n_tokens - seq.n_computed > 1 for seq in scheduler.running):
            return False  # a prompt is under way: the iteration is a slow one
        work = self._next_tokens()
        budget = min(self._due((), 0.0, start) - start, self.sizes.quantum_ms / 1e3)
        return self._wants_more(work, order, budget)

    def _next_tokens(self) -> Work:
        """An iteration of one token for each running sequence."""
        running = self.scheduler.running
        return Work(len(running), 0, sum(seq.n_tokens for seq in running))

    def _probe(self, plan: Plan, work: Work, order: Items[Trainee], budget: float) -> None:
        """Try the smallest piece where for long none was thought to fit although requests were in
        time: a few slow iterations can have spoiled the prediction of all training, and without
        any training nothing would ever correct it."""
        if plan.backward or any(span.purpose is Purpose.TRAIN for span in plan.spans):
            self._idle = 0
        elif budget > self.latency.predict(work) * self.latency.safety:
            self._idle += 1
            if self._idle >= _PROBE:
                self._idle = 0
                self._add(plan, work, order[0], math.inf, smallest=True)

    # Whose turn it is.

    def _in_turn(self, trainees: Items[Trainee]) -> list[Trainee]:
        """Jobs by tokens served over share; a newcomer starts level with the least served."""
        if not trainees:
            return []
        served = self.served
        names = {trainee.name for trainee in trainees}
        known = [self._level(t) for t in trainees if t.name in served]
        for name in [name for name in served if name not in names]:
            del served[name]  # comes back, if it does, as a newcomer
        level = min(known, default=0.0)
        for trainee in trainees:
            served.setdefault(trainee.name, level * trainee.share)
        return sorted(trainees, key=self._level)

    def _whole_iteration(self, order: Items[Trainee]) -> Trainee | None:
        """The job that has the device for itself, under a policy that alternates."""
        if self.policy.sharing != "alternate" or not order:
            self._turn = None
            return None
        under_way = next((t for t in order if t.seq is self._turn and _has_work(t)), None)
        if under_way is not None:
            return under_way
        if self._turn is not None:
            self._turn, self._since = None, 0
        first = next((t for t in order if _has_work(t)), None)
        if first is None:
            return None
        if self.scheduler.has_work:
            load = Load(
                self.scheduler.n_waiting, self._since, self._iteration, self.seconds_of(first)
            )
            if not self.policy.yields(load, self.slo):
                return None
        self._turn = first.seq
        return first

    def seconds_of(self, trainee: Trainee) -> float:
        """Predicted seconds of a whole micro-step of the trainee's text, alone."""
        rows, length = self.scheduler.limits.max_batch_tokens, len(trainee.seq.tokens)
        total = 0.0
        for start in range(0, length, rows):
            size = min(rows, length - start)
            total += self.latency.predict(_with_window(Work(0), trainee.seq, start, size))
        for start in range(0, length, self.sizes.max_unit):
            size = min(self.sizes.max_unit, length - start)
            total += self.latency.predict(Work(0).with_backward(size, trainee.n_layers))
        return total

    # How much of it.

    def _fill(self, plan: Plan, work: Work, order: Items[Trainee], budget: float) -> None:
        """A piece for each job in turn, until the turn is with one that had its piece already."""
        served: list[Trainee] = []
        for trainee in order:
            if any(self._level(other) < self._level(trainee) for other in served):
                return
            before = work
            work = self._add(plan, work, trainee, budget)
            if work != before:
                served.append(trainee)

    def _level(self, trainee: Trainee) -> float:
        return self.served[trainee.name] / trainee.share

    def _add(
        self, plan: Plan, work: Work, trainee: Trainee, budget: float, *, smallest: bool = False
    ) -> Work:
        """Give the trainee its piece of this iteration, the largest that fits (or the smallest
        worth while); the work with it."""
        seq = trainee.seq
        if _left(trainee):
            work = self._window(plan, work, trainee, budget, smallest=smallest)
            if smallest or _left(trainee) or seq in plan.reclaimed:
                return work  # a trainee learns of lost memory with the plan: its units are stale
        # The backward may begin behind the last window of the same iteration.
        unit = self._unit(work, trainee, budget, smallest=smallest)
        if unit is None:
            return work
        plan.backward.append(unit)
        self._count(trainee, unit)
        return work.with_backward(unit.stop - unit.start, unit.last_layer - unit.first_layer)

    def _count(self, trainee: Trainee, unit: BackwardUnit) -> None:
        layers = unit.last_layer - unit.first_layer
        done = (unit.stop - unit.start) * layers / trainee.n_layers
        self.served[trainee.name] += done / 2

    def _window(
        self, plan: Plan, work: Work, trainee: Trainee, budget: float, *, smallest: bool
    ) -> Work:
        """The trainee's next rows forward, if some fit; the work with them."""
        seq = trainee.seq
        start, left = seq.n_computed, _left(trainee)
        rows = min(left, self.scheduler.limits.max_batch_tokens - plan.n_tokens)
        least = min(left, self.sizes.min_window)
        if smallest:
            rows = min(rows, least)
        size = self.latency.largest(
            lambda n: _with_window(work, seq, start, n), rows, budget, minimum=least
        )
        if not size:
            return work
        if not seq.blocks:
            self._lacks_memory = not self.scheduler.hold(seq, plan)
            if self._lacks_memory:
                return work
        for part in parts(seq.packing, start, start + size):
            window = Span(seq, part.start, part.stop, Purpose.TRAIN, False)
            if seq.packing is not None:
                window.part = part
            plan.spans.insert(len(plan.spans) - plan.n_partial, window)
        plan.n_tokens += size
        seq.n_computed += size
        self.served[trainee.name] += size / 2
        return _with_window(work, seq, start, size)

    def _unit(
        self, work: Work, trainee: Trainee, budget: float, *, smallest: bool
    ) -> BackwardUnit | None:
        """The largest unit that fits: all rows (at most ``max_unit``) through as many layers as
        fit, which reads each weight once for many rows; where not even one layer does, or none may
        be cut, fewer rows."""
        sizes = self.sizes
        if trainee.next_unit(1, None) is None:
            return None
        if smallest:
            return trainee.next_unit(sizes.min_window, 1 if trainee.cuts_layers else None)

        def grown(tokens: int, layers: int | None) -> Work:
            unit = trainee.next_unit(tokens, layers)
            assert unit is not None
            return work.with_backward(unit.stop - unit.start, unit.last_layer - unit.first_layer)

        limit = min(len(trainee.seq.tokens), sizes.max_unit)
        depth = 1 if trainee.cuts_layers else None
        if trainee.cuts_layers:
            layers = self.latency.largest(lambda n: grown(limit, n), trainee.n_layers, budget)
            if layers:
                return trainee.next_unit(limit, layers)
        rows = self.latency.largest(lambda n: grown(n, depth), limit, budget)
        unit = trainee.next_unit(rows, depth) if rows else None
        if unit is None or (unit.stop - unit.start < sizes.min_window and unit.start > 0):
            return None
        return unit

    def _prompts(self, rows: int) -> float:
        """Seconds of the iterations that ``rows`` of prompts take."""
        most = self.scheduler.limits.max_batch_tokens
        whole, rest = divmod(rows, most)
        seconds = whole * self.latency.predict(Work(most)) if whole else 0.0
        if rest:
            seconds += self.latency.predict(Work(rest))
        return seconds * self.latency.safety

    def closes_at_once(self, closing: Closing) -> bool:
        """Whether the end of an optimizer step is so short that it need not be planned: within the
        share of the pace that is left free for what cannot be foreseen."""
        return self.closings.seconds(closing) <= self.slo.headroom * self.slo.tpot_ms / 1e3

    def _average(self, seconds: float) -> None:
        self._iteration += (seconds - self._iteration) / 32 if self._iteration else seconds


def _left(trainee: Trainee) -> int:
    """Rows of its text whose forward is not yet planned."""
    return len(trainee.seq.tokens) - trainee.seq.n_computed


def _with_window(work: Work, seq: Sequence, start: int, size: int) -> Work:
    """``work`` and the window [start, start + size) of a training sequence."""
    for part in parts(seq.packing, start, start + size):
        work = work.with_window(part.start - part.begin, part.stop - part.start)
    return work


def _has_work(trainee: Trainee) -> bool:
    return _left(trainee) > 0 or trainee.next_unit(1, None) is not None


def work_of(plan: Plan) -> Work:
    """What a plan's time depends on."""
    rows = train_rows = context = pairs = 0
    for span in plan.spans:
        size = span.stop - span.start
        rows += size
        if size == 1:
            context += span.first + 1
        else:
            pairs += size * span.first + size * (size + 1) // 2
        if span.purpose is Purpose.TRAIN:
            train_rows += size
    backward = layers = 0
    for unit in plan.backward:
        deep = unit.last_layer - unit.first_layer
        layers += deep
        backward += (unit.stop - unit.start) * deep
    return Work(rows, train_rows, context, pairs, backward, layers)
