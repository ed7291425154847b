"""The flat batch of a plan: every number checked against a plain loop over the spans."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from tests.engine.fake_engine import request_of, sequences_of

from invivo.engine.batch import BatchBuilder, Decodes, FlatBatch
from invivo.engine.scheduler import Limits, Scheduler
from invivo.engine.types import Plan, Purpose, Span

LIMITS = Limits(
    n_blocks=21, block_size=4, max_batch_tokens=40, max_running=6, max_length=60, max_adapters=3
)


def check(batch: FlatBatch, plan: Plan) -> None:
    """Compare with what the plan says, one token at a time; call before anything is recorded."""
    layout, size = batch.layout, LIMITS.block_size
    tokens, positions, slots, adapters, span_start = [], [], [], [], [0]
    pending, sampled = [], []
    for i, span in enumerate(plan.spans):
        seq = span.seq
        for position in range(span.start, span.stop):
            if position < len(seq.tokens):
                tokens.append(seq.tokens[position])
            else:
                pending.append((len(tokens), seq.row))
                tokens.append(0)
            positions.append(position)
            slots.append(seq.blocks[position // size] * size + position % size)
            adapters.append(seq.adapter_slot)
        span_start.append(len(tokens))
        if span.samples:
            sampled.append((i, len(tokens) - 1, seq.row))
    assert batch.plan is plan
    assert batch.tokens.tolist() == tokens
    assert layout.positions.tolist() == positions
    assert layout.slots.tolist() == slots
    assert layout.span_start.tolist() == layout.span_start_host == span_start
    stops = [span.stop for span in plan.spans]
    assert layout.kv_len.tolist() == layout.kv_len_host == stops
    assert layout.max_kv == max(stops)
    assert layout.max_query == max(span.stop - span.start for span in plan.spans)
    assert (layout.block_size, layout.n_decode) == (size, plan.n_decode)
    for i, span in enumerate(plan.spans):
        n_blocks = -(-span.stop // size)
        assert layout.block_table[i, :n_blocks].tolist() == span.seq.blocks[:n_blocks]
    assert batch.span_rows.tolist() == [span.seq.row for span in plan.spans]
    indexed = zip(batch.pending_index.tolist(), batch.pending_rows.tolist(), strict=True)
    assert list(indexed) == pending
    drawn = zip(
        batch.sample_spans, batch.sample_index.tolist(), batch.sample_rows.tolist(), strict=True
    )
    assert list(drawn) == sampled
    assert batch.adapters.tolist() == adapters
    decodes = all(span.purpose is Purpose.DECODE for span in plan.spans)
    assert (batch.decodes is not None) == decodes
    if batch.decodes is not None:
        assert batch.decodes.seqs == [span.seq for span in plan.spans]
    assert batch.adapter_slots == sorted({slot for slot in adapters if slot})
    for tensor in (batch.tokens, layout.positions, layout.slots, batch.sample_index):
        assert tensor.dtype == torch.int64
    for tensor in (layout.span_start, layout.kv_len, layout.block_table, batch.adapters):
        assert tensor.dtype == torch.int32


@pytest.mark.parametrize("lag", [0, 1])
def test_every_batch_of_a_random_load_says_what_its_plan_says(lag: int) -> None:
    rng = random.Random(1)
    scheduler, builder = Scheduler(LIMITS), BatchBuilder(LIMITS)
    in_flight: list[Plan] = []
    n_batches = n_pending = n_lasting = 0
    last: Decodes | None = None
    for step in range(300):
        if step < 200 and rng.random() < 0.3:
            slot = rng.choice([0, 0, 1, 2, 3])
            kind = rng.choice(["generate", "generate", "score"])
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 30))]
            request = request_of(
                str(step), prompt, max_tokens=rng.randrange(1, 20), kind=kind, arrival=float(step)
            )
            for seq in sequences_of(request, adapter_slot=slot):
                scheduler.add(seq)
        if rng.random() < 0.05 and scheduler.running:
            scheduler.abort(rng.choice(scheduler.running).request.id)
        plan = scheduler.schedule(0.0)
        if plan is not None:
            batch = builder.build(plan)
            check(batch, plan)
            n_batches += 1
            n_pending += len(batch.pending_index)
            n_lasting += batch.decodes is not None and batch.decodes is last
            last = batch.decodes
            in_flight.append(plan)
        while len(in_flight) > (lag if plan is not None else 0):
            for span in in_flight.pop(0).spans:
                if span.samples:
                    scheduler.record(span.seq, rng.randrange(2))
                scored = span.seq.request.kind == "score" and span.stop == span.seq.n_prompt
                if scored or len(span.seq.tokens) == span.seq.limit:
                    scheduler.finish(span.seq)
    assert not scheduler.has_work
    assert n_batches > 150
    assert n_lasting > 20
    assert scheduler.n_preemptions > 0
    assert (n_pending > 0) == (lag > 0)


def test_a_batch_stays_as_it_is_while_the_next_one_is_built() -> None:
    scheduler, builder = Scheduler(LIMITS), BatchBuilder(LIMITS)
    for id in "ab":
        for seq in sequences_of(request_of(id, [1, 2, 3, 4, 5, 6], max_tokens=9)):
            scheduler.add(seq)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    batch = builder.build(plan)
    before = [batch.tokens.clone(), batch.layout.slots.clone(), batch.layout.block_table.clone()]
    following = scheduler.schedule(0.0)
    assert following is not None
    builder.build(following)
    after = [batch.tokens, batch.layout.slots, batch.layout.block_table]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_training_windows_follow_inference_with_the_adapter_of_their_job() -> None:
    limits = replace(LIMITS, max_training=2)
    scheduler, builder = Scheduler(limits), BatchBuilder(limits)
    training = []
    for slot in (2, 3):
        request = request_of(f"job-{slot}", list(range(slot, slot + 21)))
        training += sequences_of(request, adapter_slot=slot)
    for step in range(12):
        if step % 3 == 0:
            for seq in sequences_of(request_of(str(step), [7, 8, 9], max_tokens=4), adapter_slot=1):
                scheduler.add(seq)
        plan = scheduler.schedule(0.0)
        assert plan is not None
        for seq in training:
            if not seq.blocks:
                assert scheduler.hold(seq, plan)
            start, stop = seq.n_computed, min(seq.n_computed + 5, len(seq.tokens))
            if start < stop:
                plan.spans.append(Span(seq, start, stop, Purpose.TRAIN, False))
                plan.n_tokens += stop - start
                seq.n_computed = stop
        batch = builder.build(plan)
        check(batch, plan)
        assert not {plan.spans[i].purpose for i in batch.sample_spans} & {Purpose.TRAIN}
        for span in plan.spans:
            if span.samples:
                scheduler.record(span.seq, 1)
                if len(span.seq.tokens) == span.seq.limit:
                    scheduler.finish(span.seq)
    assert [seq.row for seq in training] == [6, 7]
    assert [seq.n_computed for seq in training] == [21, 21]


@pytest.mark.gpu
def test_the_same_batch_on_a_gpu() -> None:
    scheduler, builder = Scheduler(LIMITS), BatchBuilder(LIMITS, "cuda")
    for id in "abc":
        for seq in sequences_of(request_of(id, [1, 2, 3, 4, 5, 6], max_tokens=9), adapter_slot=1):
            scheduler.add(seq)
    for _ in range(5):
        plan = scheduler.schedule(0.0)
        assert plan is not None
        batch = builder.build(plan)
        assert batch.tokens.is_cuda
        check(batch, plan)
        for span in plan.spans:
            scheduler.record(span.seq, 1)
