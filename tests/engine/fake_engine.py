"""A scheduler with a model that only remembers: what stands in each cell of the cache.

The cell of token i of a sequence holds the whole prefix that its keys would depend on, so a wrong
or stale block shows as a wrong prefix; so does a wrong state of recurrent layers. Drawn tokens
depend on (sequence, position) alone, as seeded sampling does; they become known to the scheduler
``lag`` steps late.
"""

from __future__ import annotations

from collections import deque

from invivo.engine.scheduler import Limits, Scheduler
from invivo.engine.types import Plan, Purpose, Request, SamplingParams, Sequence, Status


def request_of(
    id: str, tokens: list[int], *, max_tokens: int | None = 4, prompt_logprobs: bool = False, **more
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if prompt_logprobs else None)
    return Request(id=id, tokens=tuple(tokens), params=params, **more)


def sequences_of(request: Request, *, adapter_slot: int = 0, grammar: bool = False):
    return [
        Sequence(
            request,
            index,
            list(request.tokens),
            len(request.tokens),
            adapter_slot=adapter_slot,
            adapter_version=adapter_slot,
            needs_host_token=grammar,
        )
        for index in range(request.n)
    ]


def drawn(seq: Sequence, position: int) -> int:
    """The token that this sequence draws at ``position``, whatever happens around it."""
    return (ord(seq.request.id[0]) + 3 * seq.index + 7 * position) % 5


class FakeEngine:
    """Runs plans and checks everything that must hold of them.

    Attributes:
        plans: launched and not yet folded.
        computed: prompt and output tokens that went through the model, by sequence.
        starved: plans in a row without a span of the best-ranked running sequence.
    """

    def __init__(self, limits: Limits, lag: int = 0) -> None:
        self.scheduler = Scheduler(limits)
        self.limits = limits
        self.lag = lag
        self.plans: deque[Plan] = deque()
        self.cells: dict[int, tuple[object, ...]] = {}
        self.states: dict[int, object] = {}  # of recurrent layers, by slot
        self.live: dict[str, list[Sequence]] = {}
        self.ended: list[Sequence] = []
        self.computed: dict[Sequence, int] = {}
        self.covered: dict[Sequence, set[int]] = {}

    # --- what a user does
    def add(self, request: Request, **more) -> list[Sequence]:
        seqs = sequences_of(request, **more)
        for seq in seqs:
            self.scheduler.add(seq)
        self.live[request.id] = list(seqs)
        return seqs

    def abort(self, request_id: str) -> None:
        ended = self.scheduler.abort(request_id)
        assert {seq.index for seq in ended} == {seq.index for seq in self.live.pop(request_id)}
        self.ended += ended

    # --- one iteration
    def step(self) -> Plan | None:
        ready = self._oldest_ready()
        plan = self.scheduler.schedule(0.0)
        if plan is not None:
            self._check(plan)
            if ready is not None:
                assert any(span.seq is ready for span in plan.spans), "the oldest was passed over"
            self._launch(plan)
            self.plans.append(plan)
        else:
            assert ready is None
        while len(self.plans) > (self.lag if plan is not None else 0):
            self._fold(self.plans.popleft())
        self.check_memory()
        return plan

    def run(self, max_steps: int = 3000) -> int:
        """Step until everything has ended; returns the number of steps."""
        for n in range(max_steps):
            if not self.scheduler.has_work and not self.plans:
                return n
            self.step()
        raise AssertionError(f"requests did not end in {max_steps} steps")

    def fail_next(self) -> None:
        """Schedule a plan, and let it and those in flight fail."""
        plan = self.scheduler.schedule(0.0)
        self.plans += [plan] if plan is not None else []
        while self.plans:
            failed = self.plans.popleft()
            for seq in self.scheduler.failed(failed):
                self._forget(seq)
        self.check_memory()

    def _oldest_ready(self) -> Sequence | None:
        """The best-ranked running sequence, if it has a token to compute right now."""
        if not self.scheduler.running:
            return None
        seq = self.scheduler.running[0]
        lacks = seq.n_tokens - seq.n_computed
        waits = seq.n_pending and seq.needs_host_token
        return seq if lacks and not waits and seq.n_tokens < seq.limit else None

    def _check(self, plan: Plan) -> None:
        limits, spans = self.limits, plan.spans
        sizes = [span.stop - span.start for span in spans]
        assert all(size >= 1 for size in sizes)
        assert plan.n_tokens == sum(sizes) <= limits.max_batch_tokens
        assert [size == 1 for size in sizes] == [i < plan.n_decode for i in range(len(sizes))]
        seqs = [span.seq for span in spans]
        assert len(set(seqs)) == len(seqs)
        assert all(seq.status is Status.RUNNING for seq in seqs)
        running = self.scheduler.running
        assert len(running) <= limits.max_running
        assert sorted({seq.row for seq in running}) == sorted(seq.row for seq in running)
        assert all(0 <= seq.row < limits.max_running for seq in running)
        assert [s.rank for s in running] == sorted(s.rank for s in running)
        waiting = self.scheduler.waiting
        assert [s.rank for s in waiting] == sorted(s.rank for s in waiting)
        if limits.max_adapters is not None:
            slots = {seq.adapter_slot for seq in running if seq.adapter_slot}
            assert len(slots) <= limits.max_adapters
        # Who lost its memory may be back at once, where most of it is shared with others.
        assert set(plan.preempted) & set(seqs) <= set(plan.admitted)

    def _launch(self, plan: Plan) -> None:
        size = self.limits.block_size
        prefixes = {}
        for seq in plan.admitted:
            self.states[seq.row + 1] = hash(seq.namespace)
        self._copy_states(plan.restored)
        for span in plan.spans:
            seq = span.seq
            tokens = list(seq.tokens)
            before = seq.n_pending - span.samples  # drawn earlier, not folded in yet
            tokens += [drawn(seq, len(tokens) + i) for i in range(before)]
            assert span.stop <= len(tokens)
            assert span.stop == seq.n_computed
            assert span.samples == (seq.request.kind == "generate" and span.stop == len(tokens))
            if seq.request.kind != "generate":
                assert span.purpose is Purpose.SCORE
            elif span.start >= seq.n_prompt and span.samples and span.stop - span.start == 1:
                assert span.purpose is Purpose.DECODE
            else:
                assert span.purpose is Purpose.PREFILL
            prefix = hash(seq.namespace)
            prefixes[seq] = [prefix := hash((prefix, token)) for token in tokens]
            if self.limits.recurrent:
                before = prefixes[seq][span.start - 1] if span.start else hash(seq.namespace)
                assert self.states[seq.row + 1] == before, "another prefix's state"
                self.states[seq.row + 1] = prefixes[seq][span.stop - 1]
            for i in range(span.start, span.stop):
                cell = seq.blocks[i // size] * size + i % size
                assert cell >= size, "scratch block used"
                self.cells[cell] = prefixes[seq][i]
            self.computed[seq] = self.computed.get(seq, 0) + span.stop - span.start
            self.covered.setdefault(seq, set()).update(range(span.start, span.stop))
        # All keys are stored before anything reads: every span must see its whole prefix.
        for span in plan.spans:
            for i in range(span.stop):
                cell = span.seq.blocks[i // size] * size + i % size
                assert self.cells[cell] == prefixes[span.seq][i], "wrong or stale cache content"
        self._copy_states(plan.saved)

    def _copy_states(self, pairs: list[tuple[int, int]]) -> None:
        targets = [target for _, target in pairs]
        assert len(set(targets)) == len(targets), "a slot is written twice"
        assert all(0 < target < self.limits.n_state_slots for target in targets)
        self.states |= {target: self.states[source] for source, target in pairs}

    def _fold(self, plan: Plan) -> None:
        for span in plan.spans:
            seq = span.seq
            if span.samples:
                position = len(seq.tokens)
                alive = self.scheduler.record(seq, drawn(seq, position))
                assert alive == (seq.status is not Status.FINISHED)
                if alive and len(seq.tokens) == seq.limit:
                    self._finish(seq)
            elif (
                span.purpose is Purpose.SCORE
                and span.stop == seq.n_prompt
                and seq.status is not Status.FINISHED
            ):
                self._finish(seq)

    def _finish(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        self.scheduler.finish(seq)  # harmless
        self._forget(seq)

    def _forget(self, seq: Sequence) -> None:
        assert seq.status is Status.FINISHED
        self.ended.append(seq)
        siblings = self.live[seq.request.id]
        siblings.remove(seq)
        if not siblings:
            del self.live[seq.request.id]

    # --- what must hold between iterations
    def check_memory(self) -> None:
        pool, running = self.scheduler.pool, self.scheduler.running
        free = pool.free_list()
        assert len(set(free)) == len(free) == pool.n_free
        assert pool.n_free + pool.count_in_use() == pool.n_total
        counts = [0] * pool.n_blocks
        for seq in running:
            assert len(set(seq.blocks)) == len(seq.blocks)
            assert len(seq.blocks) * self.limits.block_size >= seq.n_computed
            for block in seq.blocks:
                counts[block] += 1
        for seq in self.scheduler.training:
            assert len(seq.blocks) * self.limits.block_size >= len(seq.tokens)
            for block in seq.blocks:
                counts[block] += 1
        assert counts == [pool.references(block) for block in range(pool.n_blocks)]
        for seq in self.scheduler.waiting:
            assert (seq.blocks, seq.row, seq.n_computed) == ([], -1, 0)

    def check_empty(self) -> None:
        """Nothing runs and every block, row and adapter place is back."""
        scheduler = self.scheduler
        assert not scheduler.has_work
        assert scheduler.blocks_used == 0
        if scheduler.snapshots is not None:
            named = len(scheduler.snapshots._known) + len(scheduler.snapshots._fresh)
            assert scheduler.snapshots.n_used == named, "a slot is lost"
        assert sorted(scheduler._free_rows) == list(range(self.limits.max_running))
        assert scheduler._adapter_users == {}
        assert scheduler._live == {}
        assert self.live == {}
