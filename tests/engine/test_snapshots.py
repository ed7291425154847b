"""Copies of recurrent states, from which later prompts go on: which are kept, and that an answer
is the same with and without them."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.engine.drive import Inquiry, ask, run, settle, small_engine
from tests.engine.fake_engine import FakeEngine, request_of
from tests.engine.test_engine_properties import Ask, assert_equal_answers
from tests.engine.test_scheduler import limits_of
from tests.models.gla_models import SHAPES, tiny_gla

from invivo.engine.bypasses import BypassSpec, checked_specs, init_parameters
from invivo.engine.engine import Engine
from invivo.engine.memory import cache_sizes
from invivo.engine.peft_format import to_peft
from invivo.engine.snapshots import StateSnapshots
from invivo.models.cache import bytes_per_block, bytes_per_slot
from invivo.models.load import LoadedModel, random_model

PROMPT = [(5 * i * i + i) % 61 for i in range(40)]


# --- which slot, and who goes --------------------------------------------------------------------
def test_a_snapshot_is_found_from_the_next_iteration_on() -> None:
    kept = StateSnapshots(5, 2)
    slot = kept.take()
    assert slot is not None
    assert kept.name(11, slot)
    assert kept.longest([None, 11]) == (0, -1)
    assert kept.has(11)
    kept.settle()
    assert kept.longest([None, 11]) == (1, slot)
    assert kept.longest([None, 11, 12]) == (1, slot)
    assert kept.longest([11]) == (0, -1)  # nothing is kept before the first block


def test_the_least_recently_used_snapshot_makes_room() -> None:
    kept = StateSnapshots(1, 2)
    for number in (1, 2):
        slot = kept.take()
        assert slot is not None
        kept.name(number, slot)
    assert kept.take() is None  # both are being written
    kept.settle()
    first = kept.longest([None, 1])[1]
    second = kept.take()
    assert second not in (None, first)
    assert not kept.has(2)
    assert kept.n_used == 2


def test_a_slot_given_back_is_handed_out_from_the_next_iteration_on() -> None:
    kept = StateSnapshots(1, 1)
    slot = kept.take()
    assert slot == 1
    kept.give_back(slot)
    assert kept.n_used == 0
    assert kept.take() is None
    kept.settle()
    assert kept.take() == 1


def test_two_of_one_name_keep_one_slot() -> None:
    kept = StateSnapshots(1, 2)
    a, b = kept.take(), kept.take()
    assert a is not None
    assert b is not None
    assert kept.name(7, a)
    assert not kept.name(7, b)
    kept.settle()
    assert kept.n_used == 1
    kept.clear()
    kept.settle()
    assert {kept.take(), kept.take()} == {a, b}


# --- where snapshots are left --------------------------------------------------------------------
def recurrent(**changes: Any) -> FakeEngine:
    sizes = {"recurrent": True, "n_snapshots": 8, "snapshot_tokens": 4, "max_batch_tokens": 64}
    return FakeEngine(limits_of(**(sizes | changes)))


def test_an_equal_prompt_takes_over_all_it_can() -> None:
    engine = recurrent()
    tokens = list(range(22))
    for cached in (0, 20):
        (seq,) = engine.add(request_of("a", tokens))
        engine.run()
        assert seq.n_cached == cached
    assert (engine.scheduler.prefix_queries, engine.scheduler.prefix_hits) == (44, 20)


def test_where_two_prompts_part_the_third_goes_on() -> None:
    engine = recurrent()
    for i, cached in enumerate((0, 0, 12)):
        (seq,) = engine.add(request_of("a", [*range(13), *[30 + i] * 10]))
        engine.run()
        assert seq.n_cached == cached
    assert engine.scheduler.prefix_hits == 12


def test_a_long_prompt_leaves_them_where_iterations_end_and_an_answer_only_its_newest() -> None:
    engine = recurrent(max_batch_tokens=11, n_snapshots=30, snapshot_tokens=8)
    (seq,) = engine.add(request_of("a", list(range(40)), max_tokens=30))
    engine.run()
    # 8, 16, 24, 32 where iterations end, 36 for an equal prompt, then one of the answer.
    assert engine.scheduler.snapshots is not None
    assert engine.scheduler.snapshots.n_used == 6
    (later,) = engine.add(request_of("b", [*seq.tokens, 1, 2]))
    engine.run()
    assert later.n_cached == 68


def test_short_prompts_leave_none_and_are_not_cut() -> None:
    engine = recurrent(snapshot_tokens=64)
    engine.add(request_of("a", list(range(30)), max_tokens=2))
    plan = engine.step()
    assert plan is not None
    assert [span.stop for span in plan.spans] == [30]
    engine.run()
    assert engine.scheduler.snapshots is not None
    assert engine.scheduler.snapshots.n_used == 0


def test_a_prompt_scored_for_many_ends_goes_on_behind_their_common_beginning() -> None:
    engine = recurrent()
    for end, cached in ((50, 0), (51, 16)):
        request = request_of("a", [*range(18), end, end + 2], kind="score", score_from=18)
        (seq,) = engine.add(request)
        engine.run()
        assert seq.n_cached == cached


# --- how many fit --------------------------------------------------------------------------------
def test_snapshots_take_their_share_of_the_cache() -> None:
    decoder = random_model(tiny_gla("hybrid"), dtype=torch.float64)
    slot = bytes_per_slot(decoder.config, dtype=torch.float64)
    block = bytes_per_block(decoder.config, block_size=4, dtype=torch.float64)
    sizes: dict[str, Any] = {
        "block_size": 4,
        "max_batch_tokens": 64,
        "max_running": 4,
        "max_length": 256,
        "memory_fraction": 0.9,
        "max_rows": 5,
    }
    room = 6 * slot + 100 * block
    given = cache_sizes(decoder, kv_bytes=room, snapshot_bytes=2 * slot, **sizes)
    assert (given.n_snapshots, given.n_blocks) == (2, (100 * block - 2 * slot) // block + 1)
    none = cache_sizes(decoder, kv_bytes=room, snapshot_bytes=0, **sizes)
    assert (none.n_snapshots, none.n_blocks) == (0, 101)
    quarter = cache_sizes(decoder, kv_bytes=6 * slot + 32 * slot, **sizes)
    assert quarter.n_snapshots == 8
    alone = random_model(tiny_gla("plain"), dtype=torch.float64)
    every = cache_sizes(alone, kv_bytes=10**8, **sizes)
    assert (every.n_snapshots, every.n_blocks) == (16, 4 * 64 + 1)


# --- answers -------------------------------------------------------------------------------------
@cache
def served(shape: str) -> LoadedModel:
    decoder = random_model(tiny_gla(shape, vocab_size=256), dtype=torch.float64)
    return LoadedModel("tiny-gla", Path(), decoder.config, decoder, None, "-")


def engine_of(shape: str, *, n_slots: int | None = None, **options: Any) -> Engine:
    """An engine with an adapter "a", room for ``n_slots`` snapshots, snapshots every block."""
    model = served(shape)
    if n_slots is not None:
        slot = bytes_per_slot(model.config, dtype=torch.float64)
        options["snapshot_bytes"] = n_slots * slot
    size = options.setdefault("block_size", 4)
    options.setdefault("snapshot_tokens", size)
    engine = small_engine(model, **options)
    specs = checked_specs(model.config, [BypassSpec("lora", ("q", "v", "down"), 2)])
    tensors: dict[str, torch.Tensor] = {}
    rng = torch.Generator().manual_seed(2)
    for spec in specs:
        for name, value in init_parameters(spec, model.config, seed=1, dtype=torch.float64).items():
            noise = torch.randn(value.shape, generator=rng, dtype=torch.float64)
            tensors[name] = value + 0.2 * noise
    engine.adapters.load("a", to_peft(specs, tensors, model.config, "tiny-gla"))
    return engine


@cache
def cold_answer(shape: str, asked: Ask) -> Inquiry:
    engine = engine_of(shape, prefix_cache=False, max_batch_tokens=300, max_running=8)
    inquiry = asked.submit(engine)
    run(engine, inquiry)
    return inquiry


# Without shrinking: a seed names its load anyway.
@settings(max_examples=14, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 2**32))
def test_answers_from_snapshots_are_the_cold_ones(seed: int) -> None:
    """Random prompts with common beginnings, chunks, batch-mates, cache sizes, cancellations."""
    rng = random.Random(seed)
    shape = rng.choice(sorted(SHAPES))
    max_running = rng.randrange(1, 7)
    engine = engine_of(
        shape,
        n_slots=rng.choice([1, 2, 5, 40]),
        max_running=max_running,
        max_batch_tokens=max_running + rng.choice([1, 3, 16, 100]),
        block_size=rng.choice([2, 4, 16]),
        overlap=rng.random() < 0.5,
    )
    kept: list[tuple[Ask, Inquiry]] = []
    for _ in range(rng.randrange(4, 10)):
        asked = Ask(
            n_common=rng.choice([0, 5, 16, 31, 32, 60]),
            own=tuple(rng.randrange(3) for _ in range(rng.randrange(2, 8))),
            way=rng.choice(["greedy", "greedy", "seeded", "prompt", "score", "mean", "last"]),
            max_tokens=rng.randrange(1, 14),
            adapter=rng.choice([None, None, "a"]),
            n=rng.choice([1, 1, 3]),
        )
        inquiry = asked.submit(engine)
        for _ in range(rng.randrange(5)):
            engine.step()
        if rng.random() < 0.2:
            engine.abort(inquiry.request.id)
        else:
            kept.append((asked, inquiry))
    run(engine, *[inquiry for _, inquiry in kept])
    for asked, inquiry in kept:
        assert_equal_answers(inquiry, cold_answer(shape, asked))
    held = engine.scheduler.snapshots
    assert held is not None
    held.settle()
    assert held.n_used == len(held._known)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_second_turn_goes_on_behind_the_first(shape: str) -> None:
    """What was written is taken over too, and counted."""
    engine = engine_of(shape)
    first = ask(engine, PROMPT[:18], temperature=0, max_tokens=9, ignore_eos=True)
    run(engine, first)
    asked = [*PROMPT[:18], *first.tokens(), 3, 4, 5]
    second = ask(engine, asked, temperature=0, max_tokens=4, ignore_eos=True, logprobs=0)
    run(engine, second)
    assert second.outputs[-1].cached_tokens == 24
    assert engine.stats().prefix == {"hits": 24, "queries": 48}
    cold = engine_of(shape, prefix_cache=False)
    alone = ask(cold, asked, temperature=0, max_tokens=4, ignore_eos=True, logprobs=0)
    run(cold, alone)
    assert second.tokens() == alone.tokens()
    assert second.logprobs() == pytest.approx(alone.logprobs(), abs=1e-10)


def test_a_preempted_sequence_goes_on_from_its_snapshot() -> None:
    model = served("hybrid")
    slot = bytes_per_slot(model.config, dtype=torch.float64)
    block = bytes_per_block(model.config, block_size=4, dtype=torch.float64)
    engine = engine_of(
        "hybrid", n_slots=8, max_running=4, max_jobs=1, kv_bytes=(6 + 8) * slot + 14 * block
    )
    asked = [
        ask(engine, PROMPT[i : i + 9], temperature=0, max_tokens=16, ignore_eos=True, logprobs=0)
        for i in range(3)
    ]
    run(engine, *asked)
    assert engine.scheduler.n_preemptions > 0
    for inquiry in asked:
        cold = engine_of("hybrid", prefix_cache=False)
        tokens = list(inquiry.request.tokens)
        alone = ask(cold, tokens, temperature=0, max_tokens=16, ignore_eos=True, logprobs=0)
        run(cold, alone)
        assert inquiry.logprobs() == pytest.approx(alone.logprobs(), abs=1e-10)


def test_nothing_is_shared_with_another_tenant_and_nothing_is_lost_by_an_abort() -> None:
    engine = engine_of("plain")
    run(engine, ask(engine, PROMPT, max_tokens=2, salt="one"))
    other = ask(engine, PROMPT, max_tokens=2, salt="two")
    run(engine, other)
    assert other.outputs[-1].cached_tokens == 0
    gone = ask(engine, PROMPT, max_tokens=9, salt="one")
    engine.step()
    engine.abort(gone.request.id)
    settle(engine)
    again = ask(engine, PROMPT, max_tokens=2, salt="one")
    run(engine, again)
    assert again.outputs[-1].cached_tokens == 36
