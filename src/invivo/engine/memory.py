"""How many blocks of keys and values fit: from free memory, after weights and a warm-up peak."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from invivo.engine.scheduler import Limits
from invivo.kernels.paging import blocks_needed, contiguous_layout
from invivo.models.cache import allocate_kv_cache, bytes_per_block, bytes_per_slot
from invivo.models.decoder import Decoder

CPU_LIMIT = 2 << 30
GPU_SPARE = 512 << 20  # graphs, adapters' tables and the allocator's waste


def kv_blocks(
    decoder: Decoder,
    *,
    block_size: int,
    max_batch_tokens: int,
    max_running: int,
    max_length: int,
    kv_bytes: int | None,
    memory_fraction: float,
    max_rows: int,
) -> int:
    """Physical blocks of the cache, the scratch block included, beside the states of recurrent
    layers for ``max_rows`` sequences.

    Never more than ``max_running`` sequences of ``max_length`` tokens can use.
    """
    weight = next(decoder.parameters())
    if kv_bytes is None:
        if weight.device.type == "cuda":
            kv_bytes = _gpu_bytes(
                decoder, max_batch_tokens, max_running, block_size, memory_fraction
            )
        else:
            kv_bytes = min(CPU_LIMIT, free_memory() // 4)
    per_block = bytes_per_block(decoder.config, block_size=block_size, dtype=weight.dtype)
    useful = max_running * -(-max_length // block_size)
    if per_block == 0:  # no layer has keys and values
        return useful + 1
    states = (1 + max_rows) * bytes_per_slot(decoder.config, dtype=weight.dtype)
    return min(max(0, kv_bytes - states) // per_block, useful) + 1


def room_to_pack(decoder: Decoder) -> bool:
    """Whether packed copies of the linear maps would leave most of a CPU's free memory alone."""
    weights = list(decoder.parameters())
    n_bytes = sum(w.numel() * w.element_size() for w in weights)
    return weights[0].device.type == "cpu" and n_bytes <= free_memory() // 3


def free_memory() -> int:
    """Bytes of main memory that could be had without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@torch.inference_mode()
def _gpu_bytes(
    decoder: Decoder, max_batch_tokens: int, max_running: int, block_size: int, fraction: float
) -> int:
    """What a full batch leaves of ``fraction`` of the device's memory."""
    weight = next(decoder.parameters())
    device = weight.device
    torch.cuda.reset_peak_memory_stats(device)
    longest = min(max_batch_tokens, decoder.config.max_positions)
    lengths = [longest] * (max_batch_tokens // longest)
    layout = contiguous_layout(lengths, block_size=block_size, device=device)
    cache = allocate_kv_cache(
        decoder.config,
        n_blocks=blocks_needed(lengths, block_size),
        block_size=block_size,
        device=device,
        dtype=weight.dtype,
    )
    tokens = torch.zeros(layout.n_rows, dtype=torch.int64, device=device)
    hidden = decoder(tokens, layout, cache)
    probs = torch.softmax(decoder.logits(hidden[:max_running]).float(), dim=-1)
    probs.cumsum(dim=-1)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - cache.n_bytes
    del cache, hidden, probs
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return max(0, int(total * fraction) - others - peak - GPU_SPARE)


def limits_of(
    decoder: Decoder,
    *,
    block_size: int,
    max_batch_tokens: int,
    max_running: int,
    max_length: int,
    prefix_cache: bool,
    kv_bytes: int | None,
    memory_fraction: float,
    max_training: int = 0,
) -> Limits:
    """The scheduler's budgets for this decoder on its device."""
    n_blocks = kv_blocks(
        decoder,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        max_length=max_length,
        kv_bytes=kv_bytes,
        memory_fraction=memory_fraction,
        max_rows=max_running + max_training,
    )
    return Limits(
        n_blocks=n_blocks,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        max_length=max_length,
        prefix_cache=prefix_cache,
        max_training=max_training,
        recurrent=bool(decoder.config.recurrent),
    )
