"""The laws of the language, on the oracle, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.edits.small_models import (
    CONFIGS,
    MAIN,
    OTHER,
    captured,
    close,
    model,
    plain_logits,
    run,
    words,
)

from invivo.edits.blobs import Blobs
from invivo.edits.expand import expand_key_heads
from invivo.edits.oracle import run_program
from invivo.edits.program import parse_program
from invivo.edits.resolve import resolve
from invivo.kernels.activation import activation
from invivo.models.config import LayerConfig, ModelConfig, MoEConfig, RopeConfig
from invivo.models.decoder import Decoder, Layer
from invivo.models.load import random_model
from invivo.models.sites import SITES, sites_of

FAMILIES = list(CONFIGS)
_SPELLED = {"head": "head.*", "kvhead": "kvhead.*", "expert": "expert.*"}


def spelled(site: str, layer: int | str = "*") -> str:
    """The full name of all heads of a site."""
    body = ".".join(_SPELLED.get(part, part) for part in site.split("."))
    return (
        body if not next(s for s in SITES if s.name == site).in_layer else f"layers.{layer}.{body}"
    )


@pytest.fixture(params=FAMILIES)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return model(request.param)


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


def test_law_1_switches_that_change_nothing_leave_every_bit(decoder: Decoder) -> None:
    plain = plain_logits(decoder)
    steps: list[dict[str, Any]] = [
        {"at": "layers.*.attn.edge", "do": "edge_scale", "a": 1, "from": "@all", "to": "@all"},
        {"at": "layers.*.attn.edge", "do": "edge_only", "from": "@all", "to": "@all"},
    ]
    if decoder.config.moe is not None:
        steps.append({"at": "layers.*.moe.router", "do": "router_add", "v": 0})
    assert torch.equal(run(decoder, {"steps": steps}).logits["main"], plain)
    assert torch.equal(run(decoder, {}).logits["main"], plain)


# Law 2: from a replaced residual stream on everything is the other run's.


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_law_2_replacing_the_residual_stream_gives_the_other_runs_output(
    decoder: Decoder, layer: int
) -> None:
    step = {"at": f"layers.{layer}.resid.post", "do": "replace", "from": {"run": "cf"}}
    result = run(decoder, {"steps": [step]})
    assert torch.equal(result.logits["main"], plain_logits(decoder, OTHER))


CONFIG = st.builds(
    lambda layers, heads, share, window, moe, **more: ModelConfig(
        family="random",
        vocab_size=40,
        d_model=12,
        n_heads=heads * share,
        n_kv_heads=heads,
        head_dim=4,
        d_ff=10,
        max_positions=32,
        layers=tuple(
            LayerConfig(
                window=window if i % 2 else None, feedforward="moe" if moe and i % 2 == 0 else "mlp"
            )
            for i in range(layers)
        ),
        ropes=(RopeConfig(100.0, 2),),
        moe=MoEConfig(3, 2, 6, normalize_weights=True) if moe else None,
        **more,
    ),
    layers=st.integers(1, 4),
    heads=st.integers(1, 3),
    share=st.integers(1, 3),
    window=st.sampled_from([None, 3]),
    moe=st.booleans(),
    post_norm=st.booleans(),
    qk_norm=st.sampled_from(["none", "head", "full"]),
    attn_softcap=st.sampled_from([None, 2.0]),
    gated_mlp=st.booleans(),
    qkv_bias=st.booleans(),
    norm=st.sampled_from(["rms", "layer"]),
)


@settings(max_examples=25, deadline=None)
@given(config=CONFIG, data=st.data())
def test_laws_1_2_and_6_hold_for_random_architectures(
    config: ModelConfig, data: st.DataObject
) -> None:
    decoder = random_model(config, dtype=torch.float64, seed=3)
    plain = plain_logits(decoder)
    site = data.draw(st.sampled_from(list(sites_of(config))))
    own = {"at": spelled(site), "do": "lerp", "w": 1, "from": "plain", "pos": {"range": [1, 6]}}
    assert torch.equal(run(decoder, {"steps": [own]}).logits["main"], plain)
    layer = data.draw(st.integers(0, config.n_layers - 1))
    swap = {"at": f"layers.{layer}.resid.post", "do": "replace", "from": "cf"}
    close(run(decoder, {"steps": [swap]}).logits["main"], plain_logits(decoder, OTHER))
    group = data.draw(st.integers(0, config.n_kv_heads - 1))
    share = config.n_heads // config.n_kv_heads
    heads = list(range(group * share, (group + 1) * share))
    shared = {"at": f"layers.{layer}.attn.kvhead.{group}.v", "do": "scale", "a": 0.5}
    alone = {**shared, "at": f"layers.{layer}.attn.head.{heads}.v".replace(" ", ""), "expand": True}
    expected = run(decoder, {"steps": [shared]}).logits["main"]
    close(run(decoder, {"steps": [alone]}).logits["main"], expected)


# Law 3: sums.


def test_law_3_captures_add_up(decoder: Decoder) -> None:
    config = decoder.config
    names = [
        "resid.pre",
        "attn.out",
        "resid.mid",
        "mlp.out",
        "resid.post",
        "attn.head.out",
        "attn.head.z",
        "attn.head.prob",
        "attn.kvhead.v",
    ]
    if config.post_norm:
        names += ["attn.proj", "mlp.proj"]
    out = [{"capture": spelled(name), "name": name} for name in names]
    dense = [i for i in range(config.n_layers) if config.layers[i].feedforward == "mlp"]
    out += [{"capture": f"layers.{dense}.mlp.neuron".replace(" ", ""), "name": "mlp.neuron"}]
    out += [{"capture": name, "name": name} for name in ("final.norm.out", "logits")]
    result = run(decoder, {"out": out})
    s = {name: captured(result, name) for name in [*names, "mlp.neuron", "final.norm.out"]}
    share = config.n_heads // config.n_kv_heads
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        close(s["resid.pre"][i] + s["attn.out"][i], s["resid.mid"][i])
        close(s["resid.mid"][i] + s["mlp.out"][i], s["resid.post"][i])
        heads = s["attn.head.out"][i].sum(1)
        bias = layer.mixer.o_bias
        total = heads if bias is None else heads + bias
        close(total, s["attn.proj" if config.post_norm else "attn.out"][i])
        v = s["attn.kvhead.v"][i].repeat_interleave(share, 1)
        close(torch.einsum("thl,lhd->thd", s["attn.head.prob"][i], v), s["attn.head.z"][i])
        if i in dense:
            feedforward = layer.feedforward
            down = s["mlp.neuron"][i] @ feedforward.down.T
            bias = feedforward.down_bias
            down = down if bias is None else down + bias
            close(down, s["mlp.proj" if config.post_norm else "mlp.out"][i])
    close(decoder.logits(s["final.norm.out"][-1]), captured(result, "logits")[-1])


def test_law_3_neurons_are_the_activated_gate_times_up() -> None:
    out = [{"capture": f"layers.1.mlp.{n}", "name": n} for n in ("gate", "up", "neuron")]
    result = run(model("llama"), {"out": out})
    gate, up, neuron = (captured(result, n)[1] for n in ("gate", "up", "neuron"))
    close(activation(gate, "silu") * up, neuron)


# Law 4: edges to the future are none; what comes before the first touch is untouched.


def test_law_4_blocking_the_future_changes_nothing(decoder: Decoder) -> None:
    steps = [
        {
            "at": "layers.*.attn.edge",
            "do": "edge_block",
            "from": {"range": [5, 9]},
            "to": {"range": [0, 5]},
        }
    ]
    assert torch.equal(run(decoder, {"steps": steps}).logits["main"], plain_logits(decoder))


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    layer=st.integers(0, 2),
    position=st.integers(0, 8),
    site=st.sampled_from(["resid.mid", "attn.head.z", "attn.kvhead.v", "mlp.out"]),
)
def test_law_4_nothing_before_the_first_touch_changes(
    family: str, layer: int, position: int, site: str
) -> None:
    decoder = model(family)
    out = [{"capture": "layers.*.resid.post", "name": "r"}]
    step = {"at": spelled(site, layer), "pos": {"index": position}, "do": "scale", "a": 3}
    before = captured(run(decoder, {"out": out}), "r")
    result = run(decoder, {"steps": [step], "out": out})
    after = captured(result, "r")
    for i in range(3):
        if i < layer:
            assert torch.equal(before[i], after[i])
        # Experts take other rows together then, and round differently.
        close(before[i][:position], after[i][:position])
    close(result.logits["main"][:position], plain_logits(decoder)[:position])
    assert not torch.equal(after[layer][position], before[layer][position])


# Law 5: known generated tokens are like a longer prompt, batch-mates do not matter.


def test_law_5_a_longer_text_has_the_same_beginning(decoder: Decoder) -> None:
    whole = words(MAIN.ids, n_prompt=6)
    short = words(MAIN.ids[:7], n_prompt=6, n_new=3)
    program = {
        "steps": [
            {"at": "layers.1.resid.post", "pos": "@generated", "do": "scale", "a": 2},
            {"at": "layers.0.attn.head.1.z", "pos": "@last", "do": "zero"},
        ]
    }
    a = run(decoder, program, {"main": whole}).logits["main"]
    b = run(decoder, program, {"main": short}).logits["main"]
    close(a[:7], b)
    close(a[:5], plain_logits(decoder)[:5])
    assert (a[6:] - plain_logits(decoder)[6:]).abs().max() > 1e-3


# Law 6: a shared key head is its copies in the expanded model.


@pytest.mark.parametrize("family", ["llama", "gemma", "olmo2", "moe"])
@pytest.mark.parametrize("site", ["kvhead.1.k", "kvhead.1.v", "kvhead.1.k.rot"])
def test_law_6_editing_a_shared_head_is_editing_its_copies(family: str, site: str) -> None:
    decoder = model(family)
    wide = expand_key_heads(decoder)
    close(plain_logits(wide), plain_logits(decoder))
    shared = {"at": f"layers.1.attn.{site}", "do": "scale", "a": 0.3, "pos": {"range": [2, 6]}}
    copies = [shared | {"at": f"layers.1.attn.{site.replace('1.', f'{h}.')}"} for h in (2, 3)]
    expected = run(decoder, {"steps": [shared]}).logits["main"]
    close(run(wide, {"steps": copies}).logits["main"], expected)
    alone = [
        {**c, "at": f"layers.1.attn.{site.replace('kvhead.1', f'head.{h}')}", "expand": True}
        for h, c in zip((2, 3), copies, strict=True)
    ]
    close(run(decoder, {"steps": alone}).logits["main"], expected)
    one = run(decoder, {"steps": alone[:1]}).logits["main"]
    assert (one - expected).abs().max() > 1e-6
    mixed = [*alone[:1], {**shared, "a": 1.0}]
    close(run(decoder, {"steps": mixed}).logits["main"], one)


def test_law_6_sources_of_shared_heads_are_read_in_the_expanded_model() -> None:
    decoder = model("llama")
    replace = {"at": "layers.1.attn.kvhead.0.v", "do": "replace", "from": {"run": "cf"}}
    nothing = {"at": "layers.0.attn.head.3.k", "do": "scale", "a": 1, "expand": True}
    noise = {"at": "layers.2.attn.kvhead.*.k", "do": "noise", "s": 0.1, "seed": 4}
    expected = run(decoder, {"steps": [replace, noise]}).logits["main"]
    close(run(decoder, {"steps": [replace, noise, nothing]}).logits["main"], expected)


# Law 7: with norms frozen and no MLP, effects add up; attribution sums to the logit difference.


def test_law_7_effects_of_all_senders_add_up_to_the_total() -> None:
    decoder = model("llama")
    freeze = [
        {"at": "layers.*.mlp", "do": "skip"},
        {"at": ["layers.*.norm1.scale", "final.norm.scale"], "do": "freeze", "to": "base"},
        {"at": "layers.*.attn.head.*.prob", "do": "freeze", "to": "base"},
        {"at": "layers.*.attn.head.*.out", "do": "freeze", "to": "base"},
    ]
    runs = {
        "cf": {"prompt": "other"},
        "base": {"same": "main"},
        "cf_base": {"same": "cf"},
    }
    skip = [{"at": "layers.*.mlp", "do": "skip", "run": name} for name in ("base", "cf_base")]
    senders = ["embed.out", *(f"layers.{i}.attn.head.{h}.out" for i in range(3) for h in range(4))]

    def effect(at: list[str]) -> torch.Tensor:
        patch = {"at": at, "do": "replace", "from": {"run": "cf_base"}, "pos": "@last"}
        program = {
            "runs": runs,
            "steps": [*skip, *freeze, patch],
            "out": [{"measure": "logit_diff", "a": 3, "b": 7, "run": r} for r in ("main", "base")],
        }
        result = run(decoder, program, {"main": MAIN, "cf": OTHER})
        patched, base = (m.values for m in result.measures)
        return patched - base

    single = [effect([sender]) for sender in senders]
    close(torch.stack(single).sum(0), effect(senders), 1e-10)
    assert sum(float(e.abs() > 1e-3) for e in single) >= 6


@pytest.mark.parametrize("family", ["llama", "gpt2", "moe"])
def test_law_7_direct_attribution_sums_to_the_logit_difference(family: str) -> None:
    decoder = model(family)
    head = decoder.embed if decoder.head is None else decoder.head
    norm = decoder.final_norm
    direction = (head[3] - head[7]) * norm.weight
    if not norm.is_rms:
        direction = direction - direction.mean()
    blobs = Blobs({"d": direction})
    out = [
        {"capture": name, "pos": "@last", "reduce": "dot", "v": "blob:d", "name": "share"}
        for name in ("embed.out", "layers.*.attn.out", "layers.*.mlp.out")
    ]
    out.append({"capture": "final.norm.scale", "pos": "@last", "name": "scale"})
    out.append({"measure": "logit_diff", "a": " w3", "b": " w7"})
    result = run(decoder, {"out": out}, blobs=blobs)
    shares = torch.stack([c.value for c in result.captures if c.ref.name == "share"])
    total = shares.sum(0) * captured(result, "scale")[-1][:, 0]
    if norm.bias is not None:
        total = total + (head[3] - head[7]) @ norm.bias
    close(total, result.measures[0].values, 1e-10)


# Law 9: gradients of trainable parameters match finite differences.


@pytest.mark.parametrize(
    ("declared", "step"),
    [
        ([4, 1], {"at": "layers.1.attn.head.*.z", "do": "lerp", "w": "P", "from": {"run": "cf"}}),
        ([16], {"at": "layers.1.resid.post", "do": "add", "v": "P", "c": 0.5}),
        ([2], {"at": "layers.0.mlp.out", "do": "set_coords", "basis": "blob:b", "c": "P"}),
    ],
    ids=["lerp", "add", "set_coords"],
)
def test_law_9_gradients_match_finite_differences(
    declared: list[int], step: dict[str, Any]
) -> None:
    decoder = model("llama")
    basis = torch.linalg.qr(torch.randn(16, 2, generator=torch.Generator().manual_seed(1)))[0].T
    blobs = Blobs({"b": basis.double()})
    step = {key: {"param": "p"} if value == "P" else value for key, value in step.items()}
    program = {
        "runs": {"cf": {"prompt": "other"}},
        "params": {"p": {"shape": declared, "init": 0.5}},
        "steps": [step],
        "out": [{"measure": "logprob", "token": 5}],
    }
    prompts = {"main": MAIN, "cf": OTHER}
    plan = resolve(parse_program(program), decoder.config, prompts, blobs=blobs)

    def value(p: torch.Tensor) -> torch.Tensor:
        (row,) = run_program(decoder, plan, blobs=blobs, params={"p": p})
        return row.measures[0].values.sum()

    start = torch.full(declared, 0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (start,), eps=1e-6, atol=1e-7)


# Law 11: permuting the blocks of a set leaves what follows unchanged.


@pytest.mark.parametrize("family", FAMILIES)
def test_law_11_the_order_of_a_set_does_not_matter(family: str) -> None:
    decoder = model(family)
    prefix, suffix = [1, 2], [30, 31, 32]
    options = [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12]]

    def logits(order: tuple[int, ...], *, parallel: bool = True) -> torch.Tensor:
        ids, groups = list(prefix), []
        for o in order:
            groups.append((len(ids), len(ids) + len(options[o])))
            ids += options[o]
        prompt = words(ids + suffix, groups={"option": tuple(groups)})
        blocks = [{"group": "option", "nth": i} for i in range(len(options))]
        step = {"at": "input.mask", "do": "parallel", "blocks": blocks}
        program = {"steps": [step] if parallel else []}
        return run(decoder, program, {"main": prompt}).logits["main"][-len(suffix) :]

    orders = list(itertools.permutations(range(4)))[::5]
    first = logits(orders[0])
    for order in orders[1:]:
        close(logits(order), first)
    assert (
        logits(orders[0], parallel=False) - logits(orders[-1], parallel=False)
    ).abs().max() > 1e-3


def test_law_11_a_set_of_one_is_the_plain_prompt() -> None:
    decoder = model("llama")
    blocks = [{"range": [2, 4]}, {"range": [4, 5]}]
    known = resolve(
        parse_program({"steps": [{"at": "input.mask", "do": "parallel", "blocks": blocks}]}),
        decoder.config,
        {"main": words([1, 2, 3, 4, 5, 6])},
    )
    # A = 2 tokens, blocks of 2 and 1, one token after.
    assert known.rows[0].runs["main"].input.numbers == (0, 1, 2, 3, 2, 4)
