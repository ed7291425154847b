"""The laws of the language on models that carry a state, on the oracle, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.edits.recurrent_models import RECURRENT, recurrent_model
from tests.edits.small_models import (
    MAIN,
    OTHER,
    captured,
    close,
    plain_logits,
    run,
    words,
)
from tests.edits.test_laws import spelled

from invivo.errors import InvalidRequest
from invivo.models.decoder import Decoder, Layer
from invivo.models.sites import sites_of

STATES = ["gla.head.q", "gla.head.k", "gla.head.v", "gla.head.gate", "gla.head.memory"]
STATES += ["gla.head.state", "gla.head.z"]


@pytest.fixture(params=list(RECURRENT))
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return recurrent_model(request.param)


# Law 1: what changes nothing changes no bit.


@pytest.mark.parametrize(
    "step",
    [
        {"do": "scale", "a": 1},
        {"do": "add", "v": 0},
        {"do": "lerp", "w": 1, "from": {"run": "cf"}},
        {"do": "replace", "from": {"run": "plain"}},
        {"do": "freeze", "to": "plain"},
        {"do": "replace", "from": {"run": "main"}},
        {"do": "noise", "s": 0},
    ],
    ids=lambda step: f"{step['do']}-{step.get('from', {}).get('run', '')}",
)
def test_law_1_identities_leave_every_bit(decoder: Decoder, step: dict[str, Any]) -> None:
    at = [spelled(s) for s in sites_of(decoder.config)]
    if step["do"] in ("add", "noise"):
        at = [name for name in at if not name.endswith(("score", "prob"))]
    result = run(decoder, {"steps": [{"at": at, **step}]})
    assert torch.equal(result.logits["main"], plain_logits(decoder))


@pytest.mark.parametrize("do", ["edge_scale", "edge_only"])
def test_law_1_edges_that_change_nothing_leave_every_bit(decoder: Decoder, do: str) -> None:
    step = {"at": "layers.*.gla.edge", "do": do, "from": "@all", "to": "@all"}
    step |= {"a": 1} if do == "edge_scale" else {}
    assert torch.equal(run(decoder, {"steps": [step]}).logits["main"], plain_logits(decoder))


# Law 2: from a replaced residual stream on everything is the other run's.


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_law_2_replacing_the_residual_stream_gives_the_other_runs_output(
    decoder: Decoder, layer: int
) -> None:
    step = {"at": f"layers.{layer}.resid.post", "do": "replace", "from": {"run": "cf"}}
    result = run(decoder, {"steps": [step]})
    assert torch.equal(result.logits["main"], plain_logits(decoder, OTHER))


# Law 3: sums.


def test_law_3_captures_satisfy_the_recurrence_and_add_up(decoder: Decoder) -> None:
    names = [*STATES, "resid.pre", "attn.out", "resid.mid", "mlp.out", "resid.post"]
    result = run(decoder, {"out": [{"capture": spelled(name), "name": name} for name in names]})
    s = {name: captured(result, name) for name in names}
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        close(s["resid.pre"][i] + s["attn.out"][i], s["resid.mid"][i])
        close(s["resid.mid"][i] + s["mlp.out"][i], s["resid.post"][i])
        if i not in decoder.config.recurrent:
            continue
        q, k, v, gate, memory, state, z = (s[name][i] for name in STATES)
        assert not memory[0].any()
        assert torch.equal(memory[1:], state[:-1])
        close(gate[..., None] * memory + k[..., None] * v[..., None, :], state)
        close(torch.einsum("thk,thkv->thv", q * q.shape[-1] ** -0.5, state), z)


def test_law_3_shares_of_all_keys_add_up_to_what_is_read() -> None:
    """What is taken out key by key, from one head, is all that it reads."""
    decoder = recurrent_model("gla")
    name = "layers.1.gla.head.1.z"

    def read(steps: list[dict[str, Any]]) -> torch.Tensor:
        out = [{"capture": name, "name": "z"}]
        return captured(run(decoder, {"steps": steps, "out": out}), "z")[1]

    plain, total = read([]), torch.zeros(9, 1, 8, dtype=torch.float64)
    edge = {"at": "layers.1.gla.head.1.edge", "do": "edge_block", "to": "@all"}
    for key in range(9):
        total += plain - read([edge | {"from": {"index": key}}])
    close(total, plain)
    assert not read([edge | {"from": "@all"}]).abs().max() > 1e-12


# Law 4: edges to the future are none; what comes before the first touch is untouched.


def test_law_4_blocking_the_future_changes_nothing(decoder: Decoder) -> None:
    at = [f"layers.*.{mixer}.edge" for mixer in ("gla", "attn")]
    step = {"do": "edge_block", "from": {"range": [5, 9]}, "to": {"range": [0, 5]}}
    here = at[:1] if len(decoder.config.recurrent) == 3 else at
    result = run(decoder, {"steps": [{"at": name, **step} for name in here]})
    assert torch.equal(result.logits["main"], plain_logits(decoder))


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(list(RECURRENT)),
    layer=st.sampled_from([0, 2]),
    position=st.integers(0, 8),
    site=st.sampled_from([s for s in STATES if s != "gla.head.memory"]),
)
def test_law_4_nothing_before_the_first_touch_changes(
    family: str, layer: int, position: int, site: str
) -> None:
    decoder = recurrent_model(family)
    out = [{"capture": "layers.*.resid.post", "name": "r"}]
    step = {"at": spelled(site, layer), "pos": {"index": position}, "do": "scale", "a": 0.3}
    before = captured(run(decoder, {"out": out}), "r")
    result = run(decoder, {"steps": [step], "out": out})
    after = captured(result, "r")
    for i in range(3):
        if i < layer:
            assert torch.equal(before[i], after[i])
        close(before[i][:position], after[i][:position])
    if position or site != "gla.head.gate":  # there is nothing yet that a gate could keep
        assert not torch.equal(after[layer][position], before[layer][position])


# Law 5: known generated tokens are like a longer prompt.


def test_law_5_a_longer_text_has_the_same_beginning(decoder: Decoder) -> None:
    program = {
        "steps": [
            {"at": "layers.0.gla.head.1.state", "pos": "@generated", "do": "scale", "a": 2},
            {"at": "layers.2.gla.head.*.state", "pos": "@last", "do": "state_reset"},
            {"at": "layers.2.gla.head.0.gate", "pos": {"index": 1}, "do": "set", "x": 0.9},
        ]
    }
    whole, short = words(MAIN.ids, n_prompt=6), words(MAIN.ids[:7], n_prompt=6, n_new=3)
    a = run(decoder, program, {"main": whole}).logits["main"]
    b = run(decoder, program, {"main": short}).logits["main"]
    close(a[:7], b)
    assert (a[6:] - plain_logits(decoder)[6:]).abs().max() > 1e-3


# Law 9: gradients are those of finite differences.


@pytest.mark.parametrize(
    "step",
    [
        {"at": "layers.*.gla.head.*.state", "do": "scale", "a": "P"},
        {"at": "layers.2.gla.head.*.memory", "do": "lerp", "w": "P", "from": {"run": "cf"}},
        {"at": "layers.*.gla.edge", "do": "edge_scale", "a": "P", "from": "@all", "to": "@all"},
    ],
    ids=["state", "memory", "edge"],
)
def test_law_9_gradients_match_finite_differences(step: dict[str, Any]) -> None:
    decoder = recurrent_model("gla")
    program = {
        "params": {"p": {"shape": [], "init": 0.5}},
        "steps": [{key: {"param": "p"} if value == "P" else value for key, value in step.items()}],
        "out": [{"measure": "logprob", "token": 5}],
    }

    def value(p: torch.Tensor) -> torch.Tensor:
        return run(decoder, program, params={"p": p}).measures[0].values.sum()

    start = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (start,), eps=1e-6, atol=1e-7)


# Law 10: a share taken out is a key that was never written; a memory emptied is a prompt cut.


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(list(RECURRENT)),
    keys=st.sets(st.integers(0, 8), min_size=1, max_size=4),
    layers=st.sampled_from(["*", "0", "2", "[0,2]"]),
    head=st.sampled_from([None, 0, 1]),
)
def test_law_10_taking_out_a_key_is_setting_it_to_zero(
    family: str, keys: set[int], layers: str, head: int | None
) -> None:
    decoder, at = recurrent_model(family), {"index": sorted(keys)}
    heads = "gla.edge" if head is None else f"gla.head.{head}.edge"
    edge = {"at": f"layers.{layers}.{heads}", "do": "edge_block", "from": at, "to": "@all"}
    key = f"layers.{layers}.gla.head.{'*' if head is None else head}.k"
    zero = {"at": key, "do": "zero", "pos": at}
    expected = run(decoder, {"steps": [zero]}).logits["main"]
    close(run(decoder, {"steps": [edge]}).logits["main"], expected, 1e-11)
    only = edge | {"do": "edge_only", "from": {"not": at}}
    close(run(decoder, {"steps": [only]}).logits["main"], expected, 1e-11)
    scaled = edge | {"do": "edge_scale", "a": 0.25}
    quarter = zero | {"do": "scale", "a": 0.25}
    expected = run(decoder, {"steps": [quarter]}).logits["main"]
    close(run(decoder, {"steps": [scaled]}).logits["main"], expected, 1e-11)


def test_law_10_other_queries_still_read_the_key() -> None:
    decoder = recurrent_model("gla")
    out = [{"capture": "layers.1.gla.head.*.z", "name": "z"}]
    plain = captured(run(decoder, {"out": out}), "z")[1]
    step = {"at": "layers.1.gla.edge", "do": "edge_block", "from": {"index": 2}}
    here = captured(run(decoder, {"steps": [step | {"to": {"index": 5}}], "out": out}), "z")[1]
    everywhere = captured(run(decoder, {"steps": [step | {"to": "@all"}], "out": out}), "z")[1]
    others = [0, 1, 2, 3, 4, 6, 7, 8]
    assert torch.equal(here[others], plain[others])
    close(here[5], everywhere[5])
    assert (here[5] - plain[5]).abs().max() > 1e-4


@settings(max_examples=15, deadline=None)
@given(cut=st.integers(0, 8))
def test_law_10_emptying_every_memory_is_cutting_the_prompt(cut: int) -> None:
    decoder = recurrent_model("gla")
    step = {"at": "layers.*.gla.head.*.state", "do": "state_reset", "pos": {"index": cut}}
    got = run(decoder, {"steps": [step]}).logits["main"]
    close(got[cut:], plain_logits(decoder, words(MAIN.ids[cut:])), 1e-11)
    close(got[:cut], plain_logits(decoder)[:cut], 1e-11)
    zero = {"at": "layers.*.gla.head.*.memory", "do": "zero", "pos": {"index": cut}}
    assert torch.equal(run(decoder, {"steps": [zero]}).logits["main"], got)


@settings(max_examples=15, deadline=None)
@given(cut=st.integers(0, 8), there=st.integers(0, 8))
def test_law_10_another_runs_memory_is_its_beginning(cut: int, there: int) -> None:
    """From the grafted memory on the text is the other's beginning and this one's end."""
    decoder = recurrent_model("gla")
    step = {
        "at": "layers.*.gla.head.*.state",
        "do": "state_replace",
        "pos": {"index": cut},
        "from": {"run": "cf", "pos": {"index": there}},
    }
    got = run(decoder, {"steps": [step]}).logits["main"]
    grafted = words([*OTHER.ids[:there], *MAIN.ids[cut:]])
    close(got[cut:], plain_logits(decoder, grafted)[there:], 1e-11)


# What is done at one row is what the next row goes on from.


def test_states_changed_at_every_row_are_changed_again_and_again() -> None:
    """Half of the state at each of three rows is an eighth of what was there before them."""
    decoder = recurrent_model("gla")
    at = "layers.0.gla.head.*."
    steps = [
        {"at": f"{at}k", "do": "zero", "pos": {"range": [4, 7]}},
        {"at": f"{at}gate", "do": "set", "x": 1, "pos": {"range": [4, 7]}},
        {"at": f"{at}state", "do": "scale", "a": 0.5, "pos": {"range": [4, 7]}},
    ]
    out = [{"capture": f"{at}state", "name": "s"}, {"capture": f"{at}memory", "name": "m"}]
    result = run(decoder, {"steps": steps, "out": out})
    state, memory = captured(result, "s")[0], captured(result, "m")[0]
    close(state[6], state[3] / 8)
    assert torch.equal(memory[1:], state[:-1])


def test_a_run_reads_its_own_earlier_states() -> None:
    decoder = recurrent_model("gla")
    at = "layers.1.gla.head.0.state"
    source = {"run": "main", "pos": {"index": 2}}
    step = {"at": at, "do": "replace", "pos": {"index": 6}, "from": source}
    scale = {"at": at, "do": "scale", "a": 3, "pos": {"index": 2}}
    result = run(decoder, {"steps": [scale, step], "out": [{"capture": at, "name": "s"}]})
    state = captured(result, "s")[1]
    assert torch.equal(state[6], state[2])


# Errors name what is not there.


@pytest.mark.parametrize(
    ("family", "step", "field", "reason"),
    [
        ("hybrid", {"at": "layers.1.gla.head.0.z", "do": "zero"}, "at", "softmax attention"),
        ("hybrid", {"at": "layers.0.attn.head.0.z", "do": "zero"}, "at", "gated linear attention"),
        (
            "gla",
            {"at": "layers.0.attn.edge", "do": "edge_block", "from": "@all", "to": "@all"},
            "at",
            "gated linear attention",
        ),
        ("gla", {"at": "layers.0.gla.head.2.z", "do": "zero"}, "at", "there are 2 heads"),
        ("gla", {"at": "layers.0.gla.head.0.state[8]", "do": "zero"}, "at", "there are 8 numbers"),
        ("gla", {"at": "layers.0.gla.head.0.k", "do": "state_reset"}, "at", "does not act"),
        (
            "gla",
            {"at": "layers.0.gla.edge", "do": "edge_scale", "a": 2, "from": "@all", "to": "@all",
             "renormalise": True},
            "renormalise",
            "no probabilities",
        ),
        (
            "hybrid",
            {"at": "input.mask", "do": "edge_block", "from": {"index": 1}, "to": {"index": 4}},
            "at",
            "carries a state",
        ),
        (
            "gla",
            {"at": "input.position", "do": "set_positions", "values": [3]},
            "at",
            "no positions",
        ),
        (
            "gla",
            {"at": "layers.0.gla.head.0.state", "do": "replace", "pos": {"index": 2},
             "from": {"run": "main", "pos": {"index": 5}}},
            "from",
            "later tokens",
        ),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_with_the_reason(
    family: str, step: dict[str, Any], field: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        run(recurrent_model(family), {"steps": [step]})
    assert caught.value.field == f"steps[0].{field}"


def test_a_share_of_a_state_that_is_changed_is_refused() -> None:
    edge = {"at": "layers.*.gla.edge", "do": "edge_block", "from": {"index": 1}, "to": "@all"}
    reset = {"at": "layers.2.gla.head.0.state", "do": "state_reset", "pos": {"index": 4}}
    with pytest.raises(InvalidRequest, match="is not known any more") as caught:
        run(recurrent_model("gla"), {"steps": [reset, edge]})
    assert caught.value.field == "steps[1].at"
