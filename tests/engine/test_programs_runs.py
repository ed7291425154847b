"""Programs on the engine: the same numbers as the interpreter, whatever else is in the batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.edits.small_models import CONFIGS, MAIN, OTHER, encode, model, random_ids, words
from tests.engine.drive import Inquiry, run, settle, small_engine

from invivo.edits.apply import change_together
from invivo.edits.blobs import Blobs
from invivo.edits.oracle import RowResult, run_program
from invivo.edits.program import parse_program
from invivo.edits.prompt_text import PromptText
from invivo.edits.resolve import resolve
from invivo.edits.results import ProgramOutput, RowOutput
from invivo.edits.site_names import SiteRef
from invivo.engine.engine import Engine
from invivo.engine.programs import CarriedProgram
from invivo.engine.types import Intervention, Request, SamplingParams
from invivo.errors import TooLarge
from invivo.models.load import LoadedModel

FAMILIES = ["llama", "gemma", "gpt2", "moe", "olmo2"]
BLOCK = 4
_numbers = itertools.count()


def engine_of(family: str, **options: Any) -> Engine:
    loaded = LoadedModel("tiny", None, CONFIGS[family], model(family), None, "")  # type: ignore[arg-type]
    small: dict[str, Any] = {"block_size": BLOCK, "max_running": 6, "max_batch_tokens": 13}
    return small_engine(loaded, **(small | options))


def carried(
    engine: Engine,
    program: Mapping[str, Any],
    prompt: PromptText = MAIN,
    other: PromptText = OTHER,
    blobs: Blobs | None = None,
) -> Intervention:
    data = {"runs": {"cf": {"prompt": "other"}}} | dict(program)
    prompts = {"main": prompt, "cf": other}
    resolved = resolve(
        parse_program(data), engine.model.config, prompts, blobs=blobs, encode=encode
    )
    return Intervention(resolved, blobs or Blobs())


def ask(
    engine: Engine,
    program: Intervention | None,
    prompt: PromptText = MAIN,
    kind: Any = "run",
    **fields: Any,
) -> Inquiry:
    own = {k: fields.pop(k) for k in list(fields) if k in Request.__slots__}
    request = Request(
        id=f"p{next(_numbers)}",
        tokens=tuple(prompt.ids[: prompt.n_prompt]),
        kind=kind,
        intervention=program,
        params=SamplingParams(**fields),
        **own,
    )
    inquiry = Inquiry(request)
    engine.submit(request, inquiry.outputs.append)
    return inquiry


def result(inquiry: Inquiry) -> ProgramOutput:
    last = inquiry.outputs[-1]
    assert last.error is None, last.error
    assert last.program is not None
    return last.program


def oracle(engine: Engine, program: Intervention) -> list[RowResult]:
    with torch.no_grad():
        return run_program(engine.model.decoder, program.resolved, blobs=program.blobs)


def same(got: ProgramOutput, expected: list[RowResult], tolerance: float = 1e-9) -> None:
    assert len(got.rows) == len(expected)
    for row, wanted in zip(got.rows, expected, strict=True):
        assert len(row.captures) == len(wanted.captures)
        assert len(row.measures) == len(wanted.measures)
        for ours, theirs in zip(row.captures, wanted.captures, strict=True):
            torch.testing.assert_close(ours.value, theirs.value, rtol=tolerance, atol=tolerance)
            assert (ours.tokens is None) == (theirs.tokens is None)
            if ours.tokens is not None:
                assert torch.equal(ours.tokens, theirs.tokens)
        for ours, theirs in zip(row.measures, wanted.measures, strict=True):
            torch.testing.assert_close(ours.values, theirs.values, rtol=tolerance, atol=tolerance)


def no_runs_left(engine: Engine) -> None:
    settle(engine)
    assert not engine._programs
    assert not engine._runs


# Random programs.

_SELECTORS = st.sampled_from(["@last", "@all", {"index": 2}, {"range": [1, 6]}, {"index": [0, 7]}])
_VECTORS = st.sampled_from(
    ["resid.pre", "attn.in", "attn.out", "resid.mid", "mlp.in", "mlp.out", "resid.post"]
)
_HEADS = st.sampled_from(
    ["attn.head.{h}.q", "attn.kvhead.{g}.k", "attn.kvhead.{g}.v", "attn.head.{h}.z",
     "attn.head.{h}.out"]
)  # fmt: skip


@st.composite
def sites(draw: st.DrawFn) -> str:
    layer = draw(st.sampled_from(["0", "1", "2", "*", "0-1"]))
    if draw(st.booleans()):
        return f"layers.{layer}.{draw(_VECTORS)}"
    head = {"h": draw(st.sampled_from(["0", "3", "*", "[1,2]"])), "g": draw(st.sampled_from("01*"))}
    return f"layers.{layer}.{draw(_HEADS).format(**head)}"


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["rows", "rows", "rows", "edge", "norm", "block", "logits"]))
    run_name = draw(st.sampled_from(["main", "main", "cf"]))
    if kind == "edge":
        do = draw(
            st.sampled_from(
                [{"do": "edge_block"}, {"do": "edge_only"}, {"do": "edge_scale", "a": 0.5}]
            )
        )
        return {
            "at": draw(st.sampled_from(["layers.1.attn.edge", "layers.*.attn.edge"])),
            "from": draw(_SELECTORS),
            "to": draw(_SELECTORS),
            "run": run_name,
            **do,
        }
    if kind == "block":
        return {"at": "layers.1", "do": "skip", "pos": draw(_SELECTORS), "run": run_name}
    at = {"norm": "final.norm.out", "logits": "logits"}.get(kind) or draw(sites())
    changes: list[dict[str, Any]] = [
        {"do": "zero"},
        {"do": "scale", "a": -0.5},
        {"do": "add", "v": 0.3},
        {"do": "clamp", "min": -0.2, "max": 0.4},
        {"do": "noise", "s": 0.3, "seed": 4},
    ]
    source = "plain" if run_name == "cf" else draw(st.sampled_from(["cf", "plain"]))
    changes += [
        {"do": "replace", "from": {"run": source}},
        {"do": "lerp", "w": 0.25, "from": {"run": source}},
        {"do": "replace", "from": {"run": run_name}},
    ]
    return {"at": at, "pos": draw(_SELECTORS), "run": run_name} | draw(st.sampled_from(changes))


@st.composite
def outputs(draw: st.DrawFn) -> dict[str, Any]:
    where = {"run": draw(st.sampled_from(["main", "cf"])), "pos": draw(_SELECTORS)}
    if draw(st.booleans()):
        kinds: list[dict[str, Any]] = [
            {"measure": "logprob", "token": 3},
            {"measure": "logit_diff", "a": 5, "b": 8},
            {"measure": "kl", "to": "plain"},
            {"measure": "prob", "token": 0},
        ]
        return where | draw(st.sampled_from(kinds))
    site = draw(st.one_of(sites(), st.just("logits"), st.just("layers.*.attn.head.*.prob")))
    return (
        where
        | {"capture": site, "when": draw(st.sampled_from(["before", "after"]))}
        | draw(st.sampled_from([{}, {"reduce": "norm"}, {"reduce": "mean"}]))
    )


@st.composite
def programs(draw: st.DrawFn) -> dict[str, Any]:
    changes = draw(st.lists(steps(), max_size=3))
    # Two runs that read each other go in a circle.
    if any(step.get("from", {}) == {"run": "cf"} for step in changes if "do" in step):
        changes = [s for s in changes if not (s["run"] == "cf" and isinstance(s.get("from"), dict)
                                              and s["from"].get("run") == "main")]  # fmt: skip
    return {"steps": changes, "out": draw(st.lists(outputs(), min_size=1, max_size=3))}


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    program=programs(),
    second=programs(),
    rows=st.sampled_from([7, 13, 64]),
    warm=st.booleans(),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_says_what_the_interpreter_says(
    family: str, program: dict[str, Any], second: dict[str, Any], rows: int, warm: bool
) -> None:
    engine = engine_of(family, max_batch_tokens=rows)
    first, other = carried(engine, program), carried(engine, second, OTHER, MAIN)
    if warm:
        run(engine, ask(engine, None, MAIN, "generate", max_tokens=3, temperature=0.0))
    mates = [
        ask(engine, None, OTHER, "generate", max_tokens=4, temperature=0.0, logprobs=0),
        ask(engine, None, MAIN, "score"),
    ]
    asked = [ask(engine, first), ask(engine, other, OTHER)]
    run(engine, *mates, *asked)
    same(result(asked[0]), oracle(engine, first))
    same(result(asked[1]), oracle(engine, other))
    no_runs_left(engine)
    alone = engine_of(family)
    again = [
        ask(alone, None, OTHER, "generate", max_tokens=4, temperature=0.0, logprobs=0),
        ask(alone, None, MAIN, "score"),
    ]
    run(alone, *again)
    for mate, by_itself in zip(mates, again, strict=True):
        assert mate.tokens() == by_itself.tokens()
        assert mate.logprobs() == pytest.approx(by_itself.logprobs(), abs=1e-12)
        assert mate.prompt_logprobs() == pytest.approx(by_itself.prompt_logprobs(), abs=1e-12)


# What random programs do not reach.

SWEEP = {
    "sweep": {"L": "0..2", "H": "0..3"},
    "steps": [
        {"at": "layers.$L.attn.head.$H.z", "pos": "@last", "do": "replace", "from": {"run": "cf"}}
    ],
    "out": [
        {"measure": "logit_diff", "a": 5, "b": 8},
        {"capture": "layers.2.resid.post", "pos": "@last"},
        {"measure": "kl", "to": "plain"},
    ],
}
BETWEEN_ROWS = {  # rows are compared with rows that come before them, behind them, with themselves
    "sweep": [["a", [0.5, 1, 2]], ["L", "0..2"]],
    "steps": [
        {"at": "layers.$L.mlp.out", "pos": {"range": [4, 9]}, "do": "scale", "a": "$a"},
        {"at": "layers.1.mlp.out", "pos": "@last", "do": "scale", "a": "$a", "run": "other"},
    ],
    "runs": {"cf": {"prompt": "other"}, "other": {"same": "main"}},
    "out": [
        {"measure": "kl", "to": {"row": {"a": 2}}, "pos": {"range": [3, 8]}},
        {"measure": "kl", "to": {"row": {"a": 1, "L": 1}}},
        {"measure": "kl", "to": {"row": {"a": 0.5}, "run": "other"}, "pos": "@all"},
        {"measure": "kl", "to": {"row": {"a": 2}, "run": "cf"}},
        {"measure": "kl", "to": "plain"},
    ],
}
INPUTS = {  # the plain run sees the tokens of its row
    "sweep": {"T": [3, 11]},
    "steps": [
        {"at": "input.tokens", "do": "set_tokens", "pos": {"index": 2}, "ids": ["$T"]},
        {"at": "layers.1.mlp.out", "do": "scale", "a": 0.5},
    ],
    "out": [{"measure": "kl", "to": "plain"}, {"measure": "logprob", "token": 3, "run": "plain"}],
}
TWO_RUNS: dict[str, Any] = {"cf": {"prompt": "other"}, "half": {"same": "main"}}
RUN_OF_A_ROW = {  # which run is changed is a matter of the row
    "runs": TWO_RUNS,
    "sweep": {"r": ["main", "half"]},
    "steps": [{"run": "$r", "at": "layers.1.mlp.out", "do": "zero"}],
    "out": [
        {"measure": "logprob", "token": 3},
        {"measure": "logprob", "token": 3, "run": "half"},
    ],
}
RUNS_OF_SOME_ROWS = {  # runs that vary, by themselves or by what they read, are not in every row
    "runs": TWO_RUNS | {"third": {"same": "main"}},
    "sweep": [["r", ["main", "half", "third"]], ["L", "0..2"]],
    "steps": [
        {"run": "half", "at": "layers.$L.mlp.out", "do": "zero"},
        {"run": "third", "at": "layers.2.attn.out", "do": "replace", "from": "half"},
    ],
    "out": [{"measure": "logprob", "token": 3, "run": "$r"}],
}
PATHS = {  # path patching: a run that is frozen but for a sender, then its receiver in main
    "runs": {"cf": {"prompt": "other"}, "half": {"same": "main"}},
    "steps": [
        {"run": "half", "at": "layers.*.attn.head.*.z", "do": "freeze", "to": "plain",
         "except": "layers.0.attn.head.1.z"},
        {"run": "half", "at": "layers.0.attn.head.1.z", "do": "replace", "from": {"run": "cf"}},
        {"at": "layers.2.attn.head.3.z", "do": "replace", "from": {"run": "half"}},
    ],
    "out": [{"measure": "logprob", "token": 7, "pos": "@all"}],
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"kv_bytes": 5 * 4 * 384}], ids=["roomy", "little memory"])
@pytest.mark.parametrize(
    "program",
    [SWEEP, BETWEEN_ROWS, INPUTS, RUN_OF_A_ROW, RUNS_OF_SOME_ROWS, PATHS],
    ids=["sweep", "between rows", "inputs", "run of a row", "runs of some rows", "paths"],
)
def test_sweeps_and_paths_are_what_the_interpreter_says(
    program: dict[str, Any], options: dict[str, int]
) -> None:
    engine = engine_of("llama", **options)
    carry = carried(engine, program)
    mate = ask(engine, None, MAIN, "generate", max_tokens=3, temperature=0.0)
    got = ask(engine, carry)
    run(engine, mate, got)
    same(result(got), oracle(engine, carry))
    no_runs_left(engine)


def test_rows_keep_no_more_than_others_still_want(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are let go of once they and all that are compared with them have come back."""
    engine, held = engine_of("llama"), []
    row_of = CarriedProgram._row

    def watched(program: CarriedProgram, number: int, n_main: int) -> RowOutput:
        found = row_of(program, number, n_main)
        held.append(sum(key[0] is not None for key in program._done))
        return found

    monkeypatch.setattr(CarriedProgram, "_row", watched)
    sweep = {
        "sweep": {"a": list(range(30))},
        "steps": [{"at": "layers.1.mlp.out", "do": "scale", "a": "$a"}],
        "out": [{"measure": "kl", "to": {"row": {"a": 29}}}],
    }
    run(engine, ask(engine, carried(engine, sweep)))
    # The trunk, the row that all are compared with, and those that were running beside it.
    assert len(held) == 30
    assert max(held) <= 2 + 6
    assert held[-1] <= 3


def test_a_sweep_computes_what_lies_before_its_first_change_once() -> None:
    engine = engine_of("llama")
    carry = carried(engine, SWEEP)
    run(engine, ask(engine, carry))
    # Two blocks of four lie before the ninth token, which is changed; of twelve rows and the two
    # runs of the same prompt, those that begin with the first step may compute them themselves.
    assert engine.scheduler.prefix_hits >= 5 * 2 * BLOCK


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_own_positions_and_masks(family: str) -> None:
    program = {
        "steps": [
            {"at": "input.mask", "do": "parallel", "blocks": [{"range": [1, 3]}, {"range": [3, 5]}]}
        ],
        "out": [{"capture": "layers.2.resid.post"}, {"measure": "logprob", "token": 2}],
    }
    for rows in (7, 64):
        engine = engine_of(family, max_batch_tokens=rows)
        carry = carried(engine, program)
        got, mate = ask(engine, carry), ask(engine, None, MAIN, "score")
        run(engine, got, mate)
        same(result(got), oracle(engine, carry))
        alone = ask(engine, None, MAIN, "score")
        run(engine, alone)
        assert mate.prompt_logprobs() == pytest.approx(alone.prompt_logprobs(), abs=1e-12)


def test_a_generation_reads_another_run_and_shows_its_patterns() -> None:
    ids, n_new = random_ids(1), 4
    program = {
        "steps": [
            {"at": "layers.1.resid.post", "pos": {"index": 3}, "do": "replace",
             "from": {"run": "cf", "pos": {"index": 5}}},
            {"at": "layers.*.attn.edge", "do": "edge_block", "from": {"index": 2},
             "to": "@generated"},
        ],
        "out": [{"capture": "layers.1.attn.head.2.prob", "pos": "@all"}],
    }  # fmt: skip
    engine = engine_of("llama")
    carry = carried(engine, program, words(ids, n_prompt=len(ids), n_new=n_new))
    got = ask(engine, carry, words(ids), "generate", max_tokens=n_new, temperature=0.0,
              ignore_eos=True, logprobs=0)  # fmt: skip
    run(engine, got)
    written = ids + got.tokens()[:-1]
    whole = carried(engine, program, words(written, n_prompt=len(ids), n_new=n_new))
    (expected,) = oracle(engine, whole)
    logits = expected.logits["main"][len(ids) - 1 :]
    assert got.tokens() == logits.argmax(-1).tolist()
    chosen = torch.log_softmax(logits, -1)[range(n_new), got.tokens()]
    assert got.logprobs() == pytest.approx(chosen.tolist(), abs=1e-9)
    same(result(got), [expected])
    no_runs_left(engine)


def test_an_abort_in_the_middle_leaves_nothing() -> None:
    engine = engine_of("llama")
    got = ask(engine, carried(engine, SWEEP))
    for _ in range(3):
        engine.step()
    assert not got.done
    assert engine._runs
    engine.abort(got.request.id)
    engine.step()
    assert got.reason() == "cancelled"
    no_runs_left(engine)


def test_what_runs_read_of_each_other_is_bounded_before_anything_runs() -> None:
    engine = engine_of("llama", max_capture_bytes=400)
    program = {"steps": [{"at": "layers.0.resid.post", "do": "replace", "from": {"run": "plain"}}]}
    with pytest.raises(TooLarge):
        ask(engine, carried(engine, program))
    no_runs_left(engine)


def test_a_program_that_lost_its_memory_says_the_same() -> None:
    program = {
        "steps": [{"at": "layers.1.mlp.out", "pos": "@generated", "do": "scale", "a": 0.5}],
        "out": [{"capture": "layers.2.resid.post", "pos": "@all"}],
    }
    n_new = 9
    engine = engine_of("llama", kv_bytes=8 * BLOCK * 384, max_running=3)
    ids = [random_ids(seed) for seed in (1, 2, 3)]
    asked = [
        ask(engine, carried(engine, program, words(i, n_prompt=len(i), n_new=n_new)), words(i),
            "generate", max_tokens=n_new, temperature=0.0, ignore_eos=True)
        for i in ids
    ]  # fmt: skip
    run(engine, *asked)
    assert engine.scheduler.n_preemptions > 0
    for prompt, got in zip(ids, asked, strict=True):
        written = prompt + got.tokens()[:-1]
        whole = carried(engine, program, words(written, n_prompt=len(prompt), n_new=n_new))
        same(result(got), oracle(engine, whole))
    no_runs_left(engine)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_same_operation_of_many_requests_is_done_at_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []

    def counted(do: str, ref: SiteRef, value: torch.Tensor, rows: Any, by: Any) -> torch.Tensor:
        together.append(len(rows))
        return change_together(do, ref, value, rows, by)

    n_new = 4
    steps: list[dict[str, Any]] = [
        {"at": "layers.1.resid.post", "do": "add", "v": "blob:v", "c": 0.5},
        {"at": "layers.0.attn.head.[1,3].z", "do": "zero"},
        {"at": "layers.2.mlp.neuron[1-4]", "do": "scale", "a": -2.0},
        {"at": "layers.1.attn.head.2.out", "do": "set", "x": 0.1},
    ]
    blobs = Blobs()
    blobs.add("v", torch.linspace(-1, 1, 16, dtype=torch.float64))
    monkeypatch.setattr("invivo.engine.edit_taps.change_together", counted)
    engine = engine_of(family, max_batch_tokens=64)
    asked, expected = [], []
    for i in range(5):
        ids = random_ids(i)
        chosen = [step | {"pos": "@generated"} for k, step in enumerate(steps) if k != i]
        program = {"steps": chosen, "out": [{"capture": "layers.2.resid.post", "pos": "@all"}]}
        text = words(ids, n_prompt=len(ids), n_new=n_new)
        asked.append(
            ask(engine, carried(engine, program, text, blobs=blobs), words(ids), "generate",
                max_tokens=n_new, temperature=0.0, ignore_eos=True)
        )  # fmt: skip
        expected.append((program, ids))
    run(engine, *asked)
    assert together.count(4) >= n_new - 1
    for got, (program, ids) in zip(asked, expected, strict=True):
        written = ids + got.tokens()[:-1]
        whole = carried(
            engine, program, words(written, n_prompt=len(ids), n_new=n_new), blobs=blobs
        )
        same(result(got), oracle(engine, whole))
