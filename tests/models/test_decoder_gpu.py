"""The decoder on a GPU: the same answers as on the CPU, and its decode step fits a CUDA graph."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from tests.models.pages import logits_of
from tests.tiny import FAMILIES, tiny_loaded

from invivo.kernels.paging import PagedLayout
from invivo.models.cache import KVCache, allocate_kv_cache
from invivo.models.decoder import Decoder

pytestmark = pytest.mark.gpu

TOKENS = random.Random(0).choices(range(290), k=40)

# Head sizes that the kernels take; the tiny defaults are smaller.
WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
OVERRIDES = dict.fromkeys(FAMILIES, WIDE) | {
    "gpt2": {"n_embd": 128},
    "phi3": {"hidden_size": 128, "head_dim": 32},
    "olmo2": {"hidden_size": 128, "intermediate_size": 64},
    "qwen2": {"hidden_size": 128, "intermediate_size": 64},
    "olmoe": {"hidden_size": 128, "intermediate_size": 64},
    "qwen2_moe": {
        "hidden_size": 128,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "qwen3_moe": WIDE | {"moe_intermediate_size": 32},
}


def on_gpu(layout: PagedLayout) -> PagedLayout:
    moved = {
        f.name: value.cuda()
        for f in dataclasses.fields(layout)
        if isinstance(value := getattr(layout, f.name), torch.Tensor)
    }
    return dataclasses.replace(layout, **moved)


def decode_layout(n_spans: int, length: int, block_size: int = 16) -> PagedLayout:
    """The token at ``length - 1`` of each of ``n_spans`` sequences with blocks of their own."""
    per_span = -(-length // block_size)
    table = torch.arange(n_spans * per_span, dtype=torch.int32).view(n_spans, per_span)
    last = length - 1
    slots = table[:, last // block_size].long() * block_size + last % block_size
    return PagedLayout(
        positions=torch.full((n_spans,), last),
        slots=slots,
        span_start=torch.arange(n_spans + 1, dtype=torch.int32),
        kv_len=torch.full((n_spans,), length, dtype=torch.int32),
        block_table=table,
        block_size=block_size,
        n_decode=n_spans,
        max_query=1,
        max_kv=length,
        span_start_host=[],
        kv_len_host=[],
    )


def filled_cache(decoder: Decoder, n_blocks: int) -> KVCache:
    cache = allocate_kv_cache(
        decoder.config, n_blocks=n_blocks, block_size=16, device="cuda", dtype=decoder.embed.dtype
    )
    generator = torch.Generator("cuda").manual_seed(1)
    cache.k.normal_(generator=generator)
    cache.v.normal_(generator=generator)
    return cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_on_the_gpu_is_that_of_the_cpu(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    exact = tiny_loaded(tmp_path, family, **OVERRIDES[family]).decoder
    decoder = tiny_loaded(tmp_path, family, dtype=dtype, device="cuda", **OVERRIDES[family]).decoder
    expected = logits_of(exact, TOKENS).log_softmax(-1)
    from invivo.kernels.paging import contiguous_layout

    layout = contiguous_layout([len(TOKENS)], device="cuda")
    cache = filled_cache(decoder, 3)
    with torch.no_grad():
        hidden = decoder(torch.tensor(TOKENS, device="cuda"), layout, cache)
        found = decoder.logits(hidden).float().log_softmax(-1).cpu()
    error = (found - expected).abs()
    if dtype == torch.float32:
        assert error.max() < 2e-2  # tensor cores may round products
    # A router near a tie may choose another expert in half precision: judge the mean.
    assert error.mean() < {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 0.08}[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_step_replays_from_a_graph(tmp_path: Path, family: str) -> None:
    decoder = tiny_loaded(
        tmp_path, family, dtype=torch.bfloat16, device="cuda", **OVERRIDES[family]
    ).decoder
    layout = on_gpu(decode_layout(5, 30))
    tokens = torch.tensor([3, 50, 7, 120, 9], device="cuda")
    cache = filled_cache(decoder, 10)

    def step() -> torch.Tensor:
        return decoder.logits(decoder(tokens, layout, cache))

    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for changed in ([3, 50, 7, 120, 9], [200, 1, 64, 9, 17]):
            tokens.copy_(torch.tensor(changed, device="cuda"))
            graph.replay()
            replayed = out.clone()
            assert torch.equal(replayed, step())
