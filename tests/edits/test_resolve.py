"""What a program means is found before anything runs; what makes no sense is refused there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.counting import Calls
from tests.edits.programs import PROGRAMS
from tests.edits.small_models import CONFIGS, MAIN, OTHER, encode, model, resolved, words

from invivo.edits.blobs import Blobs, content_hash
from invivo.edits.explain import explain, explain_text
from invivo.edits.oracle import run_program
from invivo.edits.program import parse_program
from invivo.edits.resolve import ResolveBounds, ResolveCache, resolve
from invivo.edits.resolved import ResolvedProgram
from invivo.errors import InvalidRequest, InvivoError, TooLarge

LLAMA = CONFIGS["llama"]
BLOBS = Blobs(
    {
        "d": torch.ones(16),
        "v": torch.ones(4),
        "x": torch.ones(16),
        "b": torch.eye(16)[:2],
        "skew": torch.ones(2, 16),
        "heads": torch.ones(4, 4),
        "n": torch.ones(3, 16),
    }
)


def find(program: dict[str, Any], config: Any = LLAMA, **more: Any) -> ResolvedProgram:
    data = {"runs": {"cf": {"prompt": "x"}}} | program
    prompts = {"main": MAIN, "cf": OTHER}
    return resolve(parse_program(data), config, prompts, blobs=BLOBS, encode=encode, **more)


def step(at: str, do: str, **more: Any) -> dict[str, Any]:
    return {"steps": [{"at": at, "do": do, **more}]}


RESID = "layers.1.resid.post"
HEADS = "layers.*.attn.head.*.z"


@pytest.mark.parametrize(
    ("program", "field", "reason"),
    [
        (step("layers.7.resid.post", "zero"), "steps[0].at", "3 layers"),
        (step("layers.0.moe.router", "zero"), "steps[0].at", "one MLP"),
        (step(RESID, "zero", pos={"span": "zebra"}), "steps[0].pos", "does not occur"),
        (step(RESID, "zero", pos="@subject"), "steps[0].pos", "no selector"),
        (step(RESID, "zero", run="else"), "steps[0].run", "no run"),
        (step(RESID, "replace", **{"from": "else"}), "steps[0].from", "no run"),
        (step(RESID, "add", v="blob:none"), "steps[0].v", "no tensor"),
        (step(RESID, "add", v="blob:v"), "steps[0].v", "must fit"),
        (step(RESID, "add", v=[1, 2, 3]), "steps[0].v", "must fit"),
        (step(RESID, "add", v={"param": "p"}), "steps[0].v", "not declared"),
        (step(RESID, "add", v="blob:n", pos={"range": [0, 2]}), "steps[0].v", "must fit"),
        (step(RESID, "replace", **{"from": "blob:heads"}), "steps[0].from", "must fit"),
        (step(RESID, "project_out", basis="blob:heads"), "steps[0].basis", "basis here is"),
        (step(RESID, "project_out", basis="blob:skew"), "steps[0].basis", "not orthonormal"),
        (step(RESID, "set_coords", basis="blob:b", c=[1, 2, 3]), "steps[0].c", "must fit"),
        (step(RESID, "edge_block", **{"from": "@all", "to": "@all"}), "steps[0].at", "attn.edge"),
        (step("layers.0.attn.edge", "zero"), "steps[0].at", "does not act"),
        (step("layers.0.attn.head.*.prob", "add", v=1), "steps[0].at", "does not act"),
        (step("layers.0.attn.head.*.prob", "scale", a=[1, 2]), "steps[0].a", "only a number"),
        (step("layers.0", "zero"), "steps[0].at", "does not act"),
        (step(RESID, "skip"), "steps[0].at", "layers.i"),
        (step(RESID, "state_reset"), "steps[0].at", "does not act"),
        (step("layers.0.gla.head.0.state", "state_reset"), "steps[0].at", "no gated linear"),
        (step(HEADS, "freeze", **{"except": HEADS}), "steps[0].except", "nothing is left"),
        (
            step(RESID, "replace", **{"from": {"run": "cf", "at": HEADS}}),
            "steps[0].from.at",
            "one site",
        ),
        (
            step(RESID, "replace", **{"from": {"run": "cf", "at": "layers.0.mlp.neuron"}}),
            "steps[0].from",
            "different shapes",
        ),
        (
            step("layers.0.mlp.out", "replace", **{"from": {"run": "main", "at": RESID}}),
            "steps[0].from",
            "own later values",
        ),
        (
            step(
                RESID, "replace", pos={"range": [0, 2]}, **{"from": {"run": "cf", "pos": "@last"}}
            ),
            "steps[0].from",
            "1 source positions for 2",
        ),
        (
            step("input.tokens", "set_tokens", ids=[99]),
            "steps[0].ids",
            "largest token",
        ),
        (step("input.tokens", "set_tokens", ids=[1, 2]), "steps[0].ids", "9 values"),
        (step("input.position", "set_positions", values=[64]), "steps[0].values", "largest"),
        (
            step("input.mask", "parallel", blocks=[{"range": [0, 2]}, {"range": [3, 5]}]),
            "steps[0].blocks",
            "side by side",
        ),
        (
            step("input.mask", "parallel", blocks=[{"index": [0, 2]}, {"range": [3, 5]}]),
            "steps[0].blocks[0]",
            "one piece",
        ),
        ({"out": [{"capture": "layers.1"}]}, "out[0]", "not a quantity"),
        ({"out": [{"capture": RESID, "reduce": "dot", "v": "blob:v"}]}, "out[0].v", "must fit"),
        ({"out": [{"capture": RESID, "reduce": "dot", "v": [1]}]}, "out[0].v", "must fit"),
        ({"out": [{"capture": RESID, "reduce": "cos", "v": [1]}]}, "out[0].v", "must fit"),
        (
            {"out": [{"capture": HEADS, "reduce": "lens", "top": 1}]},
            "out[0].capture",
            "width 16",
        ),
        ({"out": [{"capture": RESID, "reduce": "lens", "top": 41}]}, "out[0].top", "1 to 40"),
        ({"out": [{"measure": "logit", "token": 40}]}, "out[0].token", "40 tokens"),
        ({"out": [{"measure": "logit", "token": "w1 w2"}]}, "out[0].token", "2 tokens"),
        ({"out": [{"measure": "kl", "to": "else"}]}, "out[0].to", "no run"),
        (
            {
                "steps": [{"at": "layers.0", "do": "stop"}],
                "out": [{"measure": "logit", "token": 1}],
            },
            "out[0]",
            "stops after layer 0",
        ),
        (
            {"steps": [{"at": "layers.0", "do": "stop"}, {"at": RESID, "do": "zero"}]},
            "steps[1]",
            "stops after layer 0",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_path(
    program: dict[str, Any], field: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        find(program)
    assert caught.value.field is not None
    assert caught.value.field.startswith(field)


def test_runs_that_depend_on_each_other_in_a_circle_are_refused() -> None:
    data = {
        "runs": {"a": {"same": "main"}, "b": {"same": "main"}},
        "steps": [
            {"run": "a", "at": "layers.0.resid.post", "do": "replace", "from": "b"},
            {"run": "b", "at": "layers.2.resid.post", "do": "replace", "from": "a"},
            {"at": "embed.out", "do": "replace", "from": "a"},
        ],
    }
    with pytest.raises(InvalidRequest, match="circle: a -> b -> a"):
        resolve(parse_program(data), LLAMA, {"main": MAIN})


def test_a_program_for_another_model_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="another model"):
        find({"model": "big"}, model_names=("tiny", "sha256:0"))
    find({"model": "tiny"}, model_names=("tiny", "sha256:0"))


def test_sources_that_come_later_need_a_pass_of_their_own() -> None:
    same = {"at": RESID, "do": "replace", "from": "cf"}
    assert find({"steps": [same]}).rows[0].passes == (("cf", "main"),)
    earlier = {**same, "from": {"run": "cf", "at": "layers.0.resid.post"}}
    assert find({"steps": [earlier]}).rows[0].passes == (("cf", "main"),)
    later = {**same, "from": {"run": "cf", "at": "layers.2.resid.post"}}
    assert find({"steps": [later]}).rows[0].passes == (("cf",), ("main",))
    chain = {
        "runs": {"cf": {"prompt": "x"}, "sent": {"same": "main"}},
        "steps": [
            {"run": "sent", "at": HEADS, "do": "freeze"},
            {"run": "sent", "at": "layers.0.mlp.out", "do": "replace", "from": "cf"},
            {**later, "from": {"run": "sent", "at": "layers.2.resid.post"}},
        ],
    }
    (row,) = find(chain).rows
    assert row.passes == (("plain", "cf", "sent"), ("main",))
    assert list(row.runs) == ["plain", "cf", "sent", "main"]


def test_touches_stand_in_forward_order_and_say_where() -> None:
    steps = [
        {"at": "final.norm.out", "do": "scale", "a": 2},
        {"at": "layers.1-2.attn.head.[0,3].z", "pos": {"span": "w", "nth": 0}, "do": "zero"},
        {"at": "embed.out", "do": "scale", "a": 2},
    ]
    (row,) = find({"steps": steps}).rows
    touches = row.runs["main"].touches
    assert [(t.step, t.ref.layer) for t in touches] == [(2, -1), (1, 1), (1, 2), (0, -1)]
    assert touches[1].ref.heads == (0, 3)
    assert touches[1].positions.indices() == [0]
    assert touches[1].kernel == "affine"
    assert row.runs["main"].first_layer == 0
    (late,) = find({"steps": steps[1:2]}).rows
    assert late.runs["main"].first_layer == 1
    assert find({}).rows[0].runs["main"].first_layer is None
    assert find({"steps": steps[:1]}).rows[0].runs["main"].first_layer is None


def test_mask_and_positions_of_a_set_are_those_of_the_paper() -> None:
    prompt = words([1, 2, 3, 4, 5, 6])
    blocks = [{"range": [2, 4]}, {"range": [4, 5]}]
    data = step("input.mask", "parallel", blocks=blocks)
    plan = resolve(parse_program(data), LLAMA, {"main": prompt}).rows[0].runs["main"]
    assert plan.input.numbers == (0, 1, 2, 3, 2, 4)
    assert plan.input.number_of(6) == 5  # generated tokens go on from the largest
    rows = run_program(
        model("llama"),
        resolved(
            model("llama"),
            data | {"out": [{"capture": "layers.0.attn.head.0.prob"}]},
            {"main": prompt},
        ),
    )
    seen = rows[0].captures[0].value[:, 0] > 0
    assert [seen[i].nonzero()[:, 0].tolist() for i in range(6)] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 4],
        [0, 1, 2, 3, 4, 5],
    ]


def test_several_sets_move_what_follows_together() -> None:
    blocks = [[{"range": [1, 3]}, {"range": [3, 4]}], [{"range": [5, 6]}, {"range": [6, 8]}]]
    steps = [{"at": "input.mask", "do": "parallel", "blocks": b} for b in reversed(blocks)]
    (row,) = find({"steps": steps}).rows
    assert row.runs["main"].input.numbers == (0, 1, 2, 1, 3, 4, 4, 5, 6)
    overlapping = [{"at": "input.mask", "do": "parallel", "blocks": blocks[0]}] * 2
    with pytest.raises(InvalidRequest, match="overlap"):
        find({"steps": overlapping})


def test_explain_tells_everything_before_anything_runs() -> None:
    program = {
        "steps": [
            {"at": "layers.$L.attn.head.*.z", "pos": "@last", "do": "replace", "from": "cf"},
            {"at": "blocks.0.hook_resid_pre", "do": "scale", "a": 2},
        ],
        "sweep": {"L": "0..2"},
        "out": [
            {"measure": "logit_diff", "a": 3, "b": 4},
            {"capture": "layers.*.resid.post", "pos": {"range": [7, 9]}, "name": "stream"},
        ],
    }
    plan = find(program)
    told = explain(plan)
    assert told["program"] == plan.hash == parse_program(plan.program.to_json()).hash
    assert told["rows"] == 3
    assert told["bindings"] == [{"L": 0}, {"L": 1}, {"L": 2}]
    assert told["order"][0] == {
        "step": 1,
        "run": "main",
        "at": "layers.0.resid.pre",
        "do": "scale",
        "kernel": "affine",
        "ranges": [[0, 9]],
        "tokens": list(MAIN.texts),
    }
    patch = told["order"][1]
    assert patch["at"] == "layers.0.attn.head.0-3.z"
    assert patch["tokens"] == [MAIN.texts[-1]]
    assert patch["from"][0]["positions"] == [8]
    assert patch["from"][0]["tokens"] == [OTHER.texts[-1]]
    assert told["captures"][0]["shape"] == [2, 16]
    assert told["captures"][0]["bytes"] == 2 * 16 * 4
    assert told["bytes"] == 3 * 3 * 2 * 16 * 4
    assert told["cost"]["forwards"] == 1 + 3
    assert told["aliases"] == {"blocks.0.hook_resid_pre": "layers.0.resid.pre"}
    compared = find(program | {"out": [{"measure": "kl", "to": {"row": {"L": 2}}, "name": "far"}]})
    assert explain(compared)["measures"][0]["to_row"] == {"L": 2}
    assert "kl of main from main of row {'L': 2} at 8" in explain_text(explain(compared))
    text = explain_text(told)
    assert "layers.0.attn.head.0-3.z at 8 (' w" in text
    assert "sweep of 3 rows" in text
    assert "blocks.0.hook_resid_pre is layers.0.resid.pre" in text


def test_runs_that_do_not_vary_are_counted_once_and_layers_below_are_shared() -> None:
    program = {
        "steps": [{"at": "layers.$L.resid.post", "do": "replace", "from": "cf"}],
        "sweep": {"L": "0..2"},
    }
    plan = find(program)
    assert plan.varying == {"main"}
    cost = explain(plan)["cost"]
    assert cost["token_layers"] == 3 * 2 * 9 * 3
    assert cost["token_layers_shared"] == 9 * (3 + 3 + 2 + 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PROGRAMS)
def test_any_program_is_resolved_and_explained_or_refused_with_a_path(data: dict[str, Any]) -> None:
    prompts = {"main": MAIN, "cf": OTHER, "other": words([1, 2, 3])}
    program = parse_program(data)
    plan: ResolvedProgram | None = None
    refusal: InvivoError | None = None
    try:
        plan = resolve(program, LLAMA, prompts, blobs=BLOBS, encode=encode)
    except InvivoError as error:
        refusal = error
    if plan is None:
        assert refusal is not None
        assert refusal.field
        assert refusal.status in (400, 413)
        return
    explain_text(explain(plan))
    results = run_program(model("llama"), plan, blobs=BLOBS)
    assert len(results) == program.n_rows
    for result in results:
        for capture in result.captures:
            assert tuple(capture.value.shape) == capture.ref.shape


def test_bytes_and_touches_are_bounded() -> None:
    capture = {"out": [{"capture": "layers.*.attn.head.*.prob"}]}
    assert find(capture).n_bytes == 3 * 9 * 4 * 9 * 4
    with pytest.raises(TooLarge, match="at most 1000 bytes"):
        find(capture, bounds=ResolveBounds(capture_bytes=1000))
    with pytest.raises(TooLarge, match="sites"):
        find({"steps": [{"at": HEADS, "do": "zero"}] * 20}, bounds=ResolveBounds(touches=50))
    many = {"steps": [{"at": HEADS, "do": "zero"}] * 1000, "sweep": {"L": "0..4095"}}
    with Calls() as calls, pytest.raises(TooLarge, match="rows times steps"):
        find(many)
    assert calls.n < 200_000


def test_resolving_is_quick_and_cached() -> None:
    config, n = LLAMA, 20
    steps = [
        {"at": f"layers.{i % 3}.attn.head.*.z", "pos": "@last", "do": "replace", "from": "cf"}
        for i in range(n)
    ]
    program = parse_program({"runs": {"cf": {"prompt": "x"}}, "steps": steps})
    prompts = {"main": words(list(range(40)) * 5), "cf": words(list(range(40)) * 5)}
    with Calls() as calls:
        resolve(program, config, prompts)
    assert calls.n < 10_000
    cache = ResolveCache(size=2)
    made: list[str] = []

    def make(name: str) -> ResolvedProgram:
        made.append(name)
        return find({})

    for name in ("a", "b", "a", "c", "a", "b"):
        cache.get((name,), lambda name=name: make(name))
    assert made == ["a", "b", "c", "b"]
    assert len(cache) == 2


def test_blobs_are_checked_hashed_and_counted() -> None:
    blobs = Blobs(budget=100)
    digest = blobs.add("v", torch.arange(4.0))
    assert digest == content_hash(torch.arange(4.0))
    assert digest != content_hash(torch.arange(4.0).double())
    assert torch.equal(blobs.get(digest, "x"), blobs.get("v", "x"))
    assert blobs.n_bytes == 16
    assert blobs.hashes(["v", "none"]) == (f"v={digest}",)
    with pytest.raises(TooLarge, match="100 bytes"):
        blobs.add("w", torch.zeros(100))
    for bad in (torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])):
        with pytest.raises(InvalidRequest, match="infinite"):
            blobs.add("bad", bad)
    for bad in (torch.zeros(0), torch.zeros(1, dtype=torch.complex64), torch.zeros(1, 1, 1, 1, 1)):
        with pytest.raises(InvalidRequest, match="dimensions"):
            blobs.add("bad", bad)
