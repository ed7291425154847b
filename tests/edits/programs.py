"""Strategies for programs: valid ones of every operation, selector and output."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from invivo.edits.operations import MEASURES, OPERATIONS, REDUCTIONS, Argument

_NUMBERS = st.one_of(
    st.integers(-5, 5), st.floats(-3, 3, allow_nan=False, width=32), st.just(2.0), st.just(-0.0)
)
_INDICES = st.sampled_from(["0", "1", "*", "0-2", "[0,2]", "[0-1,2]", "@late"])
SITES = st.one_of(
    st.sampled_from(["embed.out", "final.norm.out", "logits", "blocks.1.hook_resid_pre"]),
    _INDICES.map(lambda i: f"layers.{i}.resid.post"),
    st.tuples(_INDICES, _INDICES).map(lambda p: f"layers.{p[0]}.attn.head.{p[1]}.z"),
    _INDICES.map(lambda i: f"layers.{i}.mlp.neuron[3,5-7]"),
)
SELECTORS = st.one_of(
    st.sampled_from(["@last", "@all", "@subject"]),
    st.integers(-4, 4).map(lambda i: {"index": i}),
    st.just({"index": [0, 2]}),
    st.just({"range": [1, 3]}),
    st.tuples(st.just("w3"), st.sampled_from(["all", 0, -1])).map(
        lambda p: {"span": p[0], "nth": p[1], "take": "first"}
    ),
    st.just({"regex": "w(\\d)", "group": 1, "nth": 0}),
    st.just({"offset": -1, "of": {"token": 3, "nth": 0}}),
    st.just({"same_token_as": "@last", "nth": "all"}),
    st.just({"or": [{"role": "user"}, {"not": {"group": "image"}}]}),
    st.sampled_from([{"generated": True}, {"generated": [1, None]}, {"generated": [0, 4]}]),
)
_SOURCES = st.one_of(
    st.sampled_from(["cf", "blob:x"]),
    st.fixed_dictionaries(
        {"run": st.just("cf")},
        optional={"map": st.sampled_from(["index", "end"]), "at": st.just("layers.0.resid.pre")},
    ),
)


def _argument(argument: Argument) -> st.SearchStrategy[Any]:
    match argument.kind:
        case "value":
            options: list[st.SearchStrategy[Any]] = []
            if "number" in argument.takes:
                options.append(_NUMBERS)
            if "vector" in argument.takes:
                options += [st.just("blob:v"), st.lists(_NUMBERS, min_size=1, max_size=3)]
            if "matrix" in argument.takes:
                options += [st.just("blob:b"), st.just([[1.0, 0.0], [0.0, 1.0]])]
            if "param" in argument.takes:
                options.append(st.just({"param": "p"}))
            return st.one_of(options)
        case "source":
            return _SOURCES
        case "selector":
            return SELECTORS
        case "selectors":
            return st.lists(SELECTORS, min_size=2, max_size=3)
        case "sites":
            return st.one_of(SITES, st.lists(SITES, min_size=1, max_size=2))
        case "run":
            return st.sampled_from(["plain", "cf"])
        case "other":
            return st.sampled_from(["plain", {"row": {"L": 2}}, {"row": {"L": 0}, "run": "cf"}])
        case "pool":
            return st.sampled_from([["cf", "other"], "blob:x"])
        case "ints":
            return st.lists(st.integers(0, 9), min_size=1, max_size=3)
        case "int":
            return st.integers(1, 9)
        case "text":
            return st.just("poet")
        case "bool":
            return st.booleans()
        case "choice":
            return st.sampled_from(argument.takes)
        case "token":
            return st.sampled_from([" w3", 5])
        case "tokens":
            return st.just([" w3", 5])
        case _:
            return st.just([[1, 2], [" w3"]])


def _arguments(table: tuple[Argument, ...]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {a.name: _argument(a) for a in table if a.required},
        optional={a.name: _argument(a) for a in table if not a.required},
    )


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    operation = draw(st.sampled_from(list(OPERATIONS.values())))
    step = {"at": draw(st.one_of(SITES, st.lists(SITES, min_size=1, max_size=2)))}
    step |= {"do": operation.name} | draw(_arguments(operation.arguments))
    if operation.name == "clamp":
        step |= {"min": -1, "max": 1.5}
    if operation.positions and draw(st.booleans()):
        step["pos"] = draw(SELECTORS)
    if draw(st.booleans()):
        step["run"] = "cf"
    return step


@st.composite
def outputs(draw: st.DrawFn) -> dict[str, Any]:
    if draw(st.booleans()):
        kind = draw(st.sampled_from(list(MEASURES)))
        out = {"measure": kind} | draw(_arguments(MEASURES[kind]))
    else:
        reduce = draw(st.sampled_from(list(REDUCTIONS)))
        out = {"capture": draw(SITES)}
        if reduce == "lens":
            out |= {"reduce": reduce, "top": draw(st.integers(1, 5))}
        else:
            out |= {"reduce": reduce} | draw(_arguments(REDUCTIONS[reduce]))
        if draw(st.booleans()):
            out["when"] = draw(st.sampled_from(["before", "after"]))
            out["keep"] = draw(st.booleans())
    if draw(st.booleans()):
        out["pos"] = draw(SELECTORS)
    if draw(st.booleans()):
        out["name"] = "result"
    return out


PROGRAMS = st.fixed_dictionaries(
    {
        "runs": st.just({"cf": {"prompt": [1, 2, 3]}, "other": "text", "again": {"same": "cf"}}),
        "sets": st.just({"late": [2, 1]}),
        "params": st.just({"p": {"shape": [2], "init": 0.5}}),
        "sel": st.fixed_dictionaries({"subject": SELECTORS}),
        "steps": st.lists(steps(), max_size=3),
        "out": st.lists(outputs(), max_size=2),
    },
    optional={
        "v": st.just(1),
        "model": st.just("tiny"),
        "numerics": st.sampled_from(["fast", "exact"]),
        "recompute": st.booleans(),
        "sweep": st.sampled_from([{"L": "0..2"}, {"L": [0, 2], "a": [0.5, 1.0]}]),
    },
)
