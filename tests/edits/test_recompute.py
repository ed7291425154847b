"""``"recompute": false``: what a cache may hold of the prompt is read as it is, never made anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.edits.recurrent_models import RECURRENT
from tests.edits.small_models import CONFIGS, MAIN, OTHER, encode, model, words

from invivo.edits.builder import program
from invivo.edits.explain import explain, explain_text
from invivo.edits.oracle import RowResult, run_program
from invivo.edits.program import parse_program
from invivo.edits.prompt_text import PromptText
from invivo.edits.resolve import resolve
from invivo.edits.resolved import ResolvedProgram
from invivo.errors import InvalidRequest

LLAMA = CONFIGS["llama"]
RESID = "layers.1.resid.post"
LAST = len(MAIN.ids) - 1


def find(data: dict[str, Any], main: PromptText = MAIN, config: Any = LLAMA) -> ResolvedProgram:
    data = {"runs": {"cf": {"prompt": "x"}}, "recompute": False} | data
    return resolve(parse_program(data), config, {"main": main, "cf": OTHER}, encode=encode)


def result(data: dict[str, Any], main: PromptText = MAIN) -> RowResult:
    (row,) = run_program(model("llama"), find(data, main))
    return row


def step(do: str, **more: Any) -> dict[str, Any]:
    return {"at": RESID, "do": do, **more}


def test_edits_act_from_the_first_token_that_a_full_cache_leaves_to_compute() -> None:
    everywhere = result({"steps": [step("scale", a=3)]})
    last = result({"steps": [step("scale", a=3, pos="@last")], "recompute": True})
    plain = result({})
    assert torch.equal(everywhere.logits["main"], last.logits["main"])
    assert torch.equal(everywhere.logits["main"][:LAST], plain.logits["main"][:LAST])
    assert not torch.allclose(everywhere.logits["main"][LAST], plain.logits["main"][LAST])


def test_generated_tokens_see_the_past_as_it_was() -> None:
    text = replace(MAIN, n_prompt=5, n_new=4, n_past=4)
    got = result({"steps": [step("add", v=1.0)]}, text)
    same = {"steps": [step("add", v=1.0, pos={"range": [4, 5]}), step("add", v=1.0,
            pos="@generated")], "recompute": True}  # fmt: skip
    assert torch.equal(got.logits["main"], result(same, text).logits["main"])


def test_where_more_is_wanted_of_the_prompt_more_of_it_is_computed() -> None:
    scored = replace(MAIN, n_past=3)  # the continuation begins at token 4
    got = result({"steps": [step("zero")], "out": [{"capture": RESID, "pos": {"range": [3, 9]}}]},
                 scored)  # fmt: skip
    assert got.captures[0].value.abs().max() == 0
    whole = result({"steps": [step("zero")]}, replace(MAIN, n_past=0))
    same = result({"steps": [step("zero")], "recompute": True})
    assert torch.equal(whole.logits["main"], same.logits["main"])


def test_sources_pair_up_behind_the_past() -> None:
    swapped = result({"steps": [step("replace", **{"from": "cf"})]})
    one = result({"steps": [step("replace", **{"from": "cf"}, pos="@last")], "recompute": True})
    assert torch.equal(swapped.logits["main"], one.logits["main"])
    pooled = find({"steps": [step("mean", over=["cf"], positions="all")]})
    assert pooled.rows[0].runs["main"].touches[0].sources[0].positions == (LAST,)


@pytest.mark.parametrize(
    ("refusing", "field"),
    [
        ({"steps": [step("zero", pos={"range": [0, 3]})]}, "steps[0].pos"),
        ({"steps": [step("replace", pos="@last",
                         **{"from": {"run": "cf", "pos": {"index": 2}, "map": "one"}})]},
         "steps[0].from.pos"),
        ({"steps": [step("replace", pos="@last",
                         **{"from": {"run": "main", "at": "layers.1.resid.pre",
                                     "pos": {"index": 2}, "map": "one"}})]},
         "steps[0].from.pos"),
        ({"out": [{"capture": RESID}]}, "out[0].pos"),
        ({"out": [{"capture": RESID, "pos": {"index": [1, -1]}}]}, "out[0].pos"),
        ({"out": [{"measure": "prob", "token": 3, "pos": "@all"}]}, "out[0].pos"),
        ({"out": [{"capture": RESID, "pos": {"index": 2}, "run": "cf"}]}, "out[0].pos"),
        ({"steps": [{"at": "input.tokens", "do": "set_tokens", "ids": [3], "pos": "@last"}]},
         "steps[0]"),
        ({"steps": [{"at": "input.mask", "do": "parallel",
                     "blocks": [{"range": [0, 2]}, {"range": [2, 4]}]}]}, "steps[0]"),
    ],
)  # fmt: skip
def test_what_needs_the_past_again_is_refused(refusing: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        find(refusing)
    assert refused.value.field == field
    assert "recompute" in (refused.value.remedy or "")


def test_attention_from_later_tokens_to_the_past_can_be_cut() -> None:
    cut = {"at": "layers.*.attn.edge", "do": "edge_block", "from": {"range": [1, 4]}}
    got = result({"steps": [cut | {"to": "@all"}]})
    same = result({"steps": [cut | {"to": "@last"}], "recompute": True})
    assert torch.equal(got.logits["main"], same.logits["main"])


def test_a_key_in_the_past_of_a_state_cannot_be_taken_out() -> None:
    config = RECURRENT["gla"]
    cut = {"at": "layers.*.gla.edge", "do": "edge_block", "to": "@last"}
    find({"steps": [cut | {"from": "@last"}]}, config=config)
    for wrong in ({"from": {"range": [1, 4]}}, {"do": "edge_only", "from": "@last"}):
        with pytest.raises(InvalidRequest, match="computed again"):
            find({"steps": [cut | wrong]}, config=config)


def test_explain_says_what_is_reused() -> None:
    told = explain(find({"steps": [step("replace", **{"from": "cf"})]}))
    assert {name: run["reused_tokens"] for name, run in told["runs"].items()} == {
        "cf": LAST, "main": LAST
    }  # fmt: skip
    assert told["order"][0]["ranges"] == [[LAST, LAST + 1]]
    assert f"the first {LAST} as a plain request leaves them" in explain_text(told)
    assert "reused_tokens" not in explain(find({"recompute": True}))["runs"]["main"]


def test_prompts_of_one_token_have_no_past() -> None:
    one = words([4])
    assert one.n_past == 0
    got = result({"steps": [step("zero")], "out": [{"capture": RESID}]}, one)
    assert got.captures[0].value.abs().max() == 0


def test_the_builder_says_it_too() -> None:
    built = program().keep_past().at(RESID).zero().build()
    assert built == parse_program({"recompute": False, "steps": [step("zero")]})
