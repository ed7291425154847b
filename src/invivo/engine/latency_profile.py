"""First guesses of an engine's step times, for a latency model to start from."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from invivo.engine.latency import LatencyModel, Sample, Work
from invivo.kernels.cross_entropy import cross_entropy
from invivo.kernels.paging import blocks_needed, contiguous_layout
from invivo.models.cache import KVCache, allocate_kv_cache
from invivo.models.decoder import Decoder

BACKWARD_COST = 2.0  # of a layer's backward over its forward, what is rebuilt included
ENOUGH = 32  # iterations that tell more than a few timed passes


def first_profile(
    decoder: Decoder, seen: Sequence[Sample], *, max_rows: int, block_size: int, busy: bool
) -> list[Sample]:
    """Iterations to start from, training among them.

    Where requests are being served, what ``seen`` iterations took says enough, and nobody is held
    up by measuring. What training costs is supposed from it: the model corrects itself from the
    first real steps on, and what matters is that training is not taken to cost nothing before.
    """
    if busy and len(seen) >= ENOUGH:
        model, most = LatencyModel(seen), min(max_rows, 64)
        layers = decoder.config.n_layers
        with_training = [
            Sample(
                Work(rows).with_backward(rows, layers),
                model.predict(Work(rows)) * (1 + BACKWARD_COST),
            )
            for rows in (1, most)
        ]
        return [*seen, *with_training]
    return measured_profile(decoder, max_rows=max_rows, block_size=block_size)


@torch.inference_mode()
def measured_profile(decoder: Decoder, *, max_rows: int, block_size: int) -> list[Sample]:
    """Times of forwards of 1, 16, ... rows in a cache of their own, with and without their loss;
    those of backwards are supposed from them."""
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
        forward, loss = _seconds(decoder, cache, rows, block_size)
        samples.append(Sample(Work(rows, 0, context, pairs), forward))
        samples.append(Sample(Work(rows, rows, context, pairs), forward + loss))
        both = Work(rows, 0, context, pairs).with_backward(rows, decoder.config.n_layers)
        samples.append(Sample(both, forward * (1 + BACKWARD_COST)))
    return samples


def _seconds(decoder: Decoder, cache: KVCache, rows: int, block_size: int) -> tuple[float, float]:
    """Of a forward and of the loss after it; the better of two runs each."""
    device = decoder.embed.device
    forwards, losses = [], []
    for _ in range(2):
        layout = contiguous_layout([rows], block_size=block_size, device=device)
        tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        started = time.perf_counter()
        hidden = decoder(tokens, layout, cache)
        _wait(device)
        between = time.perf_counter()
        head = decoder.embed if decoder.head is None else decoder.head
        cross_entropy(hidden, head, tokens, packed=decoder.head_packed)
        _wait(device)
        forwards.append(between - started)
        losses.append(time.perf_counter() - between)
    return min(forwards), min(losses)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
