"""Names of sites: the grammar, what they mean for a model, and TransformerLens' names."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.edits.small_models import CONFIGS

from invivo.edits.site_names import (
    SiteRef,
    format_ref,
    format_site,
    forward_order,
    parse_site,
    resolve_site,
)
from invivo.edits.transformer_lens_names import OTHER, SAME, to_transformer_lens
from invivo.errors import InvalidRequest
from invivo.models.sites import SITES, sites_of

LLAMA, GPT2, MOE, GEMMA = (CONFIGS[name] for name in ("llama", "gpt2", "moe", "gemma"))
SETS = {"late": (1, 2), "pair": (0, 3)}


def refs(name: str, config=LLAMA, **more: bool) -> list[SiteRef]:  # type: ignore[no-untyped-def]
    return resolve_site(parse_site(name, "at"), config, SETS, "at", **more)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.1.resid.post", [SiteRef("resid.post", 1)]),
        ("layers.*.resid.pre", [SiteRef("resid.pre", i) for i in range(3)]),
        ("layers.1-2.mlp.in", [SiteRef("mlp.in", 1), SiteRef("mlp.in", 2)]),
        ("layers.[0,2].attn.out", [SiteRef("attn.out", 0), SiteRef("attn.out", 2)]),
        ("layers.@late.mlp.out", [SiteRef("mlp.out", 1), SiteRef("mlp.out", 2)]),
        ("layers.0.attn.head.3.z", [SiteRef("attn.head.z", 0, (3,))]),
        ("layers.0.attn.head.*.z", [SiteRef("attn.head.z", 0, (0, 1, 2, 3))]),
        ("layers.0.attn.head.@pair.q.rot", [SiteRef("attn.head.q.rot", 0, (0, 3))]),
        ("layers.2.attn.kvhead.0-1.k", [SiteRef("attn.kvhead.k", 2, (0, 1))]),
        ("layers.2.mlp.neuron[5,7-9]", [SiteRef("mlp.neuron", 2, None, (5, 7, 8, 9))]),
        ("layers.2.resid.post[0]", [SiteRef("resid.post", 2, None, (0,))]),
        ("layers.0.attn.head.1.z[2-3]", [SiteRef("attn.head.z", 0, (1,), (2, 3))]),
        ("layers.1", [SiteRef("block", 1)]),
        ("layers.1.mlp", [SiteRef("mlp", 1)]),
        ("layers.1.attn.edge", [SiteRef("attn.edge", 1, ())]),
        ("layers.1.attn.head.2.edge", [SiteRef("attn.edge", 1, (2,))]),
        ("embed.out", [SiteRef("embed.out", -1)]),
        ("input.embeds", [SiteRef("embed.out", -1)]),
        ("input.mask", [SiteRef("input.mask", -1)]),
        ("logits[3]", [SiteRef("logits", -1, None, (3,))]),
    ],
)
def test_names_mean_these_sites(name: str, expected: list[SiteRef]) -> None:
    assert refs(name) == expected


def test_every_site_of_every_model_has_a_name_that_means_it() -> None:
    for config in CONFIGS.values():
        for site, layers in sites_of(config).items():
            for layer in layers:
                shape = next(s.shape for s in SITES if s.name == site)
                heads = (0,) if shape[0] in "HGE" and site != "moe.router" else None
                ref = SiteRef(site, layer, heads)
                assert refs(format_ref(ref), config) == [ref]


INDEX = st.one_of(
    st.just("*"),
    st.sampled_from(["@late", "@pair"]),
    st.integers(0, 99).map(str),
    st.tuples(st.integers(0, 9), st.integers(9, 30)).map(lambda p: f"{p[0]}-{p[1]}"),
    st.lists(st.integers(0, 40).map(str), min_size=2, max_size=4).map(lambda p: f"[{','.join(p)}]"),
)


@given(INDEX, INDEX, st.sampled_from(["q", "z", "out", "z[1,3]", "q.rot"]))
def test_spelling_is_a_fixed_point(layer: str, head: str, part: str) -> None:
    pattern = parse_site(f"layers.{layer}.attn.head.{head}.{part}", "at")
    assert parse_site(format_site(pattern), "at") == pattern


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("layers.3.resid.post", LLAMA, "there are 3 layers"),
        ("layers.0-7.resid.post", LLAMA, "there are 3 layers"),
        ("layers.0.attn.head.4.z", LLAMA, "there are 4 heads"),
        ("layers.0.attn.kvhead.2.v", LLAMA, "there are 2 heads"),
        ("layers.0.mlp.neuron[24]", LLAMA, "there are 24 numbers"),
        ("layers.@none.resid.post", LLAMA, "no set @none"),
        ("layers.1.attn.head.1.k", LLAMA, "2 query heads share one key head"),
        ("layers.*.moe.router", LLAMA, "one MLP"),
        ("layers.1.moe.router", MOE, "layer 1: this layer has one MLP"),
        ("layers.0.mlp.neuron", MOE, "mixture of experts"),
        ("layers.0.moe.expert.4.out", MOE, "there are 4 heads or experts"),
        ("layers.0.mlp.gate", GPT2, "has no gate"),
        ("layers.0.attn.head.0.q.rot", GPT2, "no rotary"),
        ("layers.0.attn.proj", LLAMA, "no norm after"),
        ("layers.0.norm1.scale", CONFIGS["olmo2"], "normalises only after"),
        ("layers.0.gla.head.0.state", LLAMA, "no gated linear attention"),
        ("layers.*.gla.edge", LLAMA, "no gated linear attention"),
        ("layers.0.norm1.scale[0]", LLAMA, "cannot be cut"),
        ("layers.0.attn.head.0.prob[1]", LLAMA, "cannot be cut"),
        ("hook_embed", GPT2, "learned position"),
        ("blocks.0.attn.hook_q", GEMMA, "before the norm"),
    ],
)
def test_what_a_model_lacks_is_refused_with_the_reason(  # type: ignore[no-untyped-def]
    name: str, config, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        refs(name, config)
    assert caught.value.field == "at"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "layers",
        "layers.",
        "layers.0.nowhere",
        "layers.x.resid.post",
        "layers.3-1.resid.post",
        "layers.[].resid.post",
        "layers.[1,].resid.post",
        "layers.0.attn.head.z",
        "layers.0.attn.z",
        "layers.0.attn.head.1",
        "layers.0.logits",
        "resid.post",
        "layers.0.mlp.neuron[]",
        "layers.0.mlp.neuron[1",
        "layers.99999999.resid.post",
        "a" * 1000,
        "layers.0.resid.post ",
    ],
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        refs(name)
    assert caught.value.field == "at"


def test_a_star_passes_over_layers_that_lack_the_site() -> None:
    assert [ref.layer for ref in refs("layers.*.moe.router", MOE)] == [0, 2]
    assert [ref.layer for ref in refs("layers.*.mlp.neuron", MOE)] == [1]


def test_single_heads_share_keys_unless_they_are_copied() -> None:
    assert refs("layers.1.attn.head.1.k", GPT2) == [SiteRef("attn.kvhead.k", 1, (1,))]
    (ref,) = refs("layers.1.attn.head.3.v", expand=True)
    assert ref == SiteRef("attn.kvhead.v", 1, (3,), expanded=True)
    assert format_ref(ref) == "layers.1.attn.head.3.v"


def test_sites_sort_in_forward_order() -> None:
    names = [
        "input.tokens",
        "embed.out",
        "layers.0.attn.head.*.z",
        "layers.0.resid.post",
        "layers.1.resid.pre",
        "layers.1.mlp.neuron",
        "final.norm.out",
        "logits",
    ]
    keys = [forward_order(r.site, r.layer, 3) for name in names for r in refs(name)]
    assert keys == sorted(keys)


@pytest.mark.parametrize(("theirs", "ours"), list(SAME.items()))
def test_transformer_lens_names_go_both_ways(theirs: str, ours: str) -> None:
    theirs, ours = theirs.replace(".L.", ".2."), ours.replace(".L.", ".2.")
    pattern = parse_site(theirs, "at")
    plain = parse_site(ours.replace(".H.", ".*."), "at")
    assert replace(pattern, alias=None) == plain
    assert format_site(pattern) == theirs  # printed as it was written
    assert to_transformer_lens(format_site(plain)) == theirs
    if ".H." in ours:
        one = parse_site(f"{theirs}[1]", "at")
        assert format_site(replace(one, alias=None)) == ours.replace(".H.", ".1.")
        assert to_transformer_lens(ours.replace(".H.", ".1.")) == f"{theirs}[1]"


@pytest.mark.parametrize("theirs", [*OTHER, "blocks.0.hook_nothing", "hook_resid_post[3]"])
def test_transformer_lens_names_of_other_quantities_are_refused(theirs: str) -> None:
    with pytest.raises(InvalidRequest, match="no counterpart"):
        parse_site(theirs.replace(".L.", ".0."), "at")


def test_names_without_a_transformer_lens_counterpart_have_none() -> None:
    assert to_transformer_lens("layers.0.attn.in") is None
    assert to_transformer_lens("final.norm.scale") is None
