"""First guesses of an engine's step times: a few timed forward passes in a cache of their own."""

from __future__ import annotations

import time

import torch

from invivo.engine.latency import Sample, Work
from invivo.kernels.paging import blocks_needed, contiguous_layout
from invivo.models.cache import KVCache, allocate_kv_cache
from invivo.models.decoder import Decoder

BACKWARD_COST = 3.0  # of a layer's backward over its forward, a rerun included


@torch.inference_mode()
def measured_profile(decoder: Decoder, *, max_rows: int, block_size: int) -> list[Sample]:
    """Times of forwards of 1, 16, ... rows; those of backwards are supposed from them.

    The latency model corrects itself from the first real steps on: what matters is that training
    is not supposed to cost nothing before.
    """
    most = min(max_rows, decoder.config.max_positions, 256)
    embed = decoder.embed
    cache = allocate_kv_cache(
        decoder.config,
        n_blocks=blocks_needed([most], block_size),
        block_size=block_size,
        device=embed.device,
        dtype=embed.dtype,
    )
    samples = []
    for rows in sorted({1, min(16, most), min(64, most), most}):
        pairs = 0 if rows == 1 else rows * (rows + 1) // 2
        context = 1 if rows == 1 else 0
        seconds = _seconds(decoder, cache, rows, block_size)
        samples.append(Sample(Work(rows, 0, context, pairs), seconds))
        samples.append(Sample(Work(rows, rows, context, pairs), seconds))
        both = Work(rows, 0, context, pairs, rows * decoder.config.n_layers)
        samples.append(Sample(both, seconds * (1 + BACKWARD_COST)))
    return samples


def _seconds(decoder: Decoder, cache: KVCache, rows: int, block_size: int) -> float:
    """The better of two runs."""
    times = []
    for _ in range(2):
        device = decoder.embed.device
        layout = contiguous_layout([rows], block_size=block_size, device=device)
        tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        started = time.perf_counter()
        decoder(tokens, layout, cache)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
