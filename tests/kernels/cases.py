"""Flat batches for kernel tests: sequences with a past, in shuffled or consecutive blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from invivo.kernels.paging import PagedLayout


@dataclass(frozen=True)
class AttentionShape:
    n_heads: int = 4
    n_groups: int = 2
    head_dim: int = 16
    block_size: int = 16


@dataclass
class AttentionCase:
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    layout: PagedLayout


def make_layout(
    spans: list[tuple[int, int]],
    *,
    block_size: int,
    generator: torch.Generator,
    shuffled: bool = True,
    spare_blocks: int = 2,
) -> tuple[PagedLayout, int]:
    """Layout of (rows, kv length) spans, decodes first, and the number of blocks it needs.

    Block 0 is nobody's. Table entries beyond a sequence's blocks are 0.
    """
    needed = [-(-length // block_size) for _, length in spans]
    total = sum(needed)
    order = torch.randperm(total, generator=generator) if shuffled else torch.arange(total)
    blocks = (order + 1).tolist()
    table = torch.zeros(len(spans), max(needed, default=1) + spare_blocks, dtype=torch.int32)
    positions: list[int] = []
    slots: list[int] = []
    span_start = [0]
    at = 0
    for i, ((rows, length), n) in enumerate(zip(spans, needed, strict=True)):
        own = blocks[at : at + n]
        at += n
        table[i, :n] = torch.tensor(own, dtype=torch.int32)
        for index in range(length - rows, length):
            positions.append(index)
            slots.append(own[index // block_size] * block_size + index % block_size)
        span_start.append(span_start[-1] + rows)
    n_decode = 0
    while n_decode < len(spans) and spans[n_decode][0] == 1:
        n_decode += 1
    lengths = [length for _, length in spans]
    layout = PagedLayout(
        positions=torch.tensor(positions, dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        span_start=torch.tensor(span_start, dtype=torch.int32),
        kv_len=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        block_size=block_size,
        n_decode=n_decode,
        max_query=max((rows for rows, _ in spans), default=0),
        max_kv=max(lengths, default=0),
        span_start_host=span_start,
        kv_len_host=lengths,
    )
    return layout, total + 1


def make_attention_case(
    spans: list[tuple[int, int]],
    shape: AttentionShape,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shuffled: bool = True,
) -> AttentionCase:
    """Random queries and caches. Cache rows that no sequence holds are 1e4: using one shows."""
    generator = torch.Generator().manual_seed(seed)
    layout, n_blocks = make_layout(
        spans, block_size=shape.block_size, generator=generator, shuffled=shuffled
    )
    n_rows = layout.n_rows
    q = torch.randn(n_rows, shape.n_heads, shape.head_dim, generator=generator, dtype=dtype)
    size = (n_blocks, shape.block_size, shape.n_groups, shape.head_dim)
    k_cache = torch.randn(size, generator=generator, dtype=dtype)
    v_cache = torch.randn(size, generator=generator, dtype=dtype)
    held = torch.zeros(n_blocks * shape.block_size, dtype=torch.bool)
    for i, (_, length) in enumerate(spans):
        for index in range(length):
            block = int(layout.block_table[i, index // shape.block_size])
            held[block * shape.block_size + index % shape.block_size] = True
    # Finite but huge: a masked path may multiply such a row by zero, but never let it through.
    for cache in (k_cache, v_cache):
        cache.flatten(0, 1)[~held] = 1e4
    return AttentionCase(q, k_cache, v_cache, layout)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``, in float64; NaN stays NaN."""
    wide = expected.double()
    return float((value.double() - wide).norm() / wide.norm().clamp_min(1e-300))
