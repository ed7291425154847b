"""Models with gated linear attention: cut, packed, decoded, stored and looked into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.models.gla_models import SHAPES, memory_of, spans_layout, tiny_decoder, tiny_gla

from invivo.errors import UnsupportedModel
from invivo.kernels.paging import contiguous_layout
from invivo.models.cache import allocate_kv_cache
from invivo.models.decoder import Decoder
from invivo.models.gla_config import gla_1b3, gla_340m
from invivo.models.hub_config import config_from_hf, config_to_hf
from invivo.models.load import random_model, read_json, read_weights
from invivo.models.save import save_model
from invivo.models.sites import KeyShare, sites_of, why_lacking
from invivo.models.tensor_names import tensor_parts

TOKENS = torch.randint(0, 67, (37,), generator=torch.Generator().manual_seed(3))


class Seen:
    """Keeps what it sees of one sequence and puts ``instead`` in its place."""

    def __init__(self, instead: dict[tuple[str, int], torch.Tensor] | None = None) -> None:
        self.values: dict[tuple[str, int], torch.Tensor] = {}
        self.instead = instead or {}
        self.rows: Sequence[int] = range(len(TOKENS))

    def wants(self, site: str, layer: int) -> bool:
        return site != "attn.lse"

    def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        self.values[site, layer] = value.clone()
        return self.instead.get((site, layer), value)

    def open_states(self, layer: int) -> list[int]:
        return [0]

    def state_rows(self, span: int, layer: int) -> Sequence[int]:
        return self.rows

    def at_state(
        self, span: int, row: int, site: str, layer: int, value: torch.Tensor
    ) -> torch.Tensor:
        before = self.values.get((site, layer), value[None][:0])
        self.values[site, layer] = torch.cat((before, value[None]))
        return value

    def key_shares(self, span: int, layer: int) -> list[KeyShare]:
        return []


def whole(decoder: Decoder, tokens: torch.Tensor, taps: Seen | None = None) -> torch.Tensor:
    """Final states of one sequence in one piece, from nothing."""
    layout = contiguous_layout([len(tokens)], block_size=4)
    with torch.inference_mode():
        return decoder(tokens, layout, memory_of(decoder.config), taps=taps)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cuts", [[37], [1] * 37, [5, 1, 17, 1, 1, 12], [36, 1]])
def test_chunks_and_decodes_give_the_whole(shape: str, cuts: list[int]) -> None:
    decoder = tiny_decoder(shape)
    cache = memory_of(decoder.config)
    rows, start = [], 0
    with torch.inference_mode():
        for n in cuts:
            layout = spans_layout([(start, start + n, 2)])
            rows.append(decoder(TOKENS[start : start + n], layout, cache))
            start += n
    assert torch.allclose(torch.cat(rows), whole(decoder, TOKENS), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_sequences_of_one_batch_keep_to_themselves(shape: str) -> None:
    """Decodes beside a chunk; another sequence's broken state stays its own."""
    decoder = tiny_decoder(shape)
    cache = memory_of(decoder.config)
    other = TOKENS.flip(0)
    with torch.inference_mode():
        decoder(torch.cat((TOKENS[:9], other[:12])), spans_layout([(0, 9, 1), (0, 12, 3)]), cache)
        assert cache.states is not None
        cache.states[:, 2] = torch.nan
        batch = torch.cat((TOKENS[9:10], TOKENS[:1], other[12:30]))
        out = decoder(batch, spans_layout([(9, 10, 1), (0, 1, 2), (12, 30, 3)]), cache)
    assert torch.allclose(out[0], whole(decoder, TOKENS)[9], rtol=0, atol=1e-10)
    assert torch.allclose(out[2:], whole(decoder, other)[12:30], rtol=0, atol=1e-10)
    assert out[1].isnan().any()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_survives_the_disk_bit_for_bit(shape: str, tmp_path: Path) -> None:
    decoder = tiny_decoder(shape)
    folder = save_model(decoder, tmp_path / "model")
    config = config_from_hf(read_json(folder / "config.json"))
    assert config == decoder.config
    again = Decoder(config, dtype=torch.float64)
    read_weights(again, folder)
    assert torch.equal(whole(again, TOKENS), whole(decoder, TOKENS))


@pytest.mark.parametrize("name", ["plain", "convolution", "hybrid"])
def test_logits_are_those_of_flash_linear_attention(name: str) -> None:
    """Its version 0.6.0 wrote folder and logits: GLAForCausalLM with random weights, float32, the
    recurrence by its naive form, Triton's pointwise kernels and flash attention by torch's
    operations. The hybrid's middle layer is attention with shared key heads and a window."""
    folder = Path(__file__).parent / "fla" / name
    decoder = Decoder(config_from_hf(read_json(folder / "config.json")))
    read_weights(decoder, folder)
    expected = load_file(folder / "expected.safetensors")
    n = len(expected["tokens"])
    cache = allocate_kv_cache(
        decoder.config, n_blocks=20, block_size=4, device="cpu", dtype=torch.float32
    )
    with torch.inference_mode():
        hidden = decoder(expected["tokens"], contiguous_layout([n], block_size=4), cache)
        assert torch.allclose(decoder.logits(hidden), expected["logits"], rtol=1e-4, atol=1e-4)


def test_the_papers_models_have_the_sizes_of_the_public_checkpoints() -> None:
    for config, wanted in ((gla_340m(), 341_707_776), (gla_1b3(), 1_365_514_240)):
        assert sum(math.prod(part.shape) for part in tensor_parts(config)) == wanted


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_kv_heads", 2), ("feature_map", "elu"), ("clamp_min", -1.0), ("fuse_norm", False)],
)
def test_what_is_not_computed_is_refused(key: str, value: object) -> None:
    written = config_to_hf(tiny_gla())
    with pytest.raises(UnsupportedModel) as caught:
        config_from_hf(written | {key: value})
    assert caught.value.field == f"config.{key}"


@pytest.mark.parametrize("shape", SHAPES)
def test_sites_satisfy_the_recurrence(shape: str) -> None:
    decoder, taps = tiny_decoder(shape), Seen()
    out = whole(decoder, TOKENS, taps)
    assert torch.allclose(out, whole(decoder, TOKENS), rtol=0, atol=1e-10)
    seen = taps.values
    for layer in decoder.config.recurrent:
        q, k, v, gate, state, z = (
            seen[f"gla.head.{name}", layer] for name in ("q", "k", "v", "gate", "state", "z")
        )
        before = torch.cat((torch.zeros_like(state[:1]), state[:-1]))
        assert torch.equal(before, seen["gla.head.memory", layer])
        written = gate[..., None] * before + k[..., None] * v[..., None, :]
        assert torch.allclose(state, written, rtol=0, atol=1e-12)
        read = torch.einsum("thk,thkv->thv", q * q.shape[-1] ** -0.5, state)
        assert torch.allclose(z, read, rtol=0, atol=1e-12)
        pre, mid = seen["resid.pre", layer], seen["resid.mid", layer]
        assert torch.allclose(pre + seen["attn.out", layer], mid, rtol=0, atol=1e-12)
    found = set(sites_of(decoder.config))
    assert found == {name for name, _ in seen} | {"logits"}


@pytest.mark.parametrize("rows", [[20], [3, 20, 21, 36], list(range(37))])
def test_a_memory_emptied_in_every_layer_cuts_the_prompt(rows: list[int]) -> None:
    class Reset(Seen):
        def at_state(
            self, span: int, row: int, site: str, layer: int, value: torch.Tensor
        ) -> torch.Tensor:
            return torch.zeros_like(value) if (site, row) == ("gla.head.memory", 20) else value

    decoder, taps = tiny_decoder(), Reset()
    taps.rows = rows
    cut = whole(decoder, TOKENS, taps)
    assert torch.allclose(cut[20:], whole(decoder, TOKENS[20:]), rtol=0, atol=1e-10)
    assert torch.allclose(cut[:20], whole(decoder, TOKENS[:20]), rtol=0, atol=1e-10)


def test_spans_laid_open_leave_the_others_their_bits_and_the_states_what_they_are() -> None:
    """One of three spans is looked into; where nothing is changed not even it rounds otherwise."""
    decoder, spans = tiny_decoder("hybrid"), [(0, 1, 1), (0, 6, 2), (0, 9, 3)]
    tokens = torch.cat((TOKENS[:1], TOKENS[:6], TOKENS[:9]))

    class Middle(Seen):
        factor = 1.0

        def wants(self, site: str, layer: int) -> bool:
            return False

        def open_states(self, layer: int) -> list[int]:
            return [1]

        def state_rows(self, span: int, layer: int) -> Sequence[int]:
            return [2, 5]

        def at_state(
            self, span: int, row: int, site: str, layer: int, value: torch.Tensor
        ) -> torch.Tensor:
            return value if self.factor == 1.0 else value * self.factor

    def run(taps: Seen | None) -> tuple[torch.Tensor, torch.Tensor]:
        cache = memory_of(decoder.config)
        assert cache.states is not None
        with torch.inference_mode():
            return decoder(tokens, spans_layout(spans), cache, taps=taps), cache.states

    (plain, plain_states), changing = run(None), Middle()
    looked, states = run(Middle())
    assert torch.equal(looked, plain)
    assert torch.equal(states, plain_states)
    changing.factor = 0.5
    changed, states = run(changing)
    others = [0, *range(7, 16)]
    assert torch.equal(changed[others], plain[others])
    assert torch.equal(states[:, [1, 3]], plain_states[:, [1, 3]])
    assert not torch.allclose(states[:, 2], plain_states[:, 2])


def test_gates_that_change_leave_other_spans_their_bits() -> None:
    """In float32, where the logarithm of a gate near one has few bits left."""
    config = tiny_gla()
    decoder = random_model(config, dtype=torch.float32)
    spans = [(0, 1, 1), (0, 9, 2), (0, 20, 3)]
    tokens = torch.cat((TOKENS[:1], TOKENS[:9], TOKENS[:20]))

    class Halves:
        def wants(self, site: str, layer: int) -> bool:
            return site == "gla.head.gate"

        def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            value[4, 0] *= 0.5
            return value

    def run(taps: Halves | None) -> torch.Tensor:
        cache = allocate_kv_cache(
            config, n_blocks=40, block_size=4, device="cpu", dtype=torch.float32, n_slots=8
        )
        with torch.inference_mode():
            return decoder(tokens, spans_layout(spans), cache, taps=taps)

    plain, changed = run(None), run(Halves())
    others = [0, *range(10, 30)]  # the rows before it share its chunk
    assert torch.equal(plain[others], changed[others])
    assert torch.allclose(plain[1:4], changed[1:4], atol=1e-5)
    assert not torch.equal(plain[4:10], changed[4:10])


def test_a_key_of_nothing_and_an_open_gate_leave_the_state() -> None:
    decoder, taps = tiny_decoder(), Seen()
    whole(decoder, TOKENS, taps)
    key, gate = (taps.values[f"gla.head.{name}", 1].clone() for name in ("k", "gate"))
    key[8], gate[8] = 0.0, 1.0
    changed = Seen({("gla.head.k", 1): key, ("gla.head.gate", 1): gate})
    whole(decoder, TOKENS, changed)
    state = changed.values["gla.head.state", 1]
    assert torch.allclose(state[8], state[7], rtol=0, atol=1e-12)


def test_sites_of_the_other_mixer_are_refused_with_the_reason() -> None:
    config = tiny_gla("hybrid")
    assert "gated linear" in str(why_lacking(config, "attn.head.z", 0))
    assert "softmax" in str(why_lacking(config, "gla.head.z", 1))
    assert why_lacking(config, "gla.head.state", 0) is None
