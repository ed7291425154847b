"""Policy: order, budgets, sharing, preemption, and that everything ends."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)
from tests.engine.fake_engine import FakeEngine, drawn, request_of, sequences_of

from invivo.engine.scheduler import Limits, Scheduler
from invivo.engine.types import Purpose, Status
from invivo.errors import InvalidRequest


def limits_of(**changes) -> Limits:
    sizes = {
        "n_blocks": 65,
        "block_size": 4,
        "max_batch_tokens": 32,
        "max_running": 8,
        "max_length": 128,
    }
    return Limits(**(sizes | changes))


def test_a_request_runs_to_its_limit() -> None:
    engine = FakeEngine(limits_of())
    (seq,) = engine.add(request_of("a", [1, 2, 3, 4, 5], max_tokens=6))
    assert engine.run() == 6
    assert seq.tokens == [1, 2, 3, 4, 5, *(drawn(seq, i) for i in range(5, 11))]
    engine.check_empty()


def test_a_step_behind_the_device_no_extra_token_is_planned_at_the_limit() -> None:
    engine = FakeEngine(limits_of(), lag=1)
    (seq,) = engine.add(request_of("a", [1, 2, 3], max_tokens=5))
    engine.run()
    assert engine.computed[seq] == 7
    engine.check_empty()


def test_decodes_come_first_then_running_prefills_then_admissions() -> None:
    engine = FakeEngine(limits_of(max_batch_tokens=16))
    (decode,) = engine.add(request_of("d", [1, 2], max_tokens=20))
    engine.step()
    (long,) = engine.add(request_of("l", [3] * 40))
    engine.step()
    (late,) = engine.add(request_of("z", [4] * 10))
    plan = engine.step()
    assert [(s.seq, s.purpose) for s in plan.spans] == [
        (decode, Purpose.DECODE),
        (long, Purpose.PREFILL),
    ]
    assert plan.n_tokens == 16
    plan = engine.step()
    assert [(s.seq, s.stop - s.start) for s in plan.spans] == [(decode, 1), (long, 10), (late, 5)]


def test_priority_goes_before_arrival_and_arrival_before_queueing() -> None:
    engine = FakeEngine(limits_of(max_running=1, max_batch_tokens=8))
    ids = ["c", "b", "a", "d"]
    places = [(1, 0.0), (0, 2.0), (0, 1.0), (1, 0.0)]
    for id, (priority, arrival) in zip(ids, places, strict=True):
        engine.add(request_of(id, [1, 2, 3], priority=priority, arrival=arrival))
    engine.run()
    assert [seq.request.id for seq in engine.ended] == ["a", "b", "c", "d"]


def test_a_long_prompt_moves_while_every_other_row_decodes() -> None:
    engine = FakeEngine(limits_of(max_batch_tokens=9, n_blocks=200))
    for i in range(7):
        engine.add(request_of(str(i), [i], max_tokens=100))
    engine.step()
    (long,) = engine.add(request_of("l", [1] * 50, max_tokens=1))
    for _ in range(30):
        before = long.n_computed
        engine.step()
        assert long.status is Status.FINISHED or long.n_computed >= before + 2


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones() -> None:
    engine = FakeEngine(limits_of(n_blocks=17, max_length=64))
    rng = random.Random(0)
    for step in range(200):
        if step == 20:
            (large,) = engine.add(request_of("L", [1] * 55, max_tokens=5, arrival=step))
        tokens = [rng.randrange(9) for _ in range(8)]
        engine.add(request_of(f"{step:03}", tokens, max_tokens=8, arrival=step))
        engine.step()
        if step > 20 and large.status is Status.FINISHED:
            break
    assert large.status is Status.FINISHED
    assert step < 120
    engine.run()
    engine.check_empty()


@pytest.mark.parametrize("lag", [0, 1])
def test_preempted_sequences_keep_their_tokens_and_end_in_order(lag: int) -> None:
    engine = FakeEngine(limits_of(n_blocks=11, max_running=4), lag=lag)
    seqs = [
        engine.add(request_of(id, [i] * 6, max_tokens=20, arrival=i))[0]
        for i, id in enumerate("abcd")
    ]
    engine.run()
    assert engine.scheduler.n_preemptions > 0
    assert seqs[0].n_preempted == 0
    for seq in seqs:
        assert seq.tokens[6:] == [drawn(seq, i) for i in range(6, 26)]
    engine.check_empty()


def test_a_victim_that_shares_its_blocks_is_back_with_the_same_plan() -> None:
    engine = FakeEngine(
        limits_of(n_blocks=8, block_size=3, max_running=2, max_batch_tokens=3, max_length=40)
    )
    rng = random.Random(2418)
    back = 0
    for arrival, n in enumerate((3, 1)):
        tokens = [rng.randint(0, 1) for _ in range(rng.randint(1, 12))]
        most = rng.choice([None, *range(1, 10)])
        engine.add(request_of("ab"[arrival], tokens, max_tokens=most, n=n, arrival=float(arrival)))
    while engine.scheduler.has_work:
        plan = engine.step()
        assert plan is not None
        back += bool(set(plan.preempted) & set(plan.admitted))
    assert back > 0
    engine.check_empty()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (request_of("a", [1] * 30, max_tokens=20), "max_tokens"),
        (request_of("a", [1] * 41, max_tokens=None), "prompt"),
        (request_of("a", [1] * 41, kind="score"), "prompt"),
        (request_of("a", [1] * 41, kind="embed"), "prompt"),
    ],
)
def test_what_can_never_fit_is_refused_by_field(request_, field: str) -> None:
    scheduler = Scheduler(limits_of(n_blocks=11))
    (seq,) = sequences_of(request_)
    with pytest.raises(InvalidRequest) as error:
        scheduler.add(seq)
    assert error.value.field == field
    assert error.value.remedy
    assert not scheduler.has_work


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    "request_",
    [
        request_of("a", [1] * 21, max_tokens=20),
        request_of("a", [1] * 40, max_tokens=1),
        request_of("a", [1] * 3, max_tokens=None),
        request_of("a", [1] * 40, kind="score"),
    ],
)
def test_what_just_fits_ends(request_, lag: int) -> None:
    engine = FakeEngine(limits_of(n_blocks=11), lag=lag)
    engine.add(request_)
    engine.add(request_of("b", [2] * 9))
    engine.run()
    assert len(engine.ended) == 2
    engine.check_empty()


def test_budgets_that_could_starve_a_prefill_are_refused() -> None:
    with pytest.raises(InvalidRequest) as error:
        limits_of(max_batch_tokens=8, max_running=8)
    assert error.value.field == "max_batch_tokens"


def test_a_second_prompt_computes_only_what_is_new() -> None:
    engine = FakeEngine(limits_of())
    prompt = list(range(10))
    (first,) = engine.add(request_of("a", prompt))
    engine.run()
    (second,) = engine.add(request_of("b", [*prompt, 77, 78]))
    engine.run()
    assert first.n_cached == 0
    assert second.n_cached == 8
    assert engine.computed[second] == 12 - 8 + 3
    assert (engine.scheduler.prefix_hits, engine.scheduler.prefix_queries) == (8, 22)


def test_of_a_fully_cached_prompt_the_last_block_is_computed_again() -> None:
    engine = FakeEngine(limits_of())
    engine.add(request_of("a", list(range(8))))
    engine.run()
    (again,) = engine.add(request_of("b", list(range(8)), max_tokens=1))
    engine.run()
    assert again.n_cached == 4
    assert engine.computed[again] == 4


def test_output_tokens_are_found_by_the_next_turn() -> None:
    engine = FakeEngine(limits_of(), lag=1)
    (first,) = engine.add(request_of("a", list(range(6)), max_tokens=8))
    engine.run()
    (second,) = engine.add(request_of("b", [*first.tokens, 1, 2, 3]))
    engine.run()
    assert second.n_cached == 12


def test_blocks_of_rows_that_began_together_are_named_over_the_steps_of_a_block() -> None:
    engine = FakeEngine(limits_of(n_blocks=129), lag=1)
    seqs = [
        engine.add(request_of(id, [i] * 4, max_tokens=40))[0] for i, id in enumerate("abcdefgh")
    ]
    while any(seq.n_pending == 0 for seq in seqs):
        engine.step()
    known = len(engine.scheduler.index)
    for _ in range(24):
        engine.step()
        assert len(engine.scheduler.index) - known <= 2  # 8 rows, 4 tokens a block
        known = len(engine.scheduler.index)
    assert known >= 8 * (1 + 24 // 4 - 1)


def test_prompts_that_arrive_together_share_within_one_plan() -> None:
    engine = FakeEngine(limits_of(max_batch_tokens=64))
    seqs = [engine.add(request_of(id, list(range(12))))[0] for id in "abcd"]
    plan = engine.step()
    assert len(plan.spans) == 4
    assert plan.n_tokens == 12 + 3 * 4
    assert len({tuple(seq.blocks[:2]) for seq in seqs}) == 1


@pytest.mark.parametrize("different", [{"salt": "t"}, {"adapter": "x"}])
def test_prefixes_are_found_only_in_their_own_namespace(different) -> None:
    engine = FakeEngine(limits_of())
    engine.add(request_of("a", list(range(12))))
    engine.run()
    slot = 1 if "adapter" in different else 0
    (other,) = engine.add(request_of("b", list(range(12)), **different), adapter_slot=slot)
    engine.run()
    assert other.n_cached == 0
    (same,) = engine.add(request_of("c", list(range(12)), **different), adapter_slot=slot)
    engine.run()
    assert same.n_cached == 8


@pytest.mark.parametrize(
    ("request_", "cached"),
    [
        (request_of("b", list(range(16)), kind="score", score_from=1), 0),
        (request_of("b", list(range(16)), kind="score", score_from=8), 4),
        (request_of("b", list(range(16)), kind="score", score_from=9), 8),
        (request_of("b", list(range(16)), kind="embed", pooling="mean"), 0),
        (request_of("b", list(range(16)), kind="embed", pooling="last"), 12),
        (request_of("b", list(range(16)), prompt_logprobs=True), 0),
    ],
)
def test_tokens_whose_states_are_asked_for_are_computed(request_, cached: int) -> None:
    engine = FakeEngine(limits_of())
    engine.add(request_of("a", list(range(20))))
    engine.run()
    (seq,) = engine.add(request_)
    engine.run()
    assert seq.n_cached == cached
    assert engine.covered[seq] >= set(range(cached, 16))


def test_scored_texts_can_be_found_by_others() -> None:
    engine = FakeEngine(limits_of())
    engine.add(request_of("a", list(range(16)), kind="score"))
    engine.run()
    (seq,) = engine.add(request_of("b", list(range(20))))
    engine.run()
    assert seq.n_cached == 16


@pytest.mark.parametrize("budget", [64, 9])
@pytest.mark.parametrize("prompt_logprobs", [False, True])
def test_the_continuations_of_a_request_compute_its_prompt_once(
    budget: int, prompt_logprobs: bool
) -> None:
    engine = FakeEngine(limits_of(max_batch_tokens=budget))
    request = request_of("a", list(range(22)), max_tokens=5, n=5, prompt_logprobs=prompt_logprobs)
    first, *followers = engine.add(request)
    engine.add(request_of("b", [7, 8, 9]))
    engine.run()
    assert engine.computed[first] == 22 + 4
    for seq in followers:
        assert seq.n_cached == 20
        assert engine.computed[seq] == 2 + 4
    engine.check_empty()


def test_a_follower_takes_over_when_the_first_is_cancelled() -> None:
    engine = FakeEngine(limits_of(max_batch_tokens=9))
    first, second, third = engine.add(request_of("a", list(range(22)), n=3))
    engine.step()
    engine._finish(first)
    engine.run()
    assert {second.status, third.status} == {Status.FINISHED}
    assert engine.computed[second] + engine.computed[third] < 2 * 22
    engine.check_empty()


def test_without_prefix_cache_nothing_is_shared() -> None:
    engine = FakeEngine(limits_of(prefix_cache=False, max_batch_tokens=64))
    seqs = engine.add(request_of("a", list(range(12)), n=3, max_tokens=2))
    engine.run()
    assert [engine.computed[seq] for seq in seqs] == [13, 13, 13]
    assert len(engine.scheduler.index) == 0


def test_different_adapters_are_bounded_and_served_in_turn() -> None:
    engine = FakeEngine(limits_of(max_adapters=2))
    for i, id in enumerate("abcdef"):
        engine.add(request_of(id, [1, 2, 3], adapter=f"x{i % 3}"), adapter_slot=1 + i % 3)
    plan = engine.step()
    assert [span.seq.request.id for span in plan.spans] == ["a", "b"]
    engine.run()
    engine.check_empty()


def test_a_grammar_waits_for_its_token_and_others_do_not() -> None:
    engine = FakeEngine(limits_of(), lag=1)
    (free,) = engine.add(request_of("a", [1, 2], max_tokens=8))
    (bound,) = engine.add(request_of("b", [1, 2], max_tokens=8), grammar=True)
    took_part = [[], []]
    while plan := engine.step():
        took_part[0].append(any(span.seq is free for span in plan.spans))
        took_part[1].append(any(span.seq is bound for span in plan.spans))
    assert took_part[0][:8] == [True] * 8
    assert took_part[1][:6] == [True, False, True, False, True, False]
    engine.run()
    assert len(bound.tokens) == len(free.tokens) == 10


def test_a_token_in_flight_of_a_cancelled_sequence_is_dropped() -> None:
    engine = FakeEngine(limits_of(), lag=1)
    (seq,) = engine.add(request_of("a", [1, 2, 3], max_tokens=9))
    engine.step()
    engine.abort("a")
    assert engine.scheduler.blocks_used == 0
    assert engine.scheduler.abort("a") == []
    engine.run()
    assert seq.tokens == [1, 2, 3]
    engine.check_empty()


def test_a_failed_plan_ends_its_sequences_and_forgets_what_it_should_have_written() -> None:
    engine = FakeEngine(limits_of(max_batch_tokens=16))
    engine.add(request_of("a", list(range(12))))
    engine.fail_next()
    engine.check_empty()
    (seq,) = engine.add(request_of("b", list(range(12))))
    engine.run()
    assert seq.n_cached == 0
    engine.check_empty()


class SchedulerMachine(RuleBasedStateMachine):
    """Random loads and cancellations; the fake engine checks every plan and every block."""

    @initialize(
        n_blocks=st.integers(8, 24),
        max_running=st.integers(1, 6),
        extra=st.integers(1, 20),
        prefix_cache=st.booleans(),
        max_adapters=st.sampled_from([None, 1, 2]),
        lag=st.integers(0, 2),
        n_snapshots=st.sampled_from([None, None, 0, 1, 3, 9]),
        snapshot_tokens=st.integers(1, 7),
    )
    def start(
        self,
        n_blocks,
        max_running,
        extra,
        prefix_cache,
        max_adapters,
        lag,
        n_snapshots,
        snapshot_tokens,
    ) -> None:
        limits = limits_of(
            n_blocks=n_blocks,
            block_size=3,
            max_running=max_running,
            max_batch_tokens=max_running + extra,
            max_length=40,
            prefix_cache=prefix_cache,
            max_adapters=max_adapters,
            recurrent=n_snapshots is not None,
            n_snapshots=n_snapshots or 0,
            snapshot_tokens=snapshot_tokens,
        )
        self.engine = FakeEngine(limits, lag)
        self.n_added = 0
        self.all = []

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=24),
        max_tokens=st.none() | st.integers(1, 14),
        kind=st.sampled_from(["generate", "generate", "generate", "score", "embed"]),
        n=st.integers(1, 3),
        priority=st.sampled_from([0, 0, 0, 1]),
        slot=st.integers(0, 2),
        salt=st.sampled_from(["", "", "t"]),
        grammar=st.booleans(),
        prompt_logprobs=st.booleans(),
        score_from=st.integers(1, 10),
    )
    def add(
        self,
        tokens,
        max_tokens,
        kind,
        n,
        priority,
        slot,
        salt,
        grammar,
        prompt_logprobs,
        score_from,
    ) -> None:
        request = request_of(
            f"{chr(97 + self.n_added % 26)}{self.n_added}",
            tokens,
            max_tokens=max_tokens,
            kind=kind,
            n=n if kind == "generate" else 1,
            priority=priority,
            adapter=f"x{slot}" if slot else None,
            salt=salt,
            prompt_logprobs=prompt_logprobs,
            score_from=score_from,
            arrival=float(self.n_added),
        )
        self.n_added += 1
        with suppress(InvalidRequest):  # it can never fit
            self.all += self.engine.add(request, adapter_slot=slot, grammar=grammar)

    @rule(n=st.integers(1, 4))
    def step(self, n: int) -> None:
        for _ in range(n):
            self.engine.step()

    @precondition(lambda self: self.engine.live)
    @rule(which=st.integers(0, 1000))
    def abort(self, which: int) -> None:
        ids = sorted(self.engine.live)
        self.engine.abort(ids[which % len(ids)])
        self.engine.check_memory()

    @rule(really=st.integers(0, 9))
    def fail(self, really: int) -> None:
        if really == 0:
            self.engine.fail_next()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.run()
        self.engine.check_empty()
        assert set(self.engine.ended) == set(self.all)
        for seq in self.all:
            kept = seq.tokens[seq.n_prompt :]
            assert kept == [drawn(seq, seq.n_prompt + i) for i in range(len(kept))]
            assert len(seq.tokens) <= max(seq.limit, seq.n_prompt)


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, derandomize=True
)
TestRandomLoads = SchedulerMachine.TestCase
