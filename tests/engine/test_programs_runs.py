"""Programs on the engine: the same numbers as the interpreter, whatever else is in the batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.edits.small_models import CONFIGS, MAIN, OTHER, encode, model
from tests.engine.drive import Inquiry, run, settle, small_engine

from invivo.edits.blobs import Blobs
from invivo.edits.oracle import RowResult, run_program
from invivo.edits.program import parse_program
from invivo.edits.prompt_text import PromptText
from invivo.edits.resolve import resolve
from invivo.edits.results import ProgramOutput
from invivo.engine.engine import Engine
from invivo.engine.types import Intervention, Request, SamplingParams
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
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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
