"""Planted models do what their truth says: the interpreter in float64 is the judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from invivo.edits.oracle import RowResult, run_program
from invivo.edits.program import parse_program
from invivo.edits.prompt_text import prompt_of_pieces
from invivo.edits.resolve import resolve
from invivo.instruments.planted import cancel, decoys, induction, memory_context
from invivo.instruments.planted.checkpoint import PlantedModel
from invivo.instruments.planted.truth import Case

BUILDERS: dict[str, Callable[..., PlantedModel]] = {
    "P1": induction.build,
    "P3": memory_context.build,
    "P11": decoys.build,
    "P12": cancel.build,
}


def rows(model: PlantedModel, case: Case, program: dict[str, Any]) -> list[RowResult]:
    names = model.words.names
    prompts = {
        "main": prompt_of_pieces([(i, " " + names[i]) for i in case.tokens]),
        "cf": prompt_of_pieces([(i, " " + names[i]) for i in case.counterfactual]),
    }
    program = {"runs": {"cf": {"prompt": "other"}}} | program
    program["out"] = [{"measure": "logit_diff", "a": case.answer, "b": case.other}]
    return run_program(
        model.decoder, resolve(parse_program(program), model.decoder.config, prompts)
    )


def difference(model: PlantedModel, case: Case, steps: list[dict[str, Any]]) -> float:
    return float(rows(model, case, {"steps": steps})[0].measures[0].values)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_patching_each_head_gives_what_was_planted(name: str, seed: int) -> None:
    model = BUILDERS[name](seed, n_cases=2)
    expected = model.truth.of_heads(model.truth.patching)
    config = model.decoder.config
    patch = {"at": "layers.$L.attn.head.$H.z", "pos": "@last", "do": "replace", "from": "cf"}
    keep = {"at": "final.norm.scale", "do": "freeze"}
    sweep = {"L": f"0..{config.n_layers - 1}", "H": f"0..{config.n_heads - 1}"}
    for case in model.cases:
        base = difference(model, case, [])
        for row in rows(model, case, {"steps": [patch, keep], "sweep": sweep}):
            at = (int(row.row.binding["L"]), int(row.row.binding["H"]))
            effect = float(row.measures[0].values) - base
            assert effect == pytest.approx(expected.get(at, 0.0), abs=1e-6)


@pytest.mark.parametrize("name", ["P1", "P11", "P12"])
def test_the_task_is_solved_and_falls_without_a_needed_head(name: str) -> None:
    model = BUILDERS[name](0, n_cases=4)
    for case in model.cases:
        plain = rows(model, case, {})[0].logits["main"][-1]
        assert int(plain.argmax()) == case.answer
    for role in model.truth.needed:
        step = {"at": model.truth.heads[role].site("z"), "do": "zero"}
        right = 0
        for case in model.cases:
            logits = rows(model, case, {"steps": [step]})[0].logits["main"][-1]
            right += int(logits.argmax()) == case.answer
        assert right < len(model.cases)


def test_scaling_a_head_flips_the_answer_where_it_should() -> None:
    model = memory_context.build(0, n_cases=2)
    for case in model.cases:
        base = difference(model, case, [])
        assert base == pytest.approx(-1.0, abs=1e-6)
        for role, factor in model.truth.flips.items():
            at = {"at": model.truth.heads[role].site("z"), "pos": "@last", "do": "scale"}
            below, above = (difference(model, case, [at | {"a": factor * f}]) for f in (0.99, 1.01))
            assert below * above < 0


def test_a_pair_that_cancels_is_silent_together() -> None:
    model = cancel.build(0, n_cases=2)
    for case in model.cases:
        steps = [
            {"at": model.truth.heads[role].site("z"), "pos": "@last", "do": "zero"}
            for role in model.truth.silent
        ]
        torch.testing.assert_close(
            difference(model, case, steps), difference(model, case, []), atol=1e-9, rtol=0
        )
