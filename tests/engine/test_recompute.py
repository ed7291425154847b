"""``"recompute": false`` in the live engine: the past comes from the cache and stays plain."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.edits.small_models import random_ids, words
from tests.engine import test_programs_recurrent as recurrent
from tests.engine.drive import ask, run
from tests.engine.test_programs import (
    FAMILIES,
    PROGRAMS,
    assert_as_the_oracle,
    carried,
    engine_of,
    generate,
)

STEER: dict[str, Any] = {"at": "layers.*.resid.post", "do": "add", "v": 0.3}
REUSING: dict[str, Any] = {"recompute": False, "steps": [STEER]}


@settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    family=st.sampled_from(FAMILIES),
    program=PROGRAMS,
    places=st.lists(st.sampled_from(["@last", "@generated"]), min_size=2, max_size=2),
    rows=st.sampled_from([5, 64]),
    warm=st.booleans(),
)
def test_the_engine_does_what_the_interpreter_says(
    family: str, program: dict[str, Any], places: list[str], rows: int, warm: bool
) -> None:
    steps = [s if s["pos"] != {"range": [1, 4]} else s | {"pos": "@all"} for s in program["steps"]]
    out = [o | {"pos": place} for o, place in zip(program["out"], places, strict=False)]
    program = {"recompute": False, "steps": steps, "out": out}
    engine, ids = engine_of(family, max_batch_tokens=rows), random_ids(8)
    if warm:
        run(engine, generate(engine, ids, None))
    reusing = generate(engine, ids, program)
    run(engine, reusing)
    assert reusing.outputs[-1].cached_tokens == 8 * warm
    assert_as_the_oracle(reusing, family, program)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_past_is_shared_with_plain_requests_in_both_directions(family: str) -> None:
    ids = random_ids(9)
    engine = engine_of(family)
    for program in (REUSING, None, REUSING):
        got = generate(engine, ids, program)
        run(engine, got)
        if program is not None:
            assert_as_the_oracle(got, family, program)
    assert got.outputs[-1].cached_tokens == 8
    fresh = engine_of(family)
    run(fresh, generate(fresh, ids, REUSING))
    plain, cold = generate(fresh, ids, None), engine_of(family, prefix_cache=False)
    alone = generate(cold, ids, None)
    run(fresh, plain)
    run(cold, alone)
    assert plain.outputs[-1].cached_tokens == 8
    assert plain.tokens() == alone.tokens()
    assert plain.logprobs() == pytest.approx(alone.logprobs(), abs=1e-11)


def test_what_it_writes_is_not_the_plain_past_of_a_longer_prompt() -> None:
    engine, ids = engine_of("llama"), random_ids(10)
    got = generate(engine, ids, REUSING)
    run(engine, got)
    longer = ids + got.tokens()[:4]
    plain = generate(engine, longer, None)
    run(engine, plain)
    assert plain.outputs[-1].cached_tokens == 8
    cold = engine_of("llama", prefix_cache=False)
    alone = generate(cold, longer, None)
    run(cold, alone)
    assert plain.logprobs() == pytest.approx(alone.logprobs(), abs=1e-11)


def test_a_score_is_changed_from_the_token_before_the_first_scored_one() -> None:
    ids = random_ids(11)
    engine = engine_of("llama")
    run(engine, generate(engine, ids, None))
    found = []
    for program, n_past in (
        (REUSING, 5),
        ({"steps": [STEER | {"pos": {"range": [5, 9]}}]}, -1),
    ):
        prompt = words(ids, n_past=n_past)
        got = ask(
            engine, ids, kind="score", score_from=6, intervention=carried("llama", program, prompt)
        )
        run(engine, got)
        assert got.outputs[-1].cached_tokens == 4
        found.append(got.prompt_logprobs())
    assert found[0] == pytest.approx(found[1], abs=1e-12)


@pytest.mark.parametrize("family", recurrent.FAMILIES)
def test_states_go_on_from_a_plain_snapshot(family: str) -> None:
    program = {"recompute": False, "steps": [
        STEER, {"at": "layers.0.gla.head.*.state", "do": "scale", "a": 0.5},
    ]}  # fmt: skip
    engine, ids = recurrent.engine_of(family), random_ids(12)
    run(engine, recurrent.generate(engine, ids, None))
    got = recurrent.generate(engine, ids, program)
    run(engine, got)
    assert got.outputs[-1].cached_tokens == 8
    recurrent.assert_as_the_oracle(got, family, program)
