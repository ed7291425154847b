"""How many blocks and states fit: from free memory, after weights and a warm-up peak."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from invivo.engine.scheduler import Limits
from invivo.kernels.paging import blocks_needed, contiguous_layout
from invivo.models.cache import allocate_kv_cache, bytes_per_block, bytes_per_slot
from invivo.models.decoder import Decoder

CPU_LIMIT = 2 << 30
SNAPSHOTS_A_SEQUENCE = 4  # of recurrent states, for each sequence that may run
GPU_SPARE = 512 << 20  # graphs, adapters' tables and the allocator's waste


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """What the cache has room for.

    Attributes:
        n_blocks: physical blocks, the scratch block included.
        n_snapshots: copies of recurrent states beside those of running sequences.
    """

    n_blocks: int
    n_snapshots: int = 0


def cache_sizes(
    decoder: Decoder,
    *,
    block_size: int,
    max_batch_tokens: int,
    max_running: int,
    max_length: int,
    kv_bytes: int | None,
    memory_fraction: float,
    max_rows: int,
    snapshot_bytes: int | None = None,
) -> CacheSizes:
    """Blocks and snapshots beside the states of recurrent layers for ``max_rows`` sequences.

    Never more blocks than ``max_running`` sequences of ``max_length`` tokens can use, and never
    more snapshots than a few for each of them.
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
    per_slot = bytes_per_slot(decoder.config, dtype=weight.dtype)
    useful = max_running * -(-max_length // block_size)
    room = max(0, kv_bytes - (1 + max_rows) * per_slot)
    n_snapshots = 0
    if per_slot:
        if snapshot_bytes is None:
            snapshot_bytes = room // 4 if per_block else room
        most = SNAPSHOTS_A_SEQUENCE * max_running
        n_snapshots = min(min(snapshot_bytes, room) // per_slot, most)
        room -= n_snapshots * per_slot
    if per_block == 0:  # no layer has keys and values
        return CacheSizes(useful + 1, n_snapshots)
    return CacheSizes(min(room // per_block, useful) + 1, n_snapshots)


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
    snapshot_bytes: int | None = None,
    snapshot_tokens: int = 64,
) -> Limits:
    """The scheduler's budgets for this decoder on its device."""
    sizes = cache_sizes(
        decoder,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        max_length=max_length,
        kv_bytes=kv_bytes,
        memory_fraction=memory_fraction,
        max_rows=max_running + max_training,
        snapshot_bytes=snapshot_bytes if prefix_cache else 0,
    )
    return Limits(
        n_blocks=sizes.n_blocks,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        max_length=max_length,
        prefix_cache=prefix_cache,
        max_training=max_training,
        recurrent=bool(decoder.config.recurrent),
        n_snapshots=sizes.n_snapshots,
        snapshot_tokens=snapshot_tokens,
    )
