"""Tiny models with gated linear attention, alone and beside softmax attention."""

from __future__ import annotations

from typing import Any

import torch

from invivo.kernels.paging import PagedLayout
from invivo.models.cache import KVCache, allocate_kv_cache
from invivo.models.config import ModelConfig
from invivo.models.decoder import Decoder
from invivo.models.gla_config import gla_model
from invivo.models.load import random_model

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "convolution": {"conv_size": 4},
    "hybrid": {"attention_layers": (1,), "attention_kv_heads": 2, "window": 9, "conv_size": 3},
}


def tiny_gla(shape: str = "plain", **changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 67,
        "d_model": 32,
        "n_layers": 3,
        "n_heads": 4,
        "d_ff": 48,
        "max_positions": 256,
    }
    return gla_model(**(sizes | SHAPES[shape] | changes))


def tiny_decoder(shape: str = "plain", **changes: Any) -> Decoder:
    decoder = random_model(tiny_gla(shape, **changes), dtype=torch.float64)
    rng = torch.Generator().manual_seed(5)
    for name, parameter in decoder.named_parameters():
        if name.endswith(("mixer.norm", "gate_b_bias")):
            parameter.data.add_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return decoder


def memory_of(config: ModelConfig, *, n_blocks: int = 40, n_slots: int = 8) -> KVCache:
    return allocate_kv_cache(
        config, n_blocks=n_blocks, block_size=4, device="cpu", dtype=torch.float64, n_slots=n_slots
    )


def spans_layout(spans: list[tuple[int, int, int]]) -> PagedLayout:
    """Spans (start, stop, slot), decodes first; slot s owns blocks 10 (s - 1) + 1 onwards of 4."""
    positions = [t for start, stop, _ in spans for t in range(start, stop)]
    starts = [0]
    for start, stop, _ in spans:
        starts.append(starts[-1] + stop - start)
    table = torch.tensor([[10 * (slot - 1) + 1 + b for b in range(10)] for *_, slot in spans])
    rows = [table[i, t // 4] * 4 + t % 4 for i, s in enumerate(spans) for t in range(*s[:2])]
    lengths = [stop for _, stop, _ in spans]
    n_decode = 0
    while n_decode < len(spans) and spans[n_decode][1] - spans[n_decode][0] == 1:
        n_decode += 1
    return PagedLayout(
        positions=torch.tensor(positions),
        slots=torch.tensor(rows),
        span_start=torch.tensor(starts, dtype=torch.int32),
        kv_len=torch.tensor(lengths, dtype=torch.int32),
        block_table=table.to(torch.int32),
        block_size=4,
        n_decode=n_decode,
        max_query=max(stop - start for start, stop, _ in spans),
        max_kv=max(lengths),
        span_start_host=starts,
        kv_len_host=lengths,
        state_slots=torch.tensor([slot for *_, slot in spans]),
    )
