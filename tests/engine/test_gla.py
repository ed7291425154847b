"""Recurrent layers in the engine: text equals the plain forward's, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.drive import ask, run, small_engine
from tests.models.gla_models import SHAPES, memory_of, tiny_gla

from invivo.kernels.paging import contiguous_layout
from invivo.models.cache import bytes_per_block, bytes_per_slot
from invivo.models.load import LoadedModel, random_model


def served(shape: str) -> LoadedModel:
    decoder = random_model(tiny_gla(shape), dtype=torch.float64)
    return LoadedModel("tiny-gla", Path(), decoder.config, decoder, None, "-")


def prompt(n: int, seed: int) -> list[int]:
    return torch.randint(0, 67, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def logprobs_of(model: LoadedModel, tokens: list[int]) -> torch.Tensor:
    """[T, V] of one plain forward over everything."""
    layout = contiguous_layout([len(tokens)], block_size=4)
    with torch.inference_mode():
        hidden = model.decoder(torch.tensor(tokens), layout, memory_of(model.config))
        return model.decoder.logits(hidden).log_softmax(-1)


def greedy(model: LoadedModel, tokens: list[int], n: int) -> list[int]:
    """The most probable continuation, every token by the whole text again."""
    tokens = list(tokens)
    for _ in range(n):
        tokens.append(int(logprobs_of(model, tokens)[-1].argmax()))
    return tokens[-n:]


@pytest.mark.parametrize("shape", SHAPES)
def test_text_and_scores_are_those_of_the_plain_forward(shape: str) -> None:
    """Prompts longer than an iteration, more of them than rows, scores beside them."""
    model = served(shape)
    engine = small_engine(model, max_running=3, max_batch_tokens=9, block_size=4)
    prompts = [prompt(n, n) for n in (1, 5, 30, 12, 23)]
    asked = [ask(engine, p, temperature=0, max_tokens=6) for p in prompts]
    text = prompt(19, 50)
    scored = ask(engine, text, kind="score")
    run(engine, *asked, scored)
    for p, inquiry in zip(prompts, asked, strict=True):
        assert inquiry.tokens() == greedy(model, p, 6)
    wanted = logprobs_of(model, text)[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]
    assert torch.allclose(torch.tensor(scored.prompt_logprobs()), wanted.float(), atol=1e-5)


def test_a_prompt_asked_twice_is_answered_alike() -> None:
    model = served("hybrid")
    engine = small_engine(model, block_size=4)
    first = ask(engine, prompt(21, 1), temperature=0, max_tokens=5)
    run(engine, first)
    second = ask(engine, prompt(21, 1) + first.tokens(), temperature=0, max_tokens=3)
    run(engine, second)
    assert first.tokens() + second.tokens() == greedy(model, prompt(21, 1), 8)


def test_a_preempted_sequence_goes_on_as_if_nothing_had_been() -> None:
    model = served("hybrid")
    states = (1 + 4 + 1) * bytes_per_slot(model.config, dtype=torch.float64)
    blocks = 12 * bytes_per_block(model.config, block_size=4, dtype=torch.float64)
    engine = small_engine(model, block_size=4, kv_bytes=states + blocks, max_running=4, max_jobs=1)
    assert engine.scheduler.blocks_total == 12
    asked = [ask(engine, prompt(9, i), temperature=0, max_tokens=16) for i in range(3)]
    run(engine, *asked)
    assert engine.scheduler.n_preemptions > 0
    for i, inquiry in enumerate(asked):
        assert inquiry.tokens() == greedy(model, prompt(9, i), 16)


def test_sixty_four_sequences_at_once() -> None:
    model = served("plain")
    engine = small_engine(model, max_running=64, max_batch_tokens=200)
    asked = [ask(engine, prompt(1 + i % 7, i), temperature=0, max_tokens=4) for i in range(64)]
    run(engine, *asked)
    for i in (0, 13, 63):
        assert asked[i].tokens() == greedy(model, prompt(1 + i % 7, i), 4)
