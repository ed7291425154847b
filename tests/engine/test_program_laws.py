"""The laws of programs on the live engine, in float64: several requests in a batch, in chunks.

Law 5 (chunks, prefixes, batch-mates, decode) is what test_programs.py and test_programs_runs.py
are about; law 8 concerns no engine (tests/edits/test_program.py), law 12 stands in
tests/test_exact_numerics.py.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.edits.small_models import CONFIGS, MAIN, OTHER, close, model, words
from tests.engine.drive import run, small_engine
from tests.engine.test_programs_runs import ask, carried, engine_of, no_runs_left, result

from invivo.edits.blobs import Blobs
from invivo.edits.expand import expand_key_heads
from invivo.edits.prompt_text import PromptText
from invivo.engine.engine import Engine
from invivo.models.decoder import Layer
from invivo.models.load import LoadedModel

FAMILIES = list(CONFIGS)
LOGITS = [{"capture": "logits", "pos": "@all", "name": "logits"}]


def said(
    engine: Engine,
    programs: list[dict[str, Any]],
    prompt: PromptText = MAIN,
    out: list[dict[str, Any]] = LOGITS,
    blobs: Blobs | None = None,
) -> list[dict[tuple[str, int], torch.Tensor]]:
    """What each of several programs brings back by (name, layer), all asked at once."""
    made = [carried(engine, {"out": out, **p}, prompt, blobs=blobs) for p in programs]
    asked = [ask(engine, one, prompt) for one in made]
    run(engine, *asked)
    no_runs_left(engine)
    return [
        {(c.ref.name, c.ref.ref.layer): c.value for c in result(one).rows[0].captures}
        for one in asked
    ]


def logits(engine: Engine, *programs: dict[str, Any], **more: Any) -> list[torch.Tensor]:
    return [found["logits", -1] for found in said(engine, list(programs), **more)]


SITES = [
    "embed.out", "layers.*.resid.pre", "layers.*.attn.in", "layers.*.attn.head.*.q",
    "layers.*.attn.kvhead.*.k", "layers.*.attn.kvhead.*.v", "layers.*.attn.head.*.z",
    "layers.*.attn.out", "layers.*.resid.mid", "layers.*.mlp.in", "layers.*.mlp.out",
    "layers.*.resid.post", "final.norm.out",
]  # fmt: skip
NOTHING: list[dict[str, Any]] = [
    {"do": "scale", "a": 1},
    {"do": "add", "v": 0},
    {"do": "lerp", "w": 1, "from": {"run": "cf"}},
    {"do": "replace", "from": {"run": "main"}},
    {"do": "replace", "from": {"run": "plain"}},
    {"do": "freeze", "to": "plain"},
    {"do": "noise", "s": 0},
]


@settings(max_examples=6, deadline=None)
@given(site=st.sampled_from(SITES), rows=st.sampled_from([7, 64]))
@pytest.mark.parametrize("family", FAMILIES)
def test_law_1_what_changes_nothing_changes_no_bit(family: str, site: str, rows: int) -> None:
    for step in NOTHING:
        # Each by itself: another row in the batch may round a row otherwise.
        (plain,) = logits(engine_of(family, max_batch_tokens=rows, prefix_cache=False), {})
        changed = engine_of(family, max_batch_tokens=rows, prefix_cache=False)
        (found,) = logits(changed, {"steps": [{"at": site, **step}]})
        if "from" in step or "to" in step:  # the other run is in the batch
            close(found, plain)
        else:
            assert torch.equal(found, plain)


@settings(max_examples=4, deadline=None)
@given(layer=st.integers(0, 2), rows=st.sampled_from([7, 13, 64]))
@pytest.mark.parametrize("family", FAMILIES)
def test_law_2_a_replaced_stream_gives_the_other_runs_output(
    family: str, layer: int, rows: int
) -> None:
    engine = engine_of(family, max_batch_tokens=rows)
    step = {"at": f"layers.{layer}.resid.post", "do": "replace", "from": {"run": "cf"}}
    (found,) = logits(engine, {"steps": [step]})
    (expected,) = logits(engine, {}, prompt=OTHER)
    close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_law_3_captures_add_up(family: str) -> None:
    engine = engine_of(family)
    config = engine.model.config
    names = ["resid.pre", "attn.out", "resid.mid", "mlp.out", "resid.post"]
    proj = "attn.proj" if config.post_norm else "attn.out"
    heads = {"out": "attn.head.*.out", "z": "attn.head.*.z", "prob": "attn.head.*.prob",
             "v": "attn.kvhead.*.v"}  # fmt: skip
    out = [{"capture": f"layers.*.{n}", "name": n} for n in dict.fromkeys([*names, proj])]
    out += [{"capture": f"layers.*.{site}", "name": n} for n, site in heads.items()]
    out += [{"capture": n, "name": n} for n in ("final.norm.out", "logits")]
    (s,) = said(engine, [{}], out=out)
    decoder = engine.model.decoder
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        close(s["resid.pre", i] + s["attn.out", i], s["resid.mid", i])
        close(s["resid.mid", i] + s["mlp.out", i], s["resid.post", i])
        bias = layer.mixer.o_bias
        close(s["out", i].sum(1) + (0 if bias is None else bias), s[proj, i])
        v = s["v", i].repeat_interleave(config.n_heads // config.n_kv_heads, 1)
        close(torch.einsum("thl,lhd->thd", s["prob", i], v), s["z", i])
    close(decoder.logits(s["final.norm.out", -1]), s["logits", -1])


@settings(max_examples=5, deadline=None)
@given(
    layer=st.integers(0, 2),
    position=st.integers(0, 8),
    site=st.sampled_from(["resid.mid", "attn.head.*.z", "attn.kvhead.*.v", "mlp.out"]),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_law_4_nothing_before_the_first_touch_changes(
    family: str, layer: int, position: int, site: str
) -> None:
    engine = engine_of(family)
    out = [*LOGITS, {"capture": "layers.*.resid.post", "name": "r"}]
    step = {"at": f"layers.{layer}.{site}", "pos": {"index": position}, "do": "scale", "a": 3}
    future = {"at": "layers.*.attn.edge", "do": "edge_block", "from": {"range": [5, 9]},
              "to": {"range": [0, 5]}}  # fmt: skip
    plain, found, blocked = said(engine, [{}, {"steps": [step]}, {"steps": [future]}], out=out)
    for i in range(3):
        close(found["r", i][:position], plain["r", i][:position])
        if i < layer:
            close(found["r", i], plain["r", i])
    close(found["logits", -1][:position], plain["logits", -1][:position])
    assert (found["r", layer][position] - plain["r", layer][position]).abs().max() > 1e-9
    close(blocked["logits", -1], plain["logits", -1])


@settings(max_examples=4, deadline=None)
@given(
    layer=st.integers(0, 2),
    site=st.sampled_from(["kvhead.1.k", "kvhead.1.v", "kvhead.1.k.rot"]),
    first=st.integers(0, 4),
)
@pytest.mark.parametrize("family", ["llama", "gemma", "olmo2", "moe"])
def test_law_6_a_shared_head_is_its_copies(family: str, layer: int, site: str, first: int) -> None:
    wide = expand_key_heads(model(family))
    loaded = LoadedModel("wide", Path("."), wide.config, wide, None, "wide")
    expanded = small_engine(loaded, block_size=4, max_running=6, max_batch_tokens=13)
    edit = {"do": "scale", "a": 0.3, "pos": {"range": [first, first + 3]}}
    shared = {"at": f"layers.{layer}.attn.{site}", **edit}
    copies = [{"at": f"layers.{layer}.attn.{site.replace('1.', f'{h}.')}", **edit} for h in (2, 3)]
    (one,) = logits(engine_of(family), {"steps": [shared]})
    (other,) = logits(expanded, {"steps": copies})
    close(one, other)


def test_law_7_effects_of_all_senders_add_up_to_the_total() -> None:
    engine = engine_of("llama", max_running=40, max_batch_tokens=200)
    freeze = [
        {"at": "layers.*.mlp", "do": "skip"},
        {"at": ["layers.*.norm1.scale", "final.norm.scale"], "do": "freeze", "to": "base"},
        {"at": "layers.*.attn.head.*.prob", "do": "freeze", "to": "base"},
        {"at": "layers.*.attn.head.*.out", "do": "freeze", "to": "base"},
    ]
    runs = {"cf": {"prompt": "other"}, "base": {"same": "main"}, "cf_base": {"same": "cf"}}
    skip = [{"at": "layers.*.mlp", "do": "skip", "run": name} for name in ("base", "cf_base")]
    senders = ["embed.out", *(f"layers.{i}.attn.head.{h}.out" for i in range(3) for h in range(4))]

    def effect(at: list[str]) -> torch.Tensor:
        patch = {"at": at, "do": "replace", "from": {"run": "cf_base"}, "pos": "@last"}
        found = said(
            engine,
            [{"runs": runs, "steps": [*skip, *freeze, patch]}],
            out=[{"capture": "logits", "pos": "@last", "run": r, "name": r}
                 for r in ("main", "base")],
        )[0]  # fmt: skip
        moved = found["main", -1] - found["base", -1]
        return moved[:, 3] - moved[:, 7]

    single = [effect([sender]) for sender in senders]
    close(torch.stack(single).sum(0), effect(senders), 1e-10)
    assert sum(float(e.abs() > 1e-3) for e in single) >= 6


@pytest.mark.parametrize("family", ["llama", "gpt2", "moe"])
def test_law_7_direct_shares_add_up_to_the_logit_difference(family: str) -> None:
    engine = engine_of(family)
    decoder = engine.model.decoder
    head = decoder.embed if decoder.head is None else decoder.head
    out = [
        {"capture": name, "pos": "@last", "reduce": "direct", "tokens": [3, 7], "name": "share"}
        for name in ("embed.out", "layers.*.attn.out", "layers.*.mlp.out")
    ]
    out.append({"capture": "final.norm.scale", "pos": "@last", "name": "scale"})
    carry = carried(engine, {"out": [*out, {"measure": "logit_diff", "a": 3, "b": 7}]})
    got = ask(engine, carry)
    run(engine, got)
    (row,) = result(got).rows
    shares = [c.value for c in row.captures if c.ref.name == "share"]
    (scale,) = [c.value for c in row.captures if c.ref.name == "scale"]
    total = scale.reshape(()) * sum(s[0, 0] - s[0, 1] for s in shares)
    if decoder.final_norm.bias is not None:
        total = total + (head[3] - head[7]) @ decoder.final_norm.bias
    assert float(total) == pytest.approx(float(row.measures[0].values[0]), abs=1e-10)


@settings(max_examples=4, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    order=st.randoms(use_true_random=False),
    rows=st.sampled_from([7, 64]),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_law_11_the_order_of_a_set_does_not_matter(
    family: str, sizes: list[int], order: Any, rows: int
) -> None:
    engine = engine_of(family, max_batch_tokens=rows)
    tokens = itertools.count(3)
    options = [[next(tokens) for _ in range(n)] for n in sizes]
    orders = [list(range(len(options))), list(range(len(options)))[::-1], []]
    orders[2] = order.sample(orders[0], len(options))
    found = []
    for chosen in orders:
        ids, ranges = [1, 2], []
        for i in chosen:
            ranges.append((len(ids), len(ids) + len(options[i])))
            ids += options[i]
        prompt = words([*ids, 30, 31, 32], groups={"option": tuple(ranges)})
        blocks = [{"group": "option", "nth": i} for i in range(len(options))]
        step = {"at": "input.mask", "do": "parallel", "blocks": blocks}
        (got,) = logits(engine, {"steps": [step]}, prompt=prompt)
        found.append(got[-3:])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_law_11_copies_of_an_option_count_as_often_as_they_stand_there(family: str, k: int) -> None:
    """k equal blocks are one whose keys count k times for all that follows."""
    option, suffix = [3, 4, 5], [30, 31]
    engine = engine_of(family)
    ranges = tuple((2 + 3 * i, 5 + 3 * i) for i in range(k))
    prompt = words([1, 2, *option * k, *suffix], groups={"option": ranges})
    blocks = [{"group": "option", "nth": i} for i in range(k)]
    step = {"at": "input.mask", "do": "parallel", "blocks": blocks}
    (copies,) = logits(engine, {"steps": [step]}, prompt=prompt)
    one = words([1, 2, *option, *suffix])
    often = {"at": "layers.*.attn.edge", "do": "edge_scale", "a": k, "renormalise": True,
             "from": {"range": [2, 5]}, "to": {"range": [5, 7]}}  # fmt: skip
    (counted,) = logits(engine, {"steps": [often]}, prompt=one)
    close(copies[-2:], counted[-2:])
    (plain,) = logits(engine, {}, prompt=one)
    assert (counted[-2:] - plain[-2:]).abs().max() > 1e-3
