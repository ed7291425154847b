"""Programs on models that carry a state: the live engine against the oracle, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.edits.recurrent_models import RECURRENT, recurrent_model
from tests.edits.small_models import MAIN, encode, random_ids, words
from tests.engine.drive import Inquiry, run, settle, small_engine
from tests.engine.test_programs_runs import ask, carried, no_runs_left, oracle, result, same

from invivo.edits.blobs import Blobs
from invivo.edits.oracle import run_program
from invivo.edits.program import parse_program
from invivo.edits.resolve import resolve
from invivo.engine import run_edits
from invivo.engine.engine import Engine
from invivo.engine.types import Intervention
from invivo.models.cache import bytes_per_block, bytes_per_slot
from invivo.models.load import LoadedModel

FAMILIES = list(RECURRENT)
N_NEW = 5
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0}


def engine_of(family: str, **options: Any) -> Engine:
    decoder = recurrent_model(family)
    loaded = LoadedModel(family, Path(), decoder.config, decoder, None, family)
    small: dict[str, Any] = {"block_size": 4, "max_running": 6, "max_batch_tokens": 13}
    small |= {"snapshot_tokens": 4}
    return small_engine(loaded, **(small | options))


def generate(
    engine: Engine, ids: list[int], program: dict[str, Any] | None, **more: Any
) -> Inquiry:
    if program is not None:
        prompt = words(ids, n_prompt=len(ids), n_new=N_NEW)
        more["intervention"] = of_text(engine.model.name, program, prompt)
    return ask(engine, more.pop("intervention", None), words(ids), "generate",
               max_tokens=N_NEW, **GREEDY, **more)  # fmt: skip


def of_text(family: str, program: dict[str, Any], prompt: Any) -> Intervention:
    parsed = parse_program(program)
    return Intervention(
        resolve(parsed, RECURRENT[family], {"main": prompt}, encode=encode), Blobs()
    )


def assert_as_the_oracle(got: Inquiry, family: str, program: dict[str, Any]) -> None:
    """One dense pass over all tokens that went through the model."""
    ids, tokens = list(got.request.tokens), got.tokens()
    assert got.reason() == "length", got.outputs[-1].error
    prompt = words(ids + tokens[:-1], n_prompt=len(ids), n_new=N_NEW)
    with torch.no_grad():
        (expected,) = run_program(
            recurrent_model(family), of_text(family, program, prompt).resolved
        )
    logits = expected.logits["main"][len(ids) - 1 :]
    assert tokens == logits.argmax(-1).tolist()
    chosen = torch.log_softmax(logits, -1)[range(len(tokens)), tokens]
    assert got.logprobs() == pytest.approx(chosen.tolist(), abs=1e-9)
    output = got.outputs[-1].program
    assert output is not None
    for mine, theirs in zip(output.rows[0].captures, expected.captures, strict=True):
        torch.testing.assert_close(mine.value, theirs.value, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(output.rows[0].measures, expected.measures, strict=True):
        torch.testing.assert_close(mine.values, theirs.values.to(mine.values), rtol=1e-9, atol=1e-9)


POSITIONS = st.sampled_from(
    ["@all", "@last", "@prompt", "@generated", {"range": [1, 4]}, {"index": [0, 5]},
     {"generated": [1, 3]}]
)  # fmt: skip
PLACES = st.tuples(
    st.sampled_from(["0", "2", "[0,2]"]),
    st.sampled_from(["0", "1", "*"]),
    st.sampled_from(["q", "k", "v", "gate", "memory", "state", "z"]),
).map(lambda p: f"layers.{p[0]}.gla.head.{p[1]}.{p[2]}")
STATES = PLACES.filter(lambda name: name.endswith(("state", "memory")))
ROWS = st.sampled_from(
    [{"do": "zero"}, {"do": "scale", "a": 0.5}, {"do": "add", "v": 0.2}, {"do": "set", "x": 0.3},
     {"do": "clamp", "min": -0.2, "max": 0.4}, {"do": "noise", "s": 0.1}]
)  # fmt: skip
EDGES = st.sampled_from([{"do": "edge_block"}, {"do": "edge_only"}, {"do": "edge_scale", "a": 0.3}])


@st.composite
def steps(draw: st.DrawFn, *, shares: bool) -> dict[str, Any]:
    """Either states are changed or keys' shares in them, never both: that is refused."""
    if shares and draw(st.booleans()):
        at = draw(st.sampled_from(["layers.2.gla.edge", "layers.*.gla.head.1.edge"]))
        return {"at": at, "from": draw(POSITIONS), "to": draw(POSITIONS), **draw(EDGES)}
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.sampled_from(["layers.0.resid.post", "layers.2.attn.out", "layers.1.mlp.out"]))
        return {"at": at, "pos": draw(POSITIONS), **draw(ROWS)}
    at = draw(PLACES.filter(lambda name: not name.endswith(("state", "memory"))))
    if not shares and draw(st.booleans()):
        if draw(st.booleans()):
            return {"at": draw(STATES), "pos": draw(POSITIONS), "do": "state_reset"}
        at = draw(STATES)
    return {"at": at, "pos": draw(POSITIONS), **draw(ROWS)}


OUTPUTS = st.one_of(
    st.builds(lambda at, pos, when: {"capture": at, "pos": pos, "when": when},
              PLACES, POSITIONS, st.sampled_from(["before", "after"])),
    st.just({"capture": "layers.*.gla.head.*.state", "pos": "@last", "reduce": "norm"}),
    st.just({"measure": "logprob", "token": 7, "pos": "@all"}),
)  # fmt: skip


@st.composite
def programs(draw: st.DrawFn) -> dict[str, Any]:
    shares = draw(st.booleans())
    return {
        "steps": draw(st.lists(steps(shares=shares), max_size=3)),
        "out": draw(st.lists(OUTPUTS, max_size=2)),
    }


@settings(
    max_examples=15, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(
    family=st.sampled_from(FAMILIES),
    asked=st.lists(st.one_of(st.none(), programs()), min_size=1, max_size=4),
    rows=st.sampled_from([7, 13, 64]),
    n_blocks=st.sampled_from([7, 60]),
    again=st.booleans(),
)
def test_any_program_beside_any_others_does_what_the_oracle_says(
    family: str, asked: list[dict[str, Any] | None], rows: int, n_blocks: int, again: bool
) -> None:
    config = RECURRENT[family]
    slot = bytes_per_slot(config, dtype=torch.float64)
    memory = n_blocks * bytes_per_block(config, block_size=4, dtype=torch.float64)
    engine = engine_of(
        family, max_batch_tokens=rows, max_jobs=1, snapshot_bytes=9 * slot,
        kv_bytes=(8 + 9) * slot + memory,
    )  # fmt: skip
    common = random_ids(3, 6)  # so that prefixes recur
    for _ in range(1 + again):
        inquiries = [
            (generate(engine, [*common, 8 + i % 2, 3], program), program)
            for i, program in enumerate(asked)
        ]
        run(engine, *[inquiry for inquiry, _ in inquiries])
        for inquiry, program in inquiries:
            if program is None:
                apart = engine_of(family, prefix_cache=False)
                alone = generate(apart, list(inquiry.request.tokens), None)
                run(apart, alone)
                assert inquiry.tokens() == alone.tokens()
                assert inquiry.logprobs() == pytest.approx(alone.logprobs(), abs=1e-10)
            else:
                assert_as_the_oracle(inquiry, family, program)


# Several runs, sweeps: sources in states of other runs.

RUNS: list[dict[str, Any]] = [
    {"steps": [{"at": "layers.*.gla.head.*.state", "do": "state_replace", "pos": {"index": 4},
                "from": "cf"}]},
    {"steps": [{"at": "layers.2.gla.head.1.state", "do": "lerp", "w": 0.3, "from": "cf"}]},
    {"steps": [{"at": "layers.0.gla.head.*.state", "do": "scale", "a": 0.5, "run": "cf"},
               {"at": "layers.2.gla.head.0.memory", "do": "replace", "pos": {"range": [2, 7]},
                "from": {"run": "cf", "at": "layers.0.gla.head.1.state", "pos": {"index": 3},
                         "map": "one"}}]},
    {"steps": [{"at": "layers.0.gla.head.*.state", "do": "mean", "over": ["cf", "plain"],
                "positions": "each", "pos": {"index": [2, 6]}},
               {"at": "layers.2.gla.head.1.memory", "do": "mean", "over": ["cf"],
                "positions": "all", "pos": {"index": 5}}]},
    {"steps": [{"at": "layers.0.gla.head.*.state", "do": "project_out",
                "basis": [[0.6, 0.8, 0, 0, 0, 0, 0, 0]]},
               {"at": "layers.2.gla.head.0.state[1,3-5]", "do": "swap_coords", "from": "cf",
                "basis": [[0, 0, 1, 0]], "pos": {"range": [1, 8]}},
               {"at": "layers.*.gla.head.*.gate", "do": "resample", "pool": ["cf"]}]},
    {"steps": [{"at": "layers.*.gla.head.*.state", "do": "freeze", "to": "cf", "pos": "@last",
                "except": "layers.0.gla.head.1.state"},
               {"at": "layers.2.attn", "do": "skip", "pos": {"index": 3}}]},
    {"steps": [{"at": "layers.[0,2].gla.head.*.z", "do": "freeze"},
               {"at": "layers.0.gla.head.*.k", "do": "zero"}]},
    {"sweep": {"L": [0, 2], "T": "2..4"},
     "steps": [{"at": "layers.$L.gla.head.*.state", "do": "state_reset", "pos": {"index": "$T"}}]},
    {"sweep": {"T": "0..6"},
     "steps": [{"at": "layers.*.gla.edge", "do": "edge_block", "from": {"index": "$T"},
                "to": "@last"}]},
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("program", RUNS)
def test_runs_and_sweeps_are_those_of_the_oracle(family: str, program: dict[str, Any]) -> None:
    out = [{"measure": "logprob", "token": 7, "pos": "@all"}]
    out += [{"capture": "layers.2.gla.head.*.state", "pos": {"index": [3, -1]}}]
    engine = engine_of(family)
    given = carried(engine, program | {"out": out})
    for _ in range(2):  # the second time beginnings are known
        inquiry = ask(engine, given)
        run(engine, inquiry)
        same(result(inquiry), oracle(engine, given))
    no_runs_left(engine)


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_changes_no_bit(family: str) -> None:
    engine, ids = engine_of(family, prefix_cache=False), random_ids(4)
    plain = generate(engine, ids, None)
    run(engine, plain)
    for program in (
        {"out": [{"capture": "layers.*.gla.head.*.state"}, {"measure": "prob", "token": 3}]},
        {"steps": [{"at": "layers.0.gla.head.*.memory", "do": "scale", "a": 1}]},
        {"steps": [{"at": "layers.2.gla.head.1.gate", "do": "scale", "a": 1}]},
    ):
        looked = generate(engine, ids, program)
        run(engine, looked)
        assert looked.tokens() == plain.tokens()
        assert looked.logprobs() == plain.logprobs()


def captures(engine: Engine, program: dict[str, Any]) -> list[torch.Tensor]:
    inquiry = ask(engine, carried(engine, program))
    run(engine, inquiry)
    return [c.value for c in result(inquiry).rows[0].captures]


@pytest.mark.parametrize("family", FAMILIES)
def test_laws_2_to_4_on_the_live_engine(family: str) -> None:
    engine = engine_of(family, max_batch_tokens=7)
    # 2: from a replaced residual stream on everything is the other run's.
    logits = [{"capture": "logits"}, {"capture": "logits", "run": "cf"}]
    for layer in range(3):
        step = {"at": f"layers.{layer}.resid.post", "do": "replace", "from": "cf"}
        mine, theirs = captures(engine, {"steps": [step], "out": logits})
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    # 3: what is captured satisfies the recurrence.
    names = ("q", "k", "v", "gate", "memory", "state", "z")
    out = [{"capture": f"layers.2.gla.head.*.{name}"} for name in names]
    q, k, v, gate, memory, state, z = captures(engine, {"out": out})
    torch.testing.assert_close(memory[1:], state[:-1], rtol=1e-11, atol=1e-11)
    written = gate[..., None] * memory + k[..., None] * v[..., None, :]
    torch.testing.assert_close(state, written, rtol=1e-11, atol=1e-11)
    read = torch.einsum("thk,thkv->thv", q * q.shape[-1] ** -0.5, state)
    torch.testing.assert_close(z, read, rtol=1e-11, atol=1e-11)
    # 4: nothing before the first touch changes, what comes behind it does.
    out = [{"capture": "layers.*.resid.post"}]
    step = {"at": "layers.0.gla.head.*.state", "do": "scale", "a": 3, "pos": {"index": 4}}
    plain, changed = captures(engine, {"out": out}), captures(engine, {"steps": [step], "out": out})
    for before, after in zip(plain, changed, strict=True):
        torch.testing.assert_close(before[:4], after[:4], rtol=1e-11, atol=1e-11)
        assert (before[4:] - after[4:]).abs().max() > 1e-4


def test_law_10_on_the_live_engine() -> None:
    """A memory emptied in all layers: the answer of the rest of the prompt alone."""
    engine = engine_of("gla")
    ids, cut = random_ids(9, 11), 6
    reset = {"at": "layers.*.gla.head.*.state", "do": "state_reset", "pos": {"index": cut}}
    changed = generate(engine, ids, {"steps": [reset]})
    rest = generate(engine, ids[cut:], None)
    edge = {"at": "layers.*.gla.edge", "do": "edge_block", "from": {"range": [2, 4]}, "to": "@all"}
    key = {"at": "layers.*.gla.head.*.k", "do": "zero", "pos": {"range": [2, 4]}}
    pair = [generate(engine, ids, {"steps": [step]}) for step in (edge, key)]
    run(engine, changed, rest, *pair)
    assert changed.tokens() == rest.tokens()
    assert changed.logprobs() == pytest.approx(rest.logprobs(), abs=1e-10)
    assert pair[0].tokens() == pair[1].tokens()
    assert pair[0].logprobs() == pytest.approx(pair[1].logprobs(), abs=1e-10)


def test_a_key_is_followed_from_before_the_first_query_that_misses_it() -> None:
    """The prompt's beginning is known, but not what its keys have left in it: it runs again."""
    engine, ids = engine_of("gla"), random_ids(5, 10)
    run(engine, generate(engine, ids, None))
    edge = {"at": "layers.1.gla.edge", "do": "edge_block", "from": {"index": 5}, "to": "@generated"}
    program = {"steps": [edge]}
    for cached in (0, 4):  # the first time it leaves a snapshot there
        inquiry = generate(engine, ids, program)
        run(engine, inquiry)
        assert inquiry.outputs[-1].cached_tokens == cached
        assert_as_the_oracle(inquiry, "gla", program)


@pytest.mark.parametrize("where", ["state", "share"])
def test_an_operation_that_raises_ends_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    engine, ids = engine_of("gla", max_batch_tokens=7), random_ids(6, 12)

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("made to fail")

    name = "change_rows" if where == "state" else "key_share"
    monkeypatch.setattr(run_edits, name, fails)
    step: dict[str, Any] = {"at": "layers.1.gla.head.0.state", "do": "scale", "a": 2}
    if where == "share":
        step = {"at": "layers.1.gla.edge", "do": "edge_block", "from": {"index": 1}, "to": "@all"}
    broken = generate(engine, ids, {"steps": [step]})
    plain = generate(engine, ids, None)
    run(engine, broken, plain)
    assert broken.reason() == "error"
    assert "made to fail" in str(broken.outputs[-1].error)
    run_alone = engine_of("gla", prefix_cache=False)
    alone = generate(run_alone, ids, None)
    run(run_alone, alone)
    assert plain.logprobs() == pytest.approx(alone.logprobs(), abs=1e-10)
    monkeypatch.undo()
    again = generate(engine, ids, {"steps": [step]})  # nothing wrong was left to be found
    run(engine, again)
    assert_as_the_oracle(again, "gla", {"steps": [step]})


def test_an_abort_leaves_nothing() -> None:
    engine = engine_of("hybrid", max_batch_tokens=7)
    inquiry = ask(engine, carried(engine, {"out": [{"capture": "layers.*.gla.head.*.state"}]}))
    engine.step()
    engine.abort(inquiry.request.id)
    settle(engine)
    no_runs_left(engine)
    assert inquiry.reason() == "cancelled"
    program = carried(engine, RUNS[0] | {"out": [{"measure": "logit", "token": 2}]})
    later = ask(engine, program, MAIN)
    run(engine, later)
    same(result(later), oracle(engine, program))
