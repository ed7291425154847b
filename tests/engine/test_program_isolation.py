"""What one request's program does wrong reaches nobody else: neighbours, caches, jobs, memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.edits.small_models import CONFIGS, MAIN, encode, random_ids, words
from tests.engine.drive import Inquiry, run
from tests.engine.test_programs_recurrent import engine_of as recurrent_engine
from tests.engine.test_programs_runs import ask, carried, engine_of, no_runs_left, result
from tests.engine.test_programs_runs import programs as random_programs

from invivo.edits.program import parse_program
from invivo.edits.resolve import resolve
from invivo.engine import programs, run_edits
from invivo.engine.engine import Engine
from invivo.engine.types import Intervention
from invivo.errors import InvalidRequest, InvivoError, TooLarge

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0, "max_tokens": 6}
N_NEW = 6
CANARY = 12345.0


def writing(engine: Engine, program: dict[str, Any]) -> Intervention:
    prompt = words(list(MAIN.ids), n_prompt=len(MAIN.ids), n_new=N_NEW)
    return carried(engine, program, prompt)


def plain(engine: Engine, n: int, seed: int) -> Inquiry:
    ids = random_ids(seed, n)
    return ask(engine, None, words(ids, n_prompt=n), "generate", **GREEDY)


def alone(family: str, n: int, seed: int) -> Inquiry:
    engine = engine_of(family)
    inquiry = plain(engine, n, seed)
    run(engine, inquiry)
    return inquiry


def assert_same(got: Inquiry, wanted: Inquiry) -> None:
    assert got.outputs[-1].error is None, got.outputs[-1].error
    assert got.tokens() == wanted.tokens()
    assert got.logprobs() == pytest.approx(wanted.logprobs(), rel=0, abs=1e-12)


class Fault(RuntimeError):
    """What an operation raises where a test says so."""


def breaking(monkeypatch: pytest.MonkeyPatch, where: str, fault: Callable[[], Exception]) -> None:
    """Operations of step 0 raise where ``where`` says."""
    if where == "keep":

        def reduce(*args: Any) -> Any:
            raise fault()

        monkeypatch.setattr(programs, "reduce_capture", reduce)
        return
    name = "apply_switch" if where == "edge" else "change_rows"
    real = getattr(run_edits, name)

    def changed(touch: Any, *args: Any) -> Any:
        if touch.do in ("noise", "edge_scale"):
            raise fault()
        return real(touch, *args)

    monkeypatch.setattr(run_edits, name, changed)


def noise(at: str, pos: object = "@all") -> dict[str, Any]:
    return {"steps": [{"at": at, "pos": pos, "do": "noise", "s": 1.0}]}


BROKEN: dict[str, dict[str, Any]] = {
    "start": noise("embed.out"),
    "middle": noise("layers.1.attn.head.2.z", {"range": [3, 6]}),
    "keys": noise("layers.1.attn.kvhead.0.k"),
    "decode": noise("layers.2.resid.post", {"generated": [2, 3]}),
    "logits": noise("logits"),
    "edge": {
        "steps": [
            {"at": "layers.1.attn.edge", "do": "edge_scale", "a": 0.5, "from": "@first",
             "to": "@last"}
        ]
    },
    "keep": {"out": [{"capture": "layers.1.resid.post", "reduce": "norm"}]},
}  # fmt: skip


@pytest.mark.parametrize("where", BROKEN)
@pytest.mark.parametrize(("family", "overlap"), [("llama", False), ("llama", True), ("moe", True)])
def test_an_operation_that_raises_ends_its_own_request_alone(
    where: str, family: str, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [alone(family, 9, 3), alone(family, 4, 5)]
    engine = engine_of(family, overlap=overlap)
    breaking(monkeypatch, where, Fault)
    neighbours = [plain(engine, 9, 3)]
    broken = ask(engine, writing(engine, BROKEN[where]), MAIN, "generate", **GREEDY)
    same_prompt = ask(engine, None, MAIN, "generate", **GREEDY)
    other = ask(engine, writing(engine, {"out": [{"capture": "layers.0.resid.post"}]}), MAIN)
    neighbours.append(plain(engine, 4, 5))
    run(engine, broken, *neighbours, same_prompt, other)
    for got, wanted in zip(neighbours, expected, strict=True):
        assert_same(got, wanted)
    error = broken.outputs[-1].error
    assert isinstance(error, InvalidRequest)
    assert error.field == "interventions"
    assert isinstance(error.__cause__, Fault)
    assert broken.reason() == "error"
    fresh = engine_of(family)
    twin = ask(fresh, None, MAIN, "generate", **GREEDY)
    run(fresh, twin)
    assert_same(same_prompt, twin)
    result(other)
    no_runs_left(engine)


def test_memory_that_an_operation_lacks_is_its_own_trouble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of("llama")
    breaking(monkeypatch, "start", torch.OutOfMemoryError)
    broken = ask(engine, writing(engine, BROKEN["start"]), MAIN, "generate", **GREEDY)
    run(engine, broken)
    assert isinstance(broken.outputs[-1].error, TooLarge)
    no_runs_left(engine)


def test_one_run_of_a_sweep_that_raises_ends_the_whole_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of("llama")
    breaking(monkeypatch, "start", Fault)
    sweep = noise("layers.$L.resid.post") | {
        "sweep": {"L": "0..2"},
        "out": [{"measure": "logit", "token": 3}],
    }
    broken = ask(engine, carried(engine, sweep))
    beside = ask(engine, carried(engine, {"out": [{"measure": "logit", "token": 3}]}))
    run(engine, broken, beside)
    assert isinstance(broken.outputs[-1].error, InvalidRequest)
    result(beside)
    no_runs_left(engine)


@pytest.mark.parametrize(
    "made",
    [partial(engine_of, "llama"), partial(recurrent_engine, "hybrid")],
    ids=["keys", "states"],
)
def test_what_was_not_changed_as_asked_is_found_by_nobody(
    made: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same program again shares the changed keys, but never those of a run that failed."""
    ids = random_ids(8, 18)
    program = noise("layers.0.resid.post")

    def asked(engine: Engine) -> Inquiry:
        prompt = words(ids, n_prompt=len(ids), n_new=N_NEW)
        return ask(engine, carried(engine, program, prompt), prompt, "generate", **GREEDY)

    fresh = made()
    wanted = asked(fresh)
    run(fresh, wanted)
    engine = made(max_batch_tokens=64)
    with monkeypatch.context() as patch:
        breaking(patch, "start", Fault)
        twins = [asked(engine), asked(engine)]  # the second shares what the first computes
        run(engine, *twins)
        assert all(twin.reason() == "error" for twin in twins)
    again = asked(engine)
    run(engine, again)
    assert_same(again, wanted)
    assert again.outputs[-1].cached_tokens == 0


# Random programs, and hostile ones, beside plain requests.


@settings(
    max_examples=14,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    family=st.sampled_from(["llama", "gemma", "moe", "gpt2"]),
    changes=st.lists(random_programs(), min_size=1, max_size=3),
    rows=st.sampled_from([7, 64]),
    overlap=st.booleans(),
)
def test_no_program_changes_a_neighbour(
    family: str, changes: list[dict[str, Any]], rows: int, overlap: bool
) -> None:
    engine = engine_of(family, max_batch_tokens=rows, overlap=overlap)
    neighbours = [plain(engine, 9, 3)]
    edited = [ask(engine, carried(engine, change)) for change in changes]
    neighbours.append(plain(engine, 4, 5))
    run(engine, *neighbours, *edited)
    for got, (n, seed) in zip(neighbours, [(9, 3), (4, 5)], strict=True):
        assert_same(got, _alone(family, n, seed))
    no_runs_left(engine)


HUGE = 1e300
HOSTILE = st.sampled_from(
    [
        # refused before anything runs
        {"sweep": {"a": "0..99", "b": "0..99"}, "steps": [{"at": "embed.out", "do": "zero"}]},
        {"steps": [{"at": "layers.0.resid.post", "do": "replace", "from": "cf"},
                   {"run": "cf", "at": "layers.0.resid.post", "do": "replace", "from": "main"}]},
        {"steps": [{"at": "layers.9.resid.post", "do": "zero"}]},
        {"steps": [{"at": "layers.0.attn.heads.z", "do": "zero"}]},
        {"steps": [{"at": "layers.0.resid.post", "do": "add", "v": [1.0, 2.0]}]},
        {"steps": [{"at": "layers.0.resid.post", "do": "add", "v": "blob:sha256:" + "0" * 64}]},
        {"steps": [{"at": "layers.0.resid.post", "do": "scale", "a": float("nan")}]},
        {"steps": [{"at": "layers.0.resid.post", "pos": {"span": "nowhere"}, "do": "zero"}]},
        {"steps": [{"at": "layers.0.resid.post", "pos": {"range": [0, 10**9]}, "do": "zero"}]},
        {"sel": {"a": "@b", "b": "@a"}, "steps": [{"at": "embed.out", "pos": "@a", "do": "zero"}]},
        {"out": [{"capture": "logits", "pos": "@all"}] * 300},
        {"out": [{"capture": "layers.*.attn.head.*.prob"}] * 200},
        {"steps": [[[[]]]], "out": {}},
        # carried, and bad for nobody else
        {"steps": [{"at": "layers.*.resid.post", "do": "scale", "a": HUGE}]},
        {"steps": [{"at": "layers.0.attn.kvhead.*.k", "do": "scale", "a": HUGE}]},
        {"steps": [{"at": "layers.1.attn.kvhead.*.v", "do": "scale", "a": HUGE},
                   {"at": "layers.1.attn.kvhead.*.v", "do": "scale", "a": HUGE}]},
        {"steps": [{"at": "logits", "do": "scale", "a": HUGE},
                   {"at": "logits", "do": "scale", "a": -HUGE}]},
        {"steps": [{"at": "input.mask", "do": "edge_block", "from": "@all", "to": "@all"}]},
        {"steps": [{"at": "final.norm.scale", "do": "set", "x": -HUGE}],
         "out": [{"capture": "layers.*.resid.post"}, {"capture": "logits", "pos": "@all"}]},
    ]
)  # fmt: skip
SAMPLING = st.sampled_from(
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 0.7, "top_k": 3, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1.3},
    ]
)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    family=st.sampled_from(["llama", "gemma", "moe"]),
    hostile=st.lists(st.tuples(HOSTILE, SAMPLING), min_size=1, max_size=3),
    rows=st.sampled_from([7, 64]),
)
def test_hostile_programs_beside_plain_requests(
    family: str, hostile: list[tuple[dict[str, Any], dict[str, Any]]], rows: int
) -> None:
    engine = engine_of(family, max_batch_tokens=rows, max_capture_bytes=1 << 14)
    neighbours = [plain(engine, 9, 3)]
    going: list[Inquiry] = []
    errors: list[InvivoError | None] = []
    for program, sampling in hostile:
        try:
            carry = writing(engine, program)
            going.append(ask(engine, carry, MAIN, "generate", **(GREEDY | sampling)))
        except InvivoError as refused:
            errors.append(refused)
    neighbours.append(plain(engine, 4, 5))
    run(engine, *neighbours, *going)
    errors += [inquiry.outputs[-1].error for inquiry in going]
    assert all(error is None or error.status < 500 for error in errors), errors
    for got, (n, seed) in zip(neighbours, [(9, 3), (4, 5)], strict=True):
        assert_same(got, _alone(family, n, seed))
    after = plain(engine, 9, 3)  # memory that held infinities is used again
    run(engine, after)
    assert_same(after, _alone(family, 9, 3))
    no_runs_left(engine)


_KNOWN: dict[tuple[str, int, int], Inquiry] = {}


def _alone(family: str, n: int, seed: int) -> Inquiry:
    key = (family, n, seed)
    if key not in _KNOWN:
        _KNOWN[key] = alone(*key)
    return _KNOWN[key]


EVERYTHING = {
    "out": [
        {"capture": "layers.*.resid.post", "pos": "@all"},
        {"capture": "layers.*.attn.head.*.z", "pos": "@all"},
        {"capture": "layers.*.attn.kvhead.*.k", "pos": "@all"},
        {"capture": "layers.*.attn.kvhead.*.v", "pos": "@all"},
        {"capture": "layers.1.attn.head.*.prob", "pos": "@all"},
        {"capture": "logits", "pos": "@all"},
    ]
}
CANARIES = ["layers.1.resid.post", "layers.1.attn.kvhead.*.v", "layers.2.mlp.out", "logits"]


@pytest.mark.parametrize("rows", [7, 64])
@pytest.mark.parametrize("n_blocks", [14, 60])
def test_nobody_reads_what_a_neighbour_holds(rows: int, n_blocks: int) -> None:
    from invivo.models.cache import bytes_per_block

    per_block = bytes_per_block(CONFIGS["llama"], block_size=4, dtype=torch.float64)
    engine = engine_of("llama", max_batch_tokens=rows, kv_bytes=n_blocks * per_block)
    planted = {"steps": [{"at": site, "do": "set", "x": CANARY} for site in CANARIES]}
    ids = random_ids(2, 11)
    prompt = words(ids, n_prompt=11, n_new=N_NEW)
    inquiries = []
    for _ in range(2):
        held = ask(engine, carried(engine, planted, prompt), prompt, "generate", **GREEDY)
        looks = ask(engine, writing(engine, EVERYTHING), MAIN, "generate", **GREEDY)
        swept = ask(
            engine,
            carried(engine, EVERYTHING | {"sweep": {"a": "0..2"}, "steps": [
                {"at": "layers.0.resid.pre", "pos": {"index": 6}, "do": "scale", "a": "$a"}]}),
        )  # fmt: skip
        run(engine, held, looks, swept)  # and again in the memory that is free now
        inquiries += [looks, swept]
    for inquiry in inquiries:
        for row in result(inquiry).rows:
            for capture in row.captures:
                assert capture.value.abs().max() < CANARY / 10
    no_runs_left(engine)


def test_a_blob_of_another_request_is_not_there() -> None:
    program = {"steps": [{"at": "layers.0.resid.post", "do": "add", "v": "blob:mine"}]}
    with pytest.raises(InvalidRequest):
        resolve(parse_program(program), CONFIGS["llama"], {"main": MAIN}, encode=encode)
