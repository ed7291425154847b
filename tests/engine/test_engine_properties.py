"""What a request is answered depends on the request alone: not on chunks, cached prefixes, lost
memory, neighbours, their adapters or their cancellation.

Every answer is compared with the *cold* one: the same request alone, in one piece, on an engine
that shares nothing. Most of it runs in float64, where the rounding of differently shaped products
is far below what one wrong key would change; neighbours are tested in float32 as well.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.engine.drive import Inquiry, ask, run, settle, small_engine
from tests.tiny import tiny_loaded

from invivo.engine.engine import Engine
from invivo.models.cache import bytes_per_block
from invivo.models.load import LoadedModel

FLOAT32, FLOAT64 = 1e-5, 1e-10
# Prompts are a common beginning of some length and an end of their own, so that prefixes recur.
COMMON = [(7 * i * i + 3 * i + 1) % 250 for i in range(60)]
ADAPTERS = ("a", "b", "c")
LONGEST = len(COMMON) + 11 + 24


@dataclass(frozen=True)
class Ask:
    """One request, hashable: what an answer may depend on."""

    n_common: int
    own: tuple[int, ...]
    way: str = "greedy"  # greedy, seeded, prompt, score, mean, last
    max_tokens: int = 8
    adapter: str | None = None
    n: int = 1

    def submit(self, engine: Engine) -> Inquiry:
        fields: dict[str, Any] = {"adapter": self.adapter}
        if self.way == "score":
            fields |= {"kind": "score", "score_from": max(1, self.n_common)}
        elif self.way in ("mean", "last"):
            fields |= {"kind": "embed", "pooling": self.way}
        else:
            fields |= {"max_tokens": self.max_tokens, "ignore_eos": True, "logprobs": 2}
            fields |= {"n": self.n, "seed": len(self.own)}
            fields |= {"temperature": 1.0 if self.way == "seeded" else 0.0}
            if self.way == "prompt":
                fields["prompt_logprobs"] = 0
        return ask(engine, [*COMMON[: self.n_common], *self.own], **fields)


def assert_equal_answers(got: Inquiry, cold: Inquiry, tolerance: float = FLOAT64) -> None:
    for index in range(got.request.n):
        assert got.tokens(index) == cold.tokens(index)
        assert got.text(index) == cold.text(index)
        assert got.reason(index) == cold.reason(index) != "error"
        assert got.logprobs(index) == pytest.approx(cold.logprobs(index), abs=tolerance)
    assert got.prompt_logprobs() == pytest.approx(cold.prompt_logprobs(), abs=tolerance)
    ends = got.outputs[-1].embedding, cold.outputs[-1].embedding
    assert (ends[0] is None) == (ends[1] is None)
    if ends[0] is not None:
        assert ends[0] == pytest.approx(ends[1], abs=FLOAT32)  # pooled in float32


def lora_tensors(model: LoadedModel, seed: int, rank: int) -> dict[str, torch.Tensor]:
    """Random adapter matrices, by the peft library's names, for two maps of every layer."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    shapes = {
        "self_attn.q_proj": (config.n_heads * config.head_dim, config.d_model),
        "mlp.down_proj": (config.d_model, config.d_ff),
    }
    tensors = {}
    for layer in range(config.n_layers):
        for name, (d_out, d_in) in shapes.items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            for side, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
                noise = torch.randn(shape, generator=generator)
                tensors[f"{at}.lora_{side}.weight"] = 0.3 * noise
    return tensors


def engine_of(model: LoadedModel, n_blocks: int | None = None, **options: Any) -> Engine:
    """A small engine with three adapters; ``n_blocks`` bounds its cache."""
    if n_blocks is not None:
        size = options.get("block_size", 16)
        dtype = next(model.decoder.parameters()).dtype
        options["kv_bytes"] = n_blocks * bytes_per_block(model.config, block_size=size, dtype=dtype)
    engine = small_engine(model, **options)
    for seed, name in enumerate(ADAPTERS):
        rank = 2 + seed
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": ["q_proj", "down_proj"],
        }
        engine.adapters.load(name, (config, lora_tensors(model, seed, rank)))
    return engine


class Cold:
    """Answers of requests alone on an engine without sharing, each computed once."""

    def __init__(self, model: LoadedModel) -> None:
        self.engine = engine_of(model, prefix_cache=False, max_batch_tokens=300, max_running=8)
        self.answers: dict[Ask, Inquiry] = {}

    def __call__(self, asked: Ask) -> Inquiry:
        if asked not in self.answers:
            self.answers[asked] = inquiry = asked.submit(self.engine)
            run(self.engine, inquiry)
        return self.answers[asked]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(tmp_path_factory.mktemp("exact"), dtype=torch.float64)


@pytest.fixture(scope="module")
def cold(exact: LoadedModel) -> Cold:
    return Cold(exact)


def drain(engine: Engine) -> None:
    """Everything ends, and every block is free again."""
    settle(engine)
    pool = engine.scheduler.pool
    assert len(set(pool.free_list())) == pool.n_free == pool.n_total


@dataclass(frozen=True)
class Load:
    """Requests with the steps before each, and how long its sender waits before cancelling it."""

    arrivals: tuple[tuple[Ask, int, int | None], ...]
    options: tuple[tuple[str, Any], ...]


def load_of(seed: int) -> Load:
    """A dozen requests on an engine that is often too small for them."""
    rng = random.Random(seed)
    arrivals = []
    for _ in range(rng.randrange(6, 15)):
        asked = Ask(
            n_common=rng.choice([0, 5, 16, 31, 32, 60]),
            own=tuple(rng.randrange(4) for _ in range(rng.randrange(2, 12))),  # a score needs two
            way=rng.choice(["greedy", "greedy", "seeded", "prompt", "score", "mean", "last"]),
            max_tokens=rng.randrange(1, 25),
            adapter=rng.choice([None, None, *ADAPTERS]),
            n=rng.choice([1, 1, 1, 3]),
        )
        patience = rng.randrange(12) if rng.random() < 0.25 else None
        arrivals.append((asked, rng.choice([0, 0, 1, 3]), patience))
    block_size = rng.choice([4, 16])
    max_running = rng.randrange(1, 10)
    options = {
        "block_size": block_size,
        "n_blocks": -(-LONGEST // block_size) + rng.randrange(3),
        "max_running": max_running,
        "max_batch_tokens": max_running + rng.choice([1, 3, 16, 100]),
        "prefix_cache": rng.random() < 0.7,
        "overlap": rng.random() < 0.5,
    }
    return Load(tuple(arrivals), tuple(options.items()))


# Without shrinking: an example takes a tenth of a second, and a seed names its load anyway.
@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 2**32))
def test_answers_are_those_of_the_request_alone(exact: LoadedModel, cold: Cold, seed: int) -> None:
    """Random arrivals, chunk sizes, cache sizes and cancellations."""
    load = load_of(seed)
    engine = engine_of(exact, **dict(load.options))
    now = 0
    kept: list[tuple[Ask, Inquiry]] = []
    cancelled: list[tuple[int, Ask, Inquiry]] = []

    def step() -> None:
        nonlocal now
        now += 1
        engine.step()
        for when, _, inquiry in cancelled:
            if when == now:
                engine.abort(inquiry.request.id)

    for asked, pause, patience in load.arrivals:
        inquiry = asked.submit(engine)
        if patience is None:
            kept.append((asked, inquiry))
        else:
            cancelled.append((now + 1 + patience, asked, inquiry))
        for _ in range(pause):
            step()
    for _ in range(3000):
        if all(i.done for _, i in kept) and all(i.done for _, _, i in cancelled):
            break
        step()
    drain(engine)
    for asked, inquiry in kept:
        assert_equal_answers(inquiry, cold(asked))
    for _, asked, inquiry in cancelled:
        # What came before the cancellation is right as well.
        for index in range(asked.n):
            tokens = inquiry.tokens(index)
            assert tokens == cold(asked).tokens(index)[: len(tokens)]


@pytest.mark.parametrize("overlap", [False, True])
def test_prefix_hits_equal_cold_runs(exact: LoadedModel, cold: Cold, overlap: bool) -> None:
    engine = engine_of(exact, block_size=4, overlap=overlap)
    load = [
        Ask(n_common, (n_common % 5, 2), way, adapter=adapter)
        for n_common in (60, 59, 33, 32, 31, 60)
        for way in ("greedy", "seeded", "prompt", "score", "last")
        for adapter in (None, "a")
    ]
    for asked in load:
        inquiry = asked.submit(engine)
        run(engine, inquiry)
        assert_equal_answers(inquiry, cold(asked))
    stats = engine.stats()
    assert stats.prefix["hits"] > 0.5 * stats.prefix["queries"]


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_equals_undisturbed(exact: LoadedModel, cold: Cold, overlap: bool) -> None:
    load = [
        Ask(20 + i, (i,), way, max_tokens=40, adapter=adapter)
        for i, (way, adapter) in enumerate(
            [("greedy", None), ("seeded", "a"), ("prompt", "b"), ("seeded", None), ("prompt", "c")]
        )
    ]
    for prefix_cache in (True, False):
        engine = engine_of(exact, 24, block_size=4, overlap=overlap, prefix_cache=prefix_cache)
        inquiries = [asked.submit(engine) for asked in load]
        run(engine, *inquiries)
        drain(engine)
        assert engine.scheduler.n_preemptions > 0
        for asked, inquiry in zip(load, inquiries, strict=True):
            assert_equal_answers(inquiry, cold(asked))


@pytest.mark.parametrize("budget", [2, 5, 17])
def test_chunked_equals_whole(exact: LoadedModel, cold: Cold, budget: int) -> None:
    engine = engine_of(exact, max_running=1, max_batch_tokens=budget, prefix_cache=False)
    for way in ("greedy", "prompt", "score", "mean", "last"):
        asked = Ask(50, (1, 2, 3), way)
        inquiry = asked.submit(engine)
        run(engine, inquiry)
        assert_equal_answers(inquiry, cold(asked))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_neighbours_with_other_adapters_change_nothing(family: str, tmp_path: Path) -> None:
    model = tiny_loaded(tmp_path, family)
    names = ADAPTERS if family != "qwen3_moe" else ()  # its experts have no down_proj of this shape
    make = engine_of if names else small_engine
    watched = [Ask(33, (5, 1), "prompt", 12), Ask(40, (9,), "score")]
    if names:
        watched.append(Ask(21, (3,), "prompt", 12, adapter="a"))
    for asked in watched:
        answers = []
        for n_neighbours in (0, 1, 30):
            engine = make(model, max_running=40)
            neighbours = [
                Ask(
                    3 * i % 60,
                    (i, 2),
                    ("greedy", "seeded", "score")[i % 3],
                    max_tokens=3 + i % 17,
                    adapter=(None, *names)[i % (1 + len(names))],
                )
                for i in range(n_neighbours)
            ]
            others = [n.submit(engine) for n in neighbours[: n_neighbours // 2]]
            mine = asked.submit(engine)
            others += [n.submit(engine) for n in neighbours[n_neighbours // 2 :]]
            run(engine, mine, *others)
            answers.append(mine)
        alone, *beside = answers
        for inquiry in beside:
            assert_equal_answers(inquiry, alone, FLOAT32)
