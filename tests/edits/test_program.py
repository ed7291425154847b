"""Programs are data: one canonical form, one hash, and errors that name the field (law 8)."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.counting import Calls
from tests.edits.programs import PROGRAMS

from invivo.edits.program import Bounds, Step, parse_program
from invivo.edits.schema import json_schema
from invivo.edits.yaml_form import read_yaml, to_yaml
from invivo.errors import InvalidRequest, InvivoError, TooLarge

VALIDATOR = jsonschema_rs.Draft202012Validator(json_schema())
CALM = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])

EXAMPLE: dict[str, Any] = {
    "v": 1,
    "runs": {"clean": {"prompt": "Paris"}, "cf": {"prompt": "Rome"}},
    "sel": {"last": {"index": -1}, "prev": {"same_token_as": "@last", "nth": 0}},
    "steps": [
        {
            "at": "layers.9-20.attn.head.*.z",
            "pos": "@last",
            "do": "replace",
            "from": {"run": "clean"},
        },
        {"at": "layers.$L.attn.head.$H.z", "pos": "@last", "do": "replace", "from": "cf"},
    ],
    "sweep": {"L": "0..31", "H": "0..31"},
    "out": [{"measure": "logit_diff", "a": " Warsaw", "b": " London", "pos": "@last"}],
}


@CALM
@given(PROGRAMS)
def test_parse_print_parse_is_a_fixed_point(data: dict[str, Any]) -> None:
    program = parse_program(data)
    printed = program.to_json()
    again = parse_program(printed)
    assert again == program
    assert again.to_json() == printed
    assert again.hash == program.hash
    assert parse_program(again.to_dict()).hash == program.hash
    assert read_yaml(to_yaml(program)).hash == program.hash


@CALM
@given(PROGRAMS)
def test_what_the_parser_takes_the_schema_takes(data: dict[str, Any]) -> None:
    VALIDATOR.validate(data)
    VALIDATOR.validate(parse_program(data).to_dict())


@CALM
@given(PROGRAMS, st.randoms(use_true_random=False))
def test_the_hash_does_not_depend_on_the_order_of_keys_or_the_kind_of_number(
    data: dict[str, Any], random: Any
) -> None:
    def shuffled(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            keys = list(value)
            if key != "sweep":  # there the order is that of the rows
                random.shuffle(keys)
            return {k: shuffled(value[k], k) for k in keys}
        if isinstance(value, list):
            return [shuffled(v) for v in value]
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value) if random.random() < 0.5 else value
        return value

    assert parse_program(shuffled(data)).hash == parse_program(data).hash


@CALM
@given(PROGRAMS, st.data())
def test_unknown_keys_are_errors_with_their_path(data: dict[str, Any], draw: st.DataObject) -> None:
    places = [("", data)]
    places += [(f"steps[{i}].", step) for i, step in enumerate(data["steps"])]
    places += [(f"out[{i}].", out) for i, out in enumerate(data["out"])]
    path, place = draw.draw(st.sampled_from(places))
    place["colour"] = "red"
    try:
        with pytest.raises(InvalidRequest) as caught:
            parse_program(data)
        assert caught.value.field == f"{path}colour"
        assert not VALIDATOR.is_valid(data)
    finally:
        del place["colour"]


def test_the_example_is_what_it_says() -> None:
    program = parse_program(EXAMPLE)
    assert program.n_rows == 1024
    rows = list(program.rows())
    binding, last = rows[-1]
    assert binding == {"L": 31, "H": 31}
    assert rows[1][0] == {"L": 0, "H": 1}  # the last variable is the fastest
    step = last.steps[1]
    assert isinstance(step, Step)
    assert step.at[0].layers == ((31, 31),)
    assert last.steps[0] == program.steps[0]
    assert parse_program(last.to_dict()) == last


def test_variables_stand_for_values_or_for_text() -> None:
    data = {
        "steps": [
            {"at": "layers.$L.resid.post", "pos": {"index": "$P"}, "do": "scale", "a": "$a"},
            {"at": "embed.out", "do": "add", "v": 1},
        ],
        "out": [{"measure": "logprob", "token": "$5 $t"}],
        "sweep": [["L", [1]], ["P", [-1, 0]], ["a", [0.5]], ["t", ["x"]]],
    }
    (_, first), (_, second) = parse_program(data).rows()
    assert first.to_dict()["steps"][0] == {
        "at": "layers.1.resid.post",
        "pos": {"index": -1},
        "do": "scale",
        "a": 0.5,
    }
    assert second.to_dict()["steps"][0]["pos"] == {"index": 0}
    assert first.to_dict()["out"][0]["token"] == "$5 x"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"v": 2}, "v"),
        ({"numerics": "sloppy"}, "numerics"),
        ({"steps": {}}, "steps"),
        ({"steps": [{"at": "embed.out"}]}, "steps[0].do"),
        ({"steps": [{"do": "zero"}]}, "steps[0].at"),
        ({"steps": [{"at": "embed.out", "do": "explode"}]}, "steps[0].do"),
        ({"steps": [{"at": "embed.out", "do": "scale"}]}, "steps[0].a"),
        ({"steps": [{"at": "embed.out", "do": "scale", "a": "x"}]}, "steps[0].a"),
        ({"steps": [{"at": "embed.out", "do": "scale", "a": float("nan")}]}, "steps[0].a"),
        ({"steps": [{"at": "embed.out", "do": "scale", "a": 10**400}]}, "steps[0].a"),
        ({"steps": [{"at": "layers.\u0663.mlp.in", "do": "zero"}]}, "steps[0].at"),
        ({"steps": [{"at": "embed.out", "do": "add", "v": [[1, 2], [3]]}]}, "steps[0].v"),
        ({"steps": [{"at": "embed.out", "do": "clamp"}]}, "steps[0]"),
        ({"steps": [{"at": "embed.out", "do": "clamp", "min": 2, "max": 1}]}, "steps[0].min"),
        ({"steps": [{"at": "embed.out", "do": "zero", "run": "plain"}]}, "steps[0].run"),
        ({"steps": [{"at": "nowhere", "do": "zero"}]}, "steps[0].at"),
        ({"steps": [{"at": ["embed.out", "layers.x.mlp.in"], "do": "zero"}]}, "steps[0].at[1]"),
        (
            {"steps": [{"at": "embed.out", "do": "replace", "from": {"at": "x"}}]},
            "steps[0].from.run",
        ),
        ({"steps": [{"at": "layers.0", "do": "stop", "pos": "@last"}]}, "steps[0].pos"),
        ({"out": [{"measure": "size"}]}, "out[0].measure"),
        ({"out": [{"measure": "kl"}]}, "out[0].to"),
        ({"out": [{"capture": "logits", "measure": "kl"}]}, "out[0]"),
        ({"out": [{"capture": "logits", "reduce": "lens"}]}, "out[0]"),
        ({"out": [{"capture": "logits", "top": 3}]}, "out[0].top"),
        ({"runs": {"main": "x"}}, "runs.main"),
        ({"runs": {"a": {}}}, "runs.a"),
        ({"runs": {"a": {"same": "b"}}}, "runs.a.same"),
        ({"runs": {"a": {"same": "b"}, "b": {"same": "a"}}}, "runs.a.same"),
        ({"runs": {"a b": "x"}}, "runs"),
        ({"sweep": {"L": "5..1"}}, "sweep.L"),
        ({"sweep": {"L": []}}, "sweep.L"),
        ({"sweep": {"L": "all"}}, "sweep.L"),
        ({"params": {"p": {"shape": [0]}}}, "params.p.shape"),
        ({"sets": {"s": [-1]}}, "sets.s"),
        ({"sel": {"s": {"index": 1.5}}}, "sel.s.index"),
    ],
)
def test_errors_name_the_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_program(change)
    assert caught.value.field == field


def deep(n: int) -> Any:
    value: Any = "@last"
    for _ in range(n):
        value = {"not": value}
    return value


@pytest.mark.parametrize(
    "data",
    [
        {"steps": [{"at": "embed.out", "do": "zero"}] * 5000},
        {"sweep": {"L": "0..999999"}},
        {"sweep": {"L": "0..999999999"}},
        {"sweep": {"L": "0..99", "M": "0..99", "N": "0..99"}},
        {"sweep": [["L", [1]]] * 100_000},
        {"sel": {"a": deep(500)}},
        {"steps": [{"at": "x" * 3_000_000, "do": "zero"}]},
        {"steps": [{"at": "embed.out", "do": "add", "v": [0.5] * 300_000}]},
        {"runs": {f"r{i}": "x" for i in range(10_000)}},
        "[" * 100_000,
        '{"steps": ' * 50_000,
        b"\xff\xfe",
        "null",
        7,
        [],
    ],
    ids=range(15),
)
def test_hostile_programs_are_refused_at_once(data: Any) -> None:
    with Calls() as calls, pytest.raises(InvivoError) as caught:
        parse_program(data)
    assert caught.value.status in (400, 413)
    assert calls.n < 200_000


def test_bounds_can_be_tightened() -> None:
    with pytest.raises(TooLarge):
        parse_program(json.dumps(EXAMPLE), bounds=Bounds(n_bytes=100))
    with pytest.raises(TooLarge):
        parse_program(EXAMPLE, bounds=Bounds(rows=1023))


def test_yaml_aliases_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="aliases"):
        read_yaml("sets: {a: &x [1], b: *x}")
    with pytest.raises(InvalidRequest, match="no YAML"):
        read_yaml("steps: [}")
