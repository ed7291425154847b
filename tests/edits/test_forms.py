"""The Python, command line and YAML forms compile to the same JSON."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.edits.small_models import MAIN, model, resolved, run

from invivo.edits.blobs import Blobs
from invivo.edits.builder import (
    Place,
    all_of,
    any_of,
    but,
    generated,
    group,
    last,
    offset,
    parameter,
    program,
    regex,
    role,
    same_token_as,
    span,
    steps,
    token,
)
from invivo.edits.operations import OPERATIONS
from invivo.edits.program import parse_program
from invivo.edits.short import read_short
from invivo.edits.yaml_form import read_yaml
from invivo.errors import InvalidRequest

JSON: dict[str, Any] = {
    "runs": {"cf": {"prompt": "The capital of Italy is"}},
    "sel": {"country": {"span": "Poland", "take": "last"}},
    "steps": [
        {
            "at": "layers.12.attn.head.3.z",
            "pos": "@last",
            "do": "replace",
            "from": {"run": "cf"},
        },
        {"at": "layers.3.resid.post", "pos": "@country", "do": "scale", "a": 2},
        {
            "at": "layers.*.attn.edge",
            "do": "edge_block",
            "from": {"span": "Poland"},
            "to": "@last",
        },
    ],
    "out": [
        {"capture": "layers.*.resid.post", "pos": "@last", "reduce": "lens", "top": 5},
        {"measure": "logit_diff", "a": " Warsaw", "b": " Rome", "pos": "@last"},
    ],
}


def test_the_python_form_is_the_json_form() -> None:
    built = (
        program()
        .run("cf", "The capital of Italy is")
        .select("country", span("Poland", take="last"))
        .at("layers.12.attn.head.3.z", last)
        .replace("cf")
        .at("layers.3.resid.post", "@country")
        .scale(2.0)
        .at("layers.*.attn.edge")
        .edge_block(keys=span("Poland"), queries=last)
        .capture("layers.*.resid.post", last, reduce="lens", top=5)
        .measure("logit_diff", last, a=" Warsaw", b=" Rome")
        .build()
    )
    assert built.to_json() == parse_program(JSON).to_json()


def test_the_command_line_form_is_the_json_form() -> None:
    short = read_short(
        [
            "layers.12.attn.head.3.z@last=replace(cf)",
            "layers.3.resid.post@country=scale(2)",
            'layers.*.attn.edge=edge_block(from={"span": "Poland"}, to=@last)',
            "layers.*.resid.post@last?lens(5)",
            '@last?logit_diff(" Warsaw", " Rome")',
        ],
        runs=JSON["runs"],
    )
    expected = {key: value for key, value in JSON.items() if key != "sel"}
    expected["steps"][0]["from"] = "cf"
    assert short.to_json() == parse_program(expected).to_json()


def test_the_yaml_form_is_the_json_form() -> None:
    text = """
    runs:
      cf: The capital of Italy is
    sel:
      country: {span: Poland, take: last}
    steps:
      - {at: layers.12.attn.head.3.z, pos: "@last", do: replace, from: cf}
      - {at: layers.3.resid.post, pos: "@country", do: scale, a: 2}
      - {at: layers.*.attn.edge, do: edge_block, from: {span: Poland}, to: "@last"}
    out:
      - {capture: layers.*.resid.post, pos: "@last", reduce: lens, top: 5}
      - {measure: logit_diff, a: " Warsaw", b: " Rome", pos: "@last"}
    """
    assert read_yaml(text).hash == parse_program(JSON).hash


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("embed.out=zero", {"at": "embed.out", "do": "zero"}),
        ("layers.@late.mlp.out@-1=zero()", {"at": "layers.@late.mlp.out", "pos": {"index": -1}}),
        ("layers.[0,2].mlp.out@1..3=zero", {"pos": {"range": [1, 3]}}),
        ('embed.out@"a = b?"=zero', {"pos": {"span": "a = b?"}}),
        (r"embed.out@/B(o)x=\d/=zero", {"pos": {"regex": r"B(o)x=\d"}}),
        ("embed.out=add(blob:v, 2)", {"do": "add", "v": "blob:v", "c": 2}),
        ("embed.out=add(c=2, v=[1,2])", {"do": "add", "v": [1, 2], "c": 2}),
        ("embed.out=clamp(max=1)", {"do": "clamp", "max": 1}),
        ("sent:embed.out=replace(cf)", {"run": "sent", "from": {"run": "cf"}}),
        (
            'embed.out=lerp(0.5, {"run": "cf", "map": "end"})',
            {"w": 0.5, "from": {"run": "cf", "map": "end"}},
        ),
        ("layers.0.moe.expert.1.on=expert_off(true)", {"do": "expert_off", "renormalise": True}),
    ],
)
def test_words_of_the_command_line(entry: str, expected: dict[str, Any]) -> None:
    step = read_short([entry]).to_dict()["steps"][0]
    assert {key: step.get(key) for key in expected} == expected


def test_outputs_of_the_command_line() -> None:
    out = read_short(
        ['?logprob(" w3")', "cf:logits@2?none", "cf:@last?kl(main)"], runs={"cf": "x"}
    ).to_dict()["out"]
    assert out == [
        {"measure": "logprob", "token": " w3"},
        {"capture": "logits", "pos": {"index": 2}, "run": "cf"},
        {"measure": "kl", "pos": "@last", "run": "cf", "to": "main"},
    ]


@pytest.mark.parametrize(
    "entry",
    [
        "embed.out",
        "embed.out@last",
        "embed.out=explode",
        "embed.out=zero(1)",
        "embed.out=scale(1,2)",
        "embed.out=(1)",
        "embed.out?size",
        "?size(1)",
        'embed.out@"open=zero',
        "embed.out@/open=zero",
        "nowhere=zero",
        "",
    ],
)
def test_wrong_words_are_refused(entry: str) -> None:
    with pytest.raises(InvalidRequest):
        read_short([entry])


def test_every_operation_has_a_method() -> None:
    named = {name for name in dir(Place) if not name.startswith("_")} | {"set_tokens"}
    lacking = set(OPERATIONS) - named
    assert lacking == {"set_positions"}


def test_methods_write_what_they_are_called() -> None:
    at = program().at("layers.0.attn.head.1.z", slice(1, 3), run="cf", expand=True)
    place = {"at": "layers.0.attn.head.1.z", "pos": {"range": [1, 3]}, "run": "cf", "expand": True}
    assert at.noise(0.1, seed=2).data["steps"][-1] == {**place, "do": "noise", "s": 0.1, "seed": 2}
    builder = (
        program()
        .run("cf", [1, 2])
        .run("again", same="cf", adapter="poet")
        .set("late", [1, 2])
        .parameter("p", [4], init=1.0)
        .sweep(L="0..2", a=[1, 2])
    )
    z = builder.at("layers.0.attn.head.1.z", -1)
    for made in (
        z.zero(),
        z.scale(parameter("p")),
        z.add([1, 2, 3, 4], 0.5),
        z.set(0),
        z.clamp(low=-1),
        z.mean(["cf"], "all"),
        z.resample(["cf"], seed=1, map="end"),
        z.mean(torch.zeros(2, 3, 4), "all"),
        z.resample("blob:pool", seed=1),
        z.replace("cf", pos=0, map="one"),
        z.lerp(0.5, "cf"),
        z.freeze(except_=["layers.1.attn.head.1.z"]),
        builder.at("layers.0.attn.edge").edge_only(0, last),
        builder.at("layers.0.attn.edge").edge_scale(0.5, 0, last),
        builder.at("layers.0.moe.expert.0.on").expert_on(renormalise=True),
        builder.at("layers.0.moe.expert.0.on").expert_off(renormalise=True, reroute=True),
        builder.at("layers.0.moe.expert.0.on").expert_force(),
        builder.at("layers.0.moe.router").router_add(1),
        builder.at("layers.0").skip(),
        builder.at("layers.2").stop(),
        builder.at("weights.delta").use("poet"),
        builder.at("input.mask").parallel(slice(1, 2), slice(2, 4)),
        builder.at("input.tokens", 0).do("set_tokens", ids=[3]),
    ):
        assert made is builder
    printed = builder.build().to_dict()
    assert len(printed["steps"]) == 23
    assert printed["sweep"] == [["L", [0, 1, 2]], ["a", [1, 2]]]
    assert printed["runs"]["again"] == {"same": "cf", "adapter": "poet"}


def test_selector_functions_write_selectors() -> None:
    assert any_of(-1, but(generated)) == {"or": [{"index": -1}, {"not": "@generated"}]}
    assert all_of(regex("a(b)", group=1), role("user", nth=-1)) == {
        "and": [{"regex": "a(b)", "group": 1}, {"role": "user", "nth": -1}]
    }
    assert same_token_as(offset(1, token(5, nth="all")), nth=0) == {
        "same_token_as": {"offset": 1, "of": {"token": 5, "nth": "all"}},
        "nth": 0,
    }
    assert [steps(1), group("image", take="first")] == [
        {"generated": [1, None]},
        {"group": "image", "take": "first"},
    ]
    with pytest.raises(InvalidRequest):
        program().at("embed.out", slice(2, None))


def test_tensors_become_blobs_named_by_their_content() -> None:
    decoder = model("llama")
    vector = torch.arange(16, dtype=torch.float64)
    builder = program().at("layers.1.resid.post", last).add(vector, 0.1).at("embed.out").add(vector)
    assert len(builder.blobs) == 1
    blobs = Blobs(builder.blobs)
    plan = resolved(decoder, builder.build().to_dict(), {"main": MAIN}, blobs)
    assert plan.rows[0].runs["main"].touches[0].do == "add"
    inline = [
        {"at": "layers.1.resid.post", "pos": "@last", "do": "add", "v": list(range(16)), "c": 0.1}
    ]
    inline += [{"at": "embed.out", "do": "add", "v": list(range(16))}]
    one = run(decoder, builder.build().to_dict(), {"main": MAIN}, blobs).logits["main"]
    other = run(decoder, {"steps": inline}, {"main": MAIN}).logits["main"]
    assert torch.equal(one, other)
