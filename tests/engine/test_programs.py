"""Requests that carry programs: the live engine against the oracle, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.edits.small_models import CONFIGS, encode, model, random_ids, words
from tests.engine.drive import Inquiry, ask, run, settle, small_engine

from invivo.edits.blobs import Blobs
from invivo.edits.oracle import RowResult, run_program
from invivo.edits.program import parse_program
from invivo.edits.prompt_text import PromptText
from invivo.edits.resolve import resolve
from invivo.engine.engine import Engine
from invivo.engine.programs import stacked_to_host
from invivo.engine.types import Intervention
from invivo.errors import InvalidRequest, TooLarge
from invivo.models.cache import bytes_per_block
from invivo.models.load import LoadedModel

N_NEW = 5
BLOBS = Blobs(
    {
        "v": torch.linspace(-1, 1, 16, dtype=torch.float64),
        "basis": torch.eye(16, dtype=torch.float64)[[2, 5]],
        "pool": torch.sin(torch.arange(7 * 16, dtype=torch.float64)).view(7, 16),
    }
)
FAMILIES = list(CONFIGS)
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0}


def engine_of(family: str, **options: Any) -> Engine:
    decoder = model(family)
    loaded = LoadedModel(
        name=family,
        path=Path("."),
        config=decoder.config,
        decoder=decoder,
        tokenizer=None,
        fingerprint=family,
    )
    return small_engine(loaded, **({"block_size": 4, "max_running": 4} | options))


def carried(family: str, program: dict[str, Any], prompt: PromptText) -> Intervention:
    resolved = resolve(
        parse_program(program), CONFIGS[family], {"main": prompt}, blobs=BLOBS, encode=encode
    )
    return Intervention(resolved, BLOBS)


def generate(
    engine: Engine, ids: list[int], program: dict[str, Any] | None, **more: Any
) -> Inquiry:
    family = engine.model.name
    if program is not None:
        prompt = words(ids, n_prompt=len(ids), n_new=N_NEW)
        more["intervention"] = carried(family, program, prompt)
    return ask(engine, ids, max_tokens=N_NEW, **GREEDY, **more)


def oracle(family: str, ids: list[int], n_prompt: int, program: dict[str, Any]) -> RowResult:
    """One dense pass over all tokens that went through the model."""
    prompt = words(ids, n_prompt=n_prompt, n_new=N_NEW)
    carry = carried(family, program, prompt)
    (row,) = run_program(model(family), carry.resolved, blobs=BLOBS)
    return row


def assert_as_the_oracle(got: Inquiry, family: str, program: dict[str, Any]) -> None:
    ids, tokens = list(got.request.tokens), got.tokens()
    assert got.reason() == "length", got.outputs[-1].error
    expected = oracle(family, ids + tokens[:-1], len(ids), program)
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
    ["@all", "@last", "@prompt", "@generated", {"range": [1, 4]}, {"generated": [1, 3]}]
)
SITES = st.sampled_from(
    [
        "embed.out",
        "layers.0.resid.pre",
        "layers.1.resid.mid",
        "layers.*.resid.post",
        "layers.1.attn.head.[0,3].z",
        "layers.0.attn.head.2.q",
        "layers.2.attn.kvhead.1.k",
        "layers.1.attn.kvhead.0.v",
        "layers.1.attn.out",
        "layers.*.mlp.out",
        "final.norm.out",
        "logits",
    ]
)
WIDE = st.sampled_from(["layers.0.resid.post", "layers.1.mlp.out", "layers.2.attn.out"])
STEP = st.one_of(
    st.fixed_dictionaries({"at": SITES, "pos": POSITIONS, "do": st.just("zero")}),
    st.fixed_dictionaries(
        {"at": SITES, "pos": POSITIONS, "do": st.just("scale"), "a": st.sampled_from([0.5, 1, -2])}
    ),
    st.fixed_dictionaries(
        {"at": SITES, "pos": POSITIONS, "do": st.just("noise"), "s": st.just(0.3)}
    ),
    st.fixed_dictionaries(
        {"at": SITES, "pos": POSITIONS, "do": st.just("clamp"), "min": st.just(-0.3)}
    ),
    st.fixed_dictionaries(
        {"at": WIDE, "pos": POSITIONS, "do": st.just("add"), "v": st.just("blob:v")}
    ),
    st.fixed_dictionaries(
        {"at": WIDE, "pos": POSITIONS, "do": st.just("lerp"), "w": st.just(0.25),
         "from": st.just("blob:v")}
    ),
    st.fixed_dictionaries(
        {"at": WIDE, "pos": POSITIONS, "do": st.just("project_out"), "basis": st.just("blob:basis")}
    ),
    st.fixed_dictionaries(
        {"at": st.just("layers.1"), "pos": POSITIONS, "do": st.just("skip")}
    ),
    st.fixed_dictionaries(
        {"at": WIDE, "pos": POSITIONS, "do": st.just("resample"), "pool": st.just("blob:pool")}
    ),
    st.fixed_dictionaries(
        {"at": WIDE, "pos": POSITIONS, "do": st.just("mean"), "over": st.just("blob:pool"),
         "positions": st.just("all")}
    ),
)  # fmt: skip
OUT = st.one_of(
    st.fixed_dictionaries(
        {"capture": SITES, "pos": POSITIONS, "when": st.sampled_from(["before", "after"])}
    ),
    st.fixed_dictionaries(
        {"capture": WIDE, "pos": POSITIONS, "reduce": st.just("lens"), "tokens": st.just([3, 5])}
    ),
    st.fixed_dictionaries({"capture": WIDE, "pos": POSITIONS, "reduce": st.just("mean")}),
    st.just({"capture": "layers.*.attn.head.*.out", "pos": "@last", "reduce": "norm"}),
    st.just({"capture": "final.norm.scale"}),
    st.sampled_from(["logprob", "rank", "logit"]).map(
        lambda kind: {"measure": kind, "token": 7, "pos": "@all"}
    ),
)
PROGRAMS = st.fixed_dictionaries(
    {"steps": st.lists(STEP, max_size=3), "out": st.lists(OUT, max_size=2)}
)


@settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    family=st.sampled_from(FAMILIES),
    programs=st.lists(st.one_of(st.none(), PROGRAMS), min_size=1, max_size=4),
    rows=st.sampled_from([5, 9, 64]),
    n_blocks=st.sampled_from([7, 60]),
    again=st.booleans(),
)
def test_any_program_beside_any_others_does_what_the_oracle_says(
    family: str, programs: list[dict[str, Any] | None], rows: int, n_blocks: int, again: bool
) -> None:
    block = bytes_per_block(CONFIGS[family], block_size=4, dtype=torch.float64)
    engine = engine_of(family, max_batch_tokens=rows, kv_bytes=n_blocks * block)
    common = random_ids(3, 6)  # so that prefixes recur
    for _ in range(1 + again):
        asked = [
            (generate(engine, [*common, 8 + i % 2], program), program)
            for i, program in enumerate(programs)
        ]
        run(engine, *[inquiry for inquiry, _ in asked])
        for inquiry, program in asked:
            if program is None:
                apart = engine_of(family)
                alone = generate(apart, list(inquiry.request.tokens), None)
                run(apart, alone)
                assert inquiry.tokens() == alone.tokens()
                assert inquiry.logprobs() == pytest.approx(alone.logprobs(), abs=1e-11)
            else:
                assert_as_the_oracle(inquiry, family, program)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_nothing_leaves_every_bit(family: str) -> None:
    ids = random_ids(4)
    engine = engine_of(family, prefix_cache=False)
    plain = generate(engine, ids, None)
    run(engine, plain)
    programs: list[dict[str, Any]] = [
        {},
        {"steps": [{"at": "layers.*.resid.post", "do": "scale", "a": 1}]},
        {"out": [{"capture": "layers.*.attn.head.*.z"}, {"measure": "prob", "token": 3}]},
    ]
    for program in programs:
        carrying = generate(engine, ids, program)
        run(engine, carrying)
        assert carrying.tokens() == plain.tokens()
        assert carrying.logprobs() == plain.logprobs()


def test_scores_are_those_of_the_changed_model() -> None:
    ids = random_ids(5)
    program = {
        "steps": [{"at": "layers.1.mlp.out", "do": "scale", "a": 2, "pos": {"range": [2, 5]}}],
        "out": [{"measure": "logprob", "token": 9, "pos": "@all"}],
    }
    engine = engine_of("llama", max_batch_tokens=5)
    got = ask(engine, ids, kind="score", intervention=carried("llama", program, words(ids)))
    run(engine, got)
    (expected,) = run_program(
        model("llama"), carried("llama", program, words(ids)).resolved, blobs=BLOBS
    )
    log = torch.log_softmax(expected.logits["main"], -1)[range(len(ids) - 1), ids[1:]]
    assert got.prompt_logprobs() == pytest.approx(log.tolist(), abs=1e-9)
    output = got.outputs[-1].program
    assert output is not None
    torch.testing.assert_close(output.rows[0].measures[0].values, expected.measures[0].values)


def test_captures_alone_share_prefixes_with_plain_requests_and_changes_do_not() -> None:
    engine = engine_of("llama")
    ids = random_ids(6)
    run(engine, generate(engine, ids, None))
    looked = generate(engine, ids, {"out": [{"capture": "layers.0.resid.post", "pos": "@last"}]})
    run(engine, looked)
    assert looked.outputs[-1].cached_tokens == 8
    everything = generate(engine, ids, {"out": [{"capture": "layers.0.resid.post"}]})
    run(engine, everything)
    assert everything.outputs[-1].cached_tokens == 0
    change = {"steps": [{"at": "layers.0.resid.post", "do": "zero", "pos": "@prompt"}]}
    for cached in (0, 8):
        changed = generate(engine, ids, change)
        run(engine, changed)
        assert changed.outputs[-1].cached_tokens == cached


def test_an_abort_leaves_nothing() -> None:
    engine = engine_of("llama")
    inquiry = generate(engine, random_ids(7), {"out": [{"capture": "layers.*.resid.post"}]})
    engine.step()
    engine.step()
    engine.abort(inquiry.request.id)
    settle(engine)
    assert inquiry.reason() == "cancelled"
    assert inquiry.outputs[-1].program is None


@pytest.mark.parametrize(
    "program",
    [
        {"steps": [{"at": "layers.0", "do": "stop"}], "out": []},
        {"steps": [{"at": "layers.0.resid.post", "do": "replace", "from": "plain"}]},
        {"sweep": {"L": "0..1"}, "steps": [{"at": "layers.$L.resid.post", "do": "zero"}]},
        {"steps": [{"at": "layers.0.resid.post", "pos": {"index": 2}, "do": "replace",
                    "from": {"run": "main", "at": "layers.0.resid.pre", "pos": {"index": 5}}}]},
        {"steps": [{"at": "layers.0.attn.head.0.k", "do": "zero", "expand": True}]},
        {"out": [{"measure": "kl", "to": "plain", "pos": "@generated"}]},
        {"out": [{"measure": "kl", "to": "plain", "pos": "@all"}]},
        {"out": [{"measure": "logit", "token": 1, "run": "plain", "pos": "@generated"}]},
        {"out": [{"capture": "layers.0.resid.post", "run": "plain", "pos": "@generated"}]},
    ],
)  # fmt: skip
def test_what_is_not_carried_in_a_generation_is_refused(program: dict[str, Any]) -> None:
    engine = engine_of("llama")
    with pytest.raises(InvalidRequest) as refused:
        generate(engine, random_ids(8), program)
    assert refused.value.remedy
    settle(engine)


def test_captures_are_bounded_before_anything_runs() -> None:
    engine = engine_of("llama", max_capture_bytes=64)
    with pytest.raises(TooLarge):
        generate(engine, random_ids(8), {"out": [{"capture": "layers.*.resid.post"}]})
    with pytest.raises(InvalidRequest):
        generate(engine, random_ids(8), {}, n=2)
    settle(engine)


def test_values_come_to_the_host_in_order_whatever_their_shapes() -> None:
    shapes = [(2, 3), (4,), (2, 3), (0, 3), (4,), (2, 3)]
    dtypes = [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]
    values = [
        torch.full(shape, float(i), dtype=dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, [*dtypes, torch.float32], strict=True))
    ]
    for value, got in zip(values, stacked_to_host(values), strict=True):
        assert torch.equal(got, value.float())
    assert stacked_to_host([]) == []
