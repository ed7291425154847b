"""Adapters of every kind in the engine: side by side, with virtual tokens, in versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.bypass_cases import KINDS, hidden_of, logits_of, random_parameters
from tests.engine.drive import Inquiry, ask, run, small_engine

from invivo.engine.bypasses import BypassSpec, TrainBypass, n_virtual
from invivo.engine.engine import Engine
from invivo.errors import InvalidRequest, TooLarge
from invivo.models.load import LoadedModel

PROMPT = [5, 77, 260, 3, 9, 141, 280, 33]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}


def name_of(kind: str) -> str:
    return kind.replace(" ", "-")


def engine_with_all(model: LoadedModel, **options: Any) -> Engine:
    engine = small_engine(model, **({"max_adapters": len(KINDS)} | options))
    for kind, specs in KINDS.items():
        engine.adapters.publish(name_of(kind), specs, random_parameters(model.config, specs))
    return engine


def true_logprobs(model: LoadedModel, kind: str, tokens: list[int]) -> list[float]:
    """Of tokens 2.. given those before, by the differentiable form."""
    specs = KINDS[kind]
    n = n_virtual(specs)
    bypass = TrainBypass(model.config, specs, random_parameters(model.config, specs))
    logits = logits_of(model, tokens, bypass.window(0, n + len(tokens)), n)
    chosen = torch.tensor(tokens[1:])[:, None]
    found: list[float] = logits[:-1].log_softmax(-1).gather(1, chosen).squeeze(1).tolist()
    return found


@pytest.mark.parametrize("few", [{}, {"max_running": 4, "max_batch_tokens": 7}])
def test_all_kinds_side_by_side_answer_as_alone(few: dict[str, int], tiny: LoadedModel) -> None:
    engine = engine_with_all(tiny, **few)
    names: list[str | None] = [None, *(name_of(kind) for kind in KINDS)]
    alone: dict[str | None, Inquiry] = {}
    for name in names:
        alone[name] = ask(engine, PROMPT, adapter=name, **GREEDY)
        run(engine, alone[name])
    assert len({tuple(inquiry.tokens()) for inquiry in alone.values()}) > len(KINDS) // 2
    together = [ask(engine, PROMPT, adapter=name, salt="x", **GREEDY) for name in names * 2]
    run(engine, *together)
    for inquiry in together:
        expected = alone[inquiry.request.adapter]
        assert inquiry.tokens() == expected.tokens()
        assert inquiry.logprobs() == pytest.approx(expected.logprobs(), abs=1e-5)
    for kind in KINDS:
        inquiry = alone[name_of(kind)]
        wanted = true_logprobs(tiny, kind, PROMPT + inquiry.tokens())[len(PROMPT) - 1 :]
        assert inquiry.logprobs() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_prompt_logprobs_are_of_the_given_tokens(kind: str, tiny: LoadedModel) -> None:
    engine = engine_with_all(tiny, max_running=2, max_batch_tokens=6)
    expected = true_logprobs(tiny, kind, PROMPT)
    for _ in range(2):  # the second time over cached prefixes
        score = ask(engine, PROMPT, kind="score", adapter=name_of(kind), score_from=3)
        told = ask(engine, PROMPT, adapter=name_of(kind), prompt_logprobs=1, max_tokens=1)
        run(engine, score, told)
        assert score.prompt_logprobs() == pytest.approx(expected[2:], abs=1e-4)
        assert told.prompt_logprobs() == pytest.approx(expected, abs=1e-4)
    recent = engine.stats().recent[0]
    assert recent["prompt_tokens"] == len(PROMPT)


@pytest.mark.parametrize("kind", ["prefix", "soft_prompt", "all at once"])
def test_embeddings_leave_virtual_tokens_out(kind: str, tiny: LoadedModel) -> None:
    specs = KINDS[kind]
    n = n_virtual(specs)
    bypass = TrainBypass(tiny.config, specs, random_parameters(tiny.config, specs))
    states = hidden_of(tiny, PROMPT, bypass.window(0, n + len(PROMPT)), n)
    engine = engine_with_all(tiny, max_running=2, max_batch_tokens=3)
    for pooling, expected in (("mean", states.mean(0)), ("last", states[-1])):
        inquiry = ask(engine, PROMPT, kind="embed", adapter=name_of(kind), pooling=pooling)
        run(engine, inquiry)
        assert inquiry.outputs[-1].embedding == pytest.approx(expected.tolist(), abs=1e-4)


def test_cached_tokens_are_those_of_the_given_prompt(tiny: LoadedModel) -> None:
    engine = engine_with_all(tiny)
    long = [7 + i for i in range(45)]
    for _ in range(2):
        inquiry = ask(engine, long, adapter="soft_prompt", **GREEDY)
        run(engine, inquiry)
    assert inquiry.outputs[-1].cached_tokens == 3 * 16 - 5
    other = ask(engine, [0] * 5 + long, **GREEDY)  # the base model has never seen this
    run(engine, other)
    assert other.outputs[-1].cached_tokens == 0


def test_penalties_do_not_see_placeholders(tiny: LoadedModel) -> None:
    """Token 0 stands in the place of virtual tokens; a penalty must not find it there."""
    engine = engine_with_all(tiny)
    asked: dict[str, Any] = GREEDY | {
        "max_tokens": 1,
        "adapter": "prefix",
        "logit_bias": ((0, 100.0),),
    }
    inquiry = ask(engine, PROMPT, repetition_penalty=100.0, **asked)
    run(engine, inquiry)
    assert inquiry.tokens() == [0]


def test_virtual_tokens_take_room_in_the_context(tiny: LoadedModel) -> None:
    engine = engine_with_all(tiny, max_model_len=20)
    assert [engine.adapters.n_virtual(name) for name in ("soft_prompt", "ia3", None)] == [5, 0, 0]
    with pytest.raises(TooLarge):
        ask(engine, [1] * 15, adapter="soft_prompt", **GREEDY)
    with pytest.raises(InvalidRequest, match="max_tokens"):
        ask(engine, [1] * 12, adapter="soft_prompt", **GREEDY)
    fits = ask(engine, [1] * 12, adapter="soft_prompt", **(GREEDY | {"max_tokens": None}))
    run(engine, fits)
    assert len(fits.tokens()) == 20 - 5 - 12


def test_kinds_take_turns_in_few_slots(tiny: LoadedModel) -> None:
    """A slot given to another kind keeps nothing of the one before."""
    wide, narrow = engine_with_all(tiny), engine_with_all(tiny, max_adapters=2)
    names = [name_of(kind) for kind in KINDS]
    expected = [ask(wide, PROMPT, adapter=name, **GREEDY) for name in names]
    run(wide, *expected)
    for order in (names, names[::-1]):
        got = {name: ask(narrow, PROMPT, adapter=name, **GREEDY) for name in order}
        run(narrow, *got.values())
        for name, inquiry in zip(names, expected, strict=True):
            assert got[name].tokens() == inquiry.tokens()


def test_preempted_virtual_tokens_are_computed_again(tiny: LoadedModel) -> None:
    asked = GREEDY | {"max_tokens": 40}
    roomy = engine_with_all(tiny)
    block = 2 * tiny.config.n_layers * tiny.config.n_kv_heads * tiny.config.head_dim * 16 * 4
    tight = engine_with_all(tiny, kv_bytes=10 * block)
    names = ["prefix", "soft_prompt", "all-at-once", "prefix"]
    answers = []
    for engine in (roomy, tight):
        inquiries = [ask(engine, PROMPT, adapter=name, **asked) for name in names]
        run(engine, *inquiries)
        answers.append([inquiry.tokens() for inquiry in inquiries])
    assert tight.stats().preemptions > 0
    assert answers[0] == answers[1]


def test_published_versions_are_what_they_were(tiny: LoadedModel) -> None:
    """A step of an optimizer after publishing changes neither the version nor who runs with it."""
    specs = (BypassSpec("lora", ("down",), 4), BypassSpec("soft_prompt", size=3))
    parameters = random_parameters(tiny.config, specs)
    asked = GREEDY | {"adapter": "job", "max_tokens": 12}
    engine = small_engine(tiny)
    assert engine.adapters.publish("job", specs, parameters).version == 1
    first = ask(engine, PROMPT, **asked)
    run(engine, first)
    running = ask(engine, PROMPT, **asked)
    engine.step()
    for parameter in parameters.values():
        parameter.neg_()
    unchanged = ask(engine, PROMPT, **asked)
    engine.step()
    assert engine.adapters.publish("job", specs, parameters).version == 2
    later = ask(engine, PROMPT, **asked)
    run(engine, running, unchanged, later)
    assert first.tokens() == running.tokens() == unchanged.tokens()
    assert later.tokens() != first.tokens()
    assert later.outputs[-1].cached_tokens == 0
