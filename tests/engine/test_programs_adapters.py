"""Programs whose runs use an adapter: each run has its own weights, nobody else's prefixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.edits.small_models import MAIN, OTHER, random_ids, words
from tests.engine.bypass_cases import KINDS, random_parameters
from tests.engine.drive import run
from tests.engine.test_programs_runs import ask, carried, engine_of, no_runs_left, result, same

from invivo.edits.oracle import run_program
from invivo.engine.bypasses import TrainBypass
from invivo.engine.engine import Engine
from invivo.engine.types import Intervention
from invivo.errors import InvalidRequest

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 5, "ignore_eos": True, "logprobs": 0}
TWO_RUNS: dict[str, Any] = {"cf": {"prompt": "other"}, "tuned": {"same": "main", "adapter": "poet"}}
LOOKING = {
    "runs": TWO_RUNS,
    "out": [{"capture": "layers.*.resid.post", "pos": "@last", "run": "tuned"}],
}


def engine_with_adapter(family: str = "llama", **options: Any) -> Engine:
    engine = engine_of(family, **options)
    specs = KINDS["lora"]
    parameters = random_parameters(engine.model.config, specs, dtype=torch.float64)
    engine.adapters.publish("poet", specs, parameters)
    return engine


def expected(engine: Engine, program: Intervention) -> list[Any]:
    config, specs = engine.model.config, KINDS["lora"]
    bypass = TrainBypass(config, specs, random_parameters(config, specs, dtype=torch.float64))
    with torch.no_grad():
        return run_program(
            engine.model.decoder,
            program.resolved,
            adapters={"poet": bypass.window(0, len(MAIN.ids))},
        )


def written(engine: Engine, ids: list[int], **more: Any) -> tuple[list[int], list[float]]:
    inquiry = ask(engine, None, words(ids), "generate", **GREEDY, **more)
    run(engine, inquiry)
    return inquiry.tokens(), inquiry.logprobs()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_says_which_weights_a_run_has(family: str) -> None:
    """Any run's, in any row: the answers are those of runs that name the adapter themselves."""
    engine = engine_with_adapter(family)
    use = {"at": "weights.delta", "do": "use", "adapter": "poet"}
    out = [{"measure": "kl", "to": "tuned"}, {"measure": "kl", "to": "plain"}]
    runs: dict[str, Any] = {"cf": {"prompt": "other"}, "tuned": {"same": "main"}}
    sweep = {"r": ["main", "tuned"]}
    carry = carried(
        engine, {"runs": runs, "sweep": sweep, "steps": [use | {"run": "$r"}], "out": out}
    )
    got = ask(engine, carry)
    run(engine, got)
    same(result(got), expected(engine, carry))
    named = carried(engine, {"runs": TWO_RUNS, "out": out})
    (wanted,) = expected(engine, named)
    rows = result(got).rows
    assert rows[0].measures[0].values > 1e-4  # main has the adapter, "tuned" and "plain" have not
    torch.testing.assert_close(rows[0].measures[0].values, rows[0].measures[1].values)
    assert rows[1].measures[1].values.abs() < 1e-12
    torch.testing.assert_close(rows[1].measures[0].values, wanted.measures[0].values)
    no_runs_left(engine)


def test_what_a_step_cannot_do_to_weights_is_refused() -> None:
    engine = engine_with_adapter()
    use = {"at": "weights.delta", "do": "use", "adapter": "poet"}
    for steps, runs, field in (
        ([use, use], {}, "steps[1].adapter"),
        ([use | {"run": "tuned"}], TWO_RUNS, "steps[0].adapter"),
        ([use | {"at": "layers.0.resid.post"}], {}, "steps[0].at"),
        ([{"at": "weights.delta", "do": "zero"}], {}, "steps[0].at"),
        ([use | {"run": "nobody"}], {}, "steps[0].run"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            carried(engine, {"steps": steps, "runs": {"cf": {"prompt": "other"}} | runs})
        assert refused.value.field == field
    with pytest.raises(InvalidRequest, match="request's own"):
        ask(engine, carried(engine, {"steps": [use]}), kind="generate")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_runs_with_and_without_an_adapter_are_those_of_the_interpreter(family: str) -> None:
    program = {
        "runs": TWO_RUNS,
        "sweep": {"L": "0..2"},
        "steps": [
            {"at": "layers.$L.attn.out", "pos": "@last", "do": "replace", "from": "tuned"},
            {"run": "tuned", "at": "layers.0.mlp.out", "do": "scale", "a": 0.5},
        ],
        "out": [
            {"measure": "kl", "to": "plain"},
            {"measure": "kl", "to": "tuned"},
            {"capture": "layers.2.resid.post", "pos": "@last"},
        ],
    }
    engine = engine_with_adapter(family)
    carry = carried(engine, program)
    for _ in range(2):  # the second time with what the first has left in the cache
        got, mate = ask(engine, carry), ask(engine, None, OTHER, "score", adapter="poet")
        run(engine, got, mate)
        same(result(got), expected(engine, carry))
    no_runs_left(engine)


@pytest.mark.parametrize("kind", ["generate", "score", "embed"])
def test_a_text_keeps_its_weights_where_another_run_has_an_adapter(kind: str) -> None:
    """And what it leaves in the cache is what a plain request would leave."""
    ids = random_ids(31, 11)
    plain, tuned = (written(engine_with_adapter(), ids, adapter=name) for name in (None, "poet"))
    assert plain[0] != tuned[0]
    engine = engine_with_adapter()
    carry = carried(engine, LOOKING, words(ids, n_prompt=len(ids), n_new=5))
    looked = ask(engine, carry, words(ids), kind, **(GREEDY if kind == "generate" else {}))
    run(engine, looked)
    if kind == "generate":
        assert looked.tokens() == plain[0]
        assert looked.logprobs() == pytest.approx(plain[1], abs=1e-12)
    for name, wanted in ((None, plain), ("poet", tuned)):
        after = written(engine, ids, adapter=name)
        assert after[0] == wanted[0]
        assert after[1] == pytest.approx(wanted[1], abs=1e-12)
    no_runs_left(engine)


def test_an_adapter_that_a_program_waited_for_is_given_back() -> None:
    engine = engine_with_adapter(max_adapters=1)
    for number in range(2):  # the second one needs the only slot
        name = f"other{number}"
        specs = KINDS["ia3"]
        engine.adapters.publish(name, specs, random_parameters(engine.model.config, specs))
        asked = [
            ask(engine, carried(engine, LOOKING)),
            ask(engine, None, OTHER, "score", adapter=name),
        ]
        run(engine, *asked)
        assert all(one.outputs[-1].error is None for one in asked)
        engine.adapters.unload(name)
    no_runs_left(engine)
