"""The sites are what their table says: identities in float64, and edits that take effect."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.models.pages import Pages, Text, logits_of
from tests.tiny import FAMILIES, tiny_loaded

from invivo.kernels.activation import activation
from invivo.models.config import ModelConfig
from invivo.models.load import LoadedModel
from invivo.models.sites import LSE, SITES, lacking_sites, sites_of, why_lacking

TOKENS = random.Random(0).choices(range(290), k=23)
Key = tuple[str, int]


class Recorder:
    """Keeps a copy of every site, and changes those that ``edits`` name."""

    def __init__(self, edits: dict[Key, Callable[[torch.Tensor], torch.Tensor]] | None = None):
        self.edits = edits or {}
        self.seen: dict[Key, torch.Tensor] = {}
        self.order: list[Key] = []

    def wants(self, site: str, layer: int) -> bool:
        return True

    def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        key = (site, layer)
        edit = self.edits.get(key)
        if edit is not None:
            value = edit(value)
        self.seen[key] = value.clone()
        self.order.append(key)
        return value


class Editor:
    """Changes one site and touches nothing else."""

    def __init__(self, site: str, layer: int, edit: Callable[[torch.Tensor], torch.Tensor]):
        self.key = (site, layer)
        self.edit = edit

    def wants(self, site: str, layer: int) -> bool:
        return (site, layer) == self.key

    def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        assert (site, layer) == self.key
        return self.edit(value)


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_loaded(folder, request.param, dtype=torch.float64)


@pytest.fixture(scope="module")
def record(model: LoadedModel) -> Recorder:
    recorder = Recorder()
    logits_of(model.decoder, TOKENS, taps=recorder)
    return recorder


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_every_listed_site_is_offered_once_in_forward_order(
    model: LoadedModel, record: Recorder
) -> None:
    listed = {(site, layer) for site, layers in sites_of(model.config).items() for layer in layers}
    assert set(record.order) == listed
    assert len(record.order) == len(listed)
    rank = {site.name: i for i, site in enumerate(SITES)}
    for layer in range(model.config.n_layers):
        ranks = [rank[site] for site, at in record.order if at == layer]
        # The residual after a layer is offered when the next one begins.
        assert ranks == sorted(ranks)


def test_shapes_are_those_of_the_table(model: LoadedModel, record: Recorder) -> None:
    config = model.config
    sizes = {
        "1": 1,
        "d": config.d_model,
        "H": config.n_heads,
        "G": config.n_kv_heads,
        "D": config.head_dim,
        "f": config.d_ff,
        "K": len(TOKENS),
        "V": config.vocab_size,
        "E": config.moe.n_experts if config.moe else 0,
    }
    by_name = {site.name: site for site in SITES}
    for (site, _), value in record.seen.items():
        expected = [len(TOKENS), *(sizes[s] for s in by_name[site].shape.split(", "))]
        assert list(value.shape) == expected, site


def test_residual_stream_is_the_sum_of_what_is_written(
    model: LoadedModel, record: Recorder
) -> None:
    s = record.seen
    close(s["embed.out", -1], s["resid.pre", 0])
    for i in range(model.config.n_layers):
        close(s["resid.pre", i] + s["attn.out", i], s["resid.mid", i])
        close(s["resid.mid", i] + s["mlp.out", i], s["resid.post", i])
        if i:
            close(s["resid.post", i - 1], s["resid.pre", i])


def test_norm_scale_times_weight_is_the_normalised_value(
    model: LoadedModel, record: Recorder
) -> None:
    s, config = record.seen, model.config

    def normed(x: torch.Tensor, scale: torch.Tensor, norm: torch.nn.Module | None) -> torch.Tensor:
        assert norm is not None
        weight = norm.weight + 1.0 if config.norm_unit_offset else norm.weight
        if config.norm == "layer":
            return (x - x.mean(-1, keepdim=True)) * scale * weight + norm.bias
        return x * scale * weight

    for i, layer in enumerate(model.decoder.layers):
        if config.pre_norm:
            close(normed(s["resid.pre", i], s["norm1.scale", i], layer.norm1), s["attn.in", i])
            close(normed(s["resid.mid", i], s["norm2.scale", i], layer.norm2), s["mlp.in", i])
        else:
            close(s["resid.pre", i], s["attn.in", i])
            close(s["resid.mid", i], s["mlp.in", i])
        if config.post_norm:
            close(normed(s["attn.proj", i], s["post1.scale", i], layer.post1), s["attn.out", i])
            close(normed(s["mlp.proj", i], s["post2.scale", i], layer.post2), s["mlp.out", i])
    last = s["resid.post", config.n_layers - 1]
    final = normed(last, s["final.norm.scale", -1], model.decoder.final_norm)
    close(final, s["final.norm.out", -1])


def test_heads_add_up_to_attention(model: LoadedModel, record: Recorder) -> None:
    s, config = record.seen, model.config
    out = "attn.proj" if config.post_norm else "attn.out"
    for i, layer in enumerate(model.decoder.layers):
        bias = 0.0 if layer.mixer.o_bias is None else layer.mixer.o_bias
        close(s["attn.head.out", i].sum(1) + bias, s[out, i])
        per_head = layer.mixer.o.view(config.d_model, config.n_heads, config.head_dim)
        for h in range(config.n_heads):
            close(s["attn.head.z", i][:, h] @ per_head[:, h].T, s["attn.head.out", i][:, h])


def test_scores_probabilities_and_values_give_the_mixed_values(
    model: LoadedModel, record: Recorder
) -> None:
    s, config = record.seen, model.config
    share = config.n_heads // config.n_kv_heads
    n = len(TOKENS)
    for i, layer in enumerate(config.layers):
        rot = ".rot" if layer.rope is not None else ""
        k = s["attn.kvhead.k" + rot, i].repeat_interleave(share, 1)
        v = s["attn.kvhead.v", i].repeat_interleave(share, 1)
        scale = config.attn_scale or config.head_dim**-0.5
        score = torch.einsum("thd,lhd->thl", s["attn.head.q" + rot, i], k) * scale
        if config.attn_softcap is not None:
            score = config.attn_softcap * torch.tanh(score / config.attn_softcap)
        ages = torch.arange(n)[:, None] - torch.arange(n)[None, :]
        visible = (ages >= 0) & (ages < (layer.window or n))
        score = score.masked_fill(~visible[:, None], -torch.inf)
        close(score, s["attn.head.score", i])
        close(torch.softmax(score, -1), s["attn.head.prob", i])
        close(torch.einsum("thl,lhd->thd", s["attn.head.prob", i], v), s["attn.head.z", i])


def test_feed_forward_is_made_of_its_parts(model: LoadedModel, record: Recorder) -> None:
    s, config = record.seen, model.config
    out = "mlp.proj" if config.post_norm else "mlp.out"
    for i, layer in enumerate(model.decoder.layers):
        if config.layers[i].feedforward == "moe":
            weights, outputs = s["moe.expert.weight", i], s["moe.expert.out", i]
            total = torch.einsum("te,ted->td", weights, outputs)
            if ("moe.shared.out", i) in s:
                total = total + s["moe.shared.out", i]
            close(total, s[out, i])
            assert config.moe is not None
            assert (weights > 0).sum(-1).eq(config.moe.top_k).all()
            chosen = s["moe.router", i].topk(config.moe.top_k, -1).indices
            assert (weights.gather(1, chosen) > 0).all()
            continue
        if config.gated_mlp:
            neuron = activation(s["mlp.gate", i], config.activation) * s["mlp.up", i]
        else:
            neuron = activation(s["mlp.up", i], config.activation)
        close(neuron, s["mlp.neuron", i])
        bias = layer.feedforward.down_bias
        down = s["mlp.neuron", i] @ layer.feedforward.down.T
        close(down if bias is None else down + bias, s[out, i])


def test_final_state_times_the_head_is_the_logits(model: LoadedModel, record: Recorder) -> None:
    head = model.decoder.embed if model.decoder.head is None else model.decoder.head
    logits = record.seen["final.norm.out", -1] @ head.T
    cap = model.config.logit_softcap
    close(logits if cap is None else cap * torch.tanh(logits / cap), record.seen["logits", -1])


def test_taps_that_change_nothing_leave_every_bit(model: LoadedModel, record: Recorder) -> None:
    plain = logits_of(model.decoder, TOKENS)

    class Bystander(Recorder):
        def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
            return value

        def wants(self, site: str, layer: int) -> bool:
            return site not in ("attn.head.score", "attn.head.prob")

    assert torch.equal(logits_of(model.decoder, TOKENS, taps=Bystander()), plain)
    close(logits_of(model.decoder, TOKENS, taps=Recorder()), plain)


def test_replacing_a_value_by_an_equal_one_changes_nothing(
    model: LoadedModel, record: Recorder
) -> None:
    plain = logits_of(model.decoder, TOKENS)
    for site, layers in sites_of(model.config).items():
        for layer in (layers[0], layers[-1]):
            edited = logits_of(model.decoder, TOKENS, taps=Editor(site, layer, torch.clone))
            torch.testing.assert_close(edited, plain, rtol=1e-10, atol=1e-10, msg=site)


def test_every_site_can_be_changed_and_what_follows_changes(
    model: LoadedModel, record: Recorder
) -> None:
    plain = logits_of(model.decoder, TOKENS)
    generator = torch.Generator().manual_seed(3)
    for site, layers in sites_of(model.config).items():

        def disturb(value: torch.Tensor) -> torch.Tensor:
            noise = torch.rand(value.shape, generator=generator, dtype=value.dtype)
            return value * (0.5 + noise) + 0.1 * (0.5 - noise).masked_fill(value == 0, 0.0)

        # Scores are scaled: adding to -inf keeps it.
        edited = logits_of(model.decoder, TOKENS, taps=Editor(site, layers[-1], disturb))
        assert edited.isfinite().all(), site
        assert (edited - plain).abs().max() > 1e-4, site


def test_running_on_with_another_texts_residual_gives_that_texts_output(
    model: LoadedModel, record: Recorder
) -> None:
    other = random.Random(1).choices(range(290), k=len(TOKENS))
    theirs = Recorder()
    expected = logits_of(model.decoder, other, taps=theirs)
    for layer in range(model.config.n_layers):
        source = theirs.seen["resid.post", layer]
        taps = Editor("resid.post", layer, lambda _, source=source: source)
        close(logits_of(model.decoder, TOKENS, taps=taps), expected)


def test_removing_a_head_by_any_of_its_sites_is_the_same(
    model: LoadedModel, record: Recorder
) -> None:
    def drop(value: torch.Tensor) -> torch.Tensor:
        return value.index_fill(1, torch.tensor([1]), 0.0)

    results = [
        logits_of(model.decoder, TOKENS, taps=Editor(site, 0, drop))
        for site in ("attn.head.prob", "attn.head.z", "attn.head.out")
    ]
    close(results[0], results[1])
    close(results[1], results[2])


def test_a_row_whose_keys_are_all_blocked_mixes_nothing(
    model: LoadedModel, record: Recorder
) -> None:
    def block(value: torch.Tensor) -> torch.Tensor:
        return value.index_fill(0, torch.tensor([4]), -torch.inf)

    recorder = Recorder({("attn.head.score", 0): block})
    logits_of(model.decoder, TOKENS, taps=recorder)
    assert recorder.seen["attn.head.z", 0][4].abs().max() == 0.0
    close(recorder.seen["attn.head.z", 0][5], record.seen["attn.head.z", 0][5])


def test_edited_keys_and_values_are_what_later_chunks_attend_to(model: LoadedModel) -> None:
    def halve(value: torch.Tensor) -> torch.Tensor:
        return 0.5 * value

    for site in ("attn.kvhead.k", "attn.kvhead.v"):
        editor = Editor(site, 0, halve)
        whole = logits_of(model.decoder, TOKENS, taps=editor)
        pages, text = Pages(model.decoder), Text(TOKENS)
        parts = [pages.run([(text, n)], taps=editor)[0] for n in (9, 1, 13)]
        close(torch.cat(parts), whole)


def test_taps_see_chunks_and_neighbours_as_whole_texts(
    model: LoadedModel, record: Recorder
) -> None:
    pages, text, neighbour = Pages(model.decoder), Text(TOKENS), Text(list(reversed(TOKENS)))
    pages.run([(text, 12), (neighbour, 5)])
    taps = Recorder()
    pages.run([(neighbour, 1), (text, 11)], taps=taps)
    for key, value in taps.seen.items():
        whole = record.seen[key][12:]
        close(value[1:, ..., : whole.shape[-1]], whole)


def test_edits_of_one_row_leave_the_neighbours_alone(model: LoadedModel) -> None:
    def run(taps: Editor | None) -> list[torch.Tensor]:
        pages = Pages(model.decoder)
        texts = [Text(TOKENS[:7]), Text(TOKENS[7:19])]
        return pages.run([(t, len(t.tokens)) for t in texts], taps=taps)

    plain = run(None)
    for site, layers in sites_of(model.config).items():

        def disturb(value: torch.Tensor) -> torch.Tensor:
            changed = value.clone()
            changed[:7] *= 0.7
            return changed

        edited = run(Editor(site, layers[0], disturb))
        torch.testing.assert_close(edited[1], plain[1], rtol=1e-10, atol=1e-10, msg=site)
        assert (edited[0] - plain[0]).abs().max() > 1e-6, site


def test_lacking_sites_come_with_a_reason(model: LoadedModel) -> None:
    here, lacking = sites_of(model.config), lacking_sites(model.config)
    assert {site.name for site in SITES} == here.keys() | lacking.keys()
    assert not here.keys() & lacking.keys()
    assert all(lacking.values())


def test_reasons_name_what_is_wrong(tmp_path: Path) -> None:
    config: ModelConfig = tiny_loaded(tmp_path, "gpt2").config
    assert "no rotary" in str(why_lacking(config, "attn.head.q.rot", 0))
    assert "no gate" in str(why_lacking(config, "mlp.gate", 1))
    assert "no site of this name" in str(why_lacking(config, "mlp.nerve", 1))
    assert "3 layers" in str(why_lacking(config, "mlp.up", 3))
    assert "outside layers" in str(why_lacking(config, "logits", 0))
    assert "belongs to layers" in str(why_lacking(config, "mlp.up", -1))
    assert why_lacking(config, "mlp.up", 2) is None


def test_mixed_layers_have_the_sites_of_their_kind(tmp_path: Path) -> None:
    config = tiny_loaded(tmp_path, "qwen2_moe").config
    assert sites_of(config)["mlp.neuron"] == [1]
    assert sites_of(config)["moe.router"] == [0, 2]


def test_only_wanted_sites_are_offered(model: LoadedModel) -> None:
    calls: list[str] = []

    class Silent(Recorder):
        def wants(self, site: str, layer: int) -> bool:
            calls.append(site)
            return False

        def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
            raise AssertionError("called for a site that is not wanted")

    plain = logits_of(model.decoder, TOKENS)
    assert torch.equal(logits_of(model.decoder, TOKENS, taps=Silent()), plain)
    assert set(calls) - {LSE} == set(sites_of(model.config))
