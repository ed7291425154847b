"""Replayed decode steps equal the same steps launched kernel by kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import tiny_loaded

from invivo.engine.adapters import AdapterStore
from invivo.engine.graphs import DecodeGraphs
from invivo.kernels.paging import PagedLayout
from invivo.models.cache import KVCache, allocate_kv_cache
from invivo.models.load import LoadedModel

pytestmark = pytest.mark.gpu
BLOCKS = 4  # of a sequence


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(tmp_path_factory.mktemp("graphs"), device="cuda", dtype="float32")


@pytest.fixture
def cache(model: LoadedModel) -> KVCache:
    torch.manual_seed(0)
    cache = allocate_kv_cache(
        model.config, n_blocks=1 + 20 * BLOCKS, block_size=16, device="cuda", dtype=torch.float32
    )
    cache.k.normal_()
    cache.v.normal_()
    return cache


def decodes(lengths: list[int]) -> PagedLayout:
    n = len(lengths)
    table = (torch.randperm(n * BLOCKS) + 1).view(n, BLOCKS).to(torch.int32)
    last = torch.tensor(lengths) - 1
    slots = table[torch.arange(n), last // 16].long() * 16 + last % 16
    return PagedLayout(
        positions=last.cuda(),
        slots=slots.cuda(),
        span_start=torch.arange(n + 1, dtype=torch.int32, device="cuda"),
        kv_len=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        block_table=table.cuda(),
        block_size=16,
        n_decode=n,
        max_query=1,
        max_kv=max(lengths),
        span_start_host=list(range(n + 1)),
        kv_len_host=lengths,
    )


def lora(model: LoadedModel, modules: dict[str, tuple[int, int]], seed: int, rank: int = 4) -> Any:
    """An adapter in the peft library's format: sizes (d_in, d_out) by module."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(model.config.n_layers):
        for name, (d_in, d_out) in modules.items():
            base = f"base_model.model.model.layers.{layer}.{name}"
            for half, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
                value = 0.3 * torch.randn(shape, generator=generator)
                tensors[f"{base}.lora_{half}.weight"] = value
    targets = sorted(name.rsplit(".", 1)[1] for name in modules)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    return config, tensors


@torch.inference_mode()
def test_replay_equals_direct_launch_and_pads_into_the_scratch_block(
    model: LoadedModel, cache: KVCache
) -> None:
    graphs = DecodeGraphs(model.decoder, cache, None, max_rows=16, max_blocks=BLOCKS)
    for lengths in ([5], [64, 1, 17], [33] * 11, [2, 3]):
        layout = decodes(lengths)
        assert graphs.fits(layout)
        tokens = torch.randint(0, model.config.vocab_size, (len(lengths),), device="cuda")
        keys = cache.k.clone()
        got = graphs.run(tokens, layout).clone()
        changed = (cache.k != keys).flatten(3).any(-1).any(0).nonzero().tolist()
        written = {(slot // 16, slot % 16) for slot in layout.slots.tolist()}
        assert {(b, t) for b, t in changed if b != 0} <= written
        direct = model.decoder.logits(model.decoder.forward(tokens, layout, cache))
        torch.testing.assert_close(got, direct, rtol=1e-5, atol=1e-5)
    assert not graphs.fits(decodes([3] * 17))


@torch.inference_mode()
def test_replay_with_adapters_follows_the_tables(model: LoadedModel, cache: KVCache) -> None:
    c = model.config
    store = AdapterStore(c, device="cuda", dtype=torch.float32, max_slots=4, max_rank=64)
    graphs = DecodeGraphs(model.decoder, cache, store, max_rows=8, max_blocks=BLOCKS)
    width = c.n_heads * c.head_dim
    q, down = {"self_attn.q_proj": (c.d_model, width)}, {"mlp.down_proj": (c.d_ff, c.d_model)}
    layout = decodes([20, 40, 7])
    tokens = torch.tensor([1, 2, 3], device="cuda")
    plain = graphs.run(tokens, layout).clone()
    slots = [0]
    # The second adapter brings a linear map without a table, the third a larger rank.
    for name, modules, rank in (("a", q, 4), ("b", down, 4), ("c", q, 20)):
        store.load(name, lora(model, modules, seed=len(slots), rank=rank))
        slots.append(store.place(store.hold(name)))
        index = torch.tensor([0, slots[-1], slots[1]], dtype=torch.int32, device="cuda")
        got = graphs.run(tokens, layout, index).clone()
        hidden = model.decoder.forward(tokens, layout, cache, bypass=store.bypass(index))
        direct = model.decoder.logits(hidden)
        torch.testing.assert_close(got, direct, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[0], plain[0], rtol=1e-5, atol=1e-5)
        assert (got[1:] - plain[1:]).abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(graphs.run(tokens, layout), plain, rtol=1e-5, atol=1e-5)
