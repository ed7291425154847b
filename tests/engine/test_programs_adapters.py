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


KIND_OF = {"poet": "lora", "judge": "ia3", "clerk": "adapter"}


def publish(engine: Engine, name: str) -> None:
    specs = KINDS[KIND_OF[name]]
    parameters = random_parameters(engine.model.config, specs, dtype=torch.float64)
    engine.adapters.publish(name, specs, parameters)


def engine_with_adapter(family: str = "llama", **options: Any) -> Engine:
    engine = engine_of(family, **options)
    publish(engine, "poet")
    return engine


def engine_with_three(family: str = "llama", **options: Any) -> Engine:
    engine = engine_of(family, **options)
    for name in KIND_OF:
        publish(engine, name)
    return engine


def expected(engine: Engine, program: Intervention) -> list[Any]:
    config = engine.model.config
    adapters = {}
    for name, kind in KIND_OF.items():
        parameters = random_parameters(config, KINDS[kind], dtype=torch.float64)
        bypass = TrainBypass(config, KINDS[kind], parameters)
        adapters[name] = bypass.window(0, len(MAIN.ids))
    with torch.no_grad():
        return run_program(engine.model.decoder, program.resolved, adapters=adapters)


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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_runs_of_one_program_have_different_adapters(family: str) -> None:
    """One is patched with what another's weights make of the same prompt, a third changes by row:
    the answers are the interpreter's, cold and with what the first has left in the cache."""
    runs: dict[str, Any] = {
        "cf": {"prompt": "other"},
        "tuned": {"same": "main", "adapter": "poet"},
        "ruled": {"same": "main", "adapter": "judge"},
    }
    program = {
        "runs": runs,
        "sweep": {"A": ["poet", "judge", "clerk"]},
        "steps": [
            {"at": "weights.delta", "do": "use", "adapter": "$A"},
            {"run": "tuned", "at": "layers.1.attn.out", "do": "replace", "from": "ruled"},
            {"at": "layers.1.resid.post", "pos": "@last", "do": "replace", "from": "tuned"},
        ],
        "out": [
            {"measure": "kl", "to": "ruled"},
            {"measure": "kl", "to": "plain"},
            {"capture": "layers.2.resid.post", "pos": "@last"},
        ],
    }
    engine = engine_with_three(family)
    carry = carried(engine, program)
    for _ in range(2):
        mates = [ask(engine, None, OTHER, "score", adapter=name) for name in KIND_OF]
        got = ask(engine, carry)
        run(engine, got, *mates)
        same(result(got), expected(engine, carry))
    no_runs_left(engine)


def test_a_text_of_one_adapter_reads_a_run_of_another() -> None:
    """And a new version of that adapter is another run: nothing of the old one is found."""
    ids = random_ids(31, 11)
    text = words(ids, n_prompt=len(ids), n_new=5)
    program = {
        "runs": {"cf": {"prompt": "other"}, "ruled": {"same": "main", "adapter": "judge"}},
        "steps": [
            {"at": "layers.1.resid.post", "pos": "@prompt", "do": "replace", "from": "ruled"}
        ],
    }

    def patched(engine: Engine) -> tuple[list[int], list[float]]:
        inquiry = ask(
            engine, carried(engine, program, text), words(ids), "generate", adapter="poet", **GREEDY
        )
        run(engine, inquiry)
        return inquiry.tokens(), inquiry.logprobs()

    engine = engine_with_three()
    first = patched(engine)
    assert patched(engine)[1] == pytest.approx(first[1], abs=1e-12)
    assert first[1] != pytest.approx(written(engine, ids, adapter="poet")[1], abs=1e-6)
    specs = KINDS["ia3"]
    newer = random_parameters(engine.model.config, specs, dtype=torch.float64, seed=7)
    engine.adapters.publish("judge", specs, newer)
    fresh = engine_with_three()
    fresh.adapters.publish("judge", specs, newer)
    again, wanted = patched(engine), patched(fresh)
    assert again[0] == wanted[0]
    assert again[1] == pytest.approx(wanted[1], abs=1e-12)
    assert again[1] != pytest.approx(first[1], abs=1e-6)
    no_runs_left(engine)


def test_a_program_takes_all_its_slots_or_none() -> None:
    """Two programs that want two of two slots each, in the other order, with others between."""
    looks = [
        {
            "runs": {
                "cf": {"prompt": "other"},
                "a": {"same": "main", "adapter": a},
                "b": {"same": "main", "adapter": b},
            },
            "out": [{"measure": "kl", "to": "a"}, {"measure": "kl", "to": "b"}],
        }
        for a, b in (("poet", "judge"), ("judge", "clerk"), ("clerk", "poet"))
    ]
    engine = engine_with_three(max_adapters=2)
    carries = [carried(engine, look) for look in looks]
    mates = [ask(engine, None, OTHER, "score", adapter=name) for name in KIND_OF]
    asked = [ask(engine, carry) for carry in carries]
    run(engine, *mates, *asked)
    for got, carry in zip(asked, carries, strict=True):
        same(result(got), expected(engine, carry))
    with pytest.raises(InvalidRequest, match="at most 2 adapters"):
        ask(engine, carries[0], adapter="clerk")
    for name in KIND_OF:
        engine.adapters.unload(name)
    assert all(adapter.users == 0 for adapter in engine.adapters._in_slot if adapter is not None)
    no_runs_left(engine)
