"""Where the rows of a flat batch live in paged memory.

One iteration of the engine is a *flat batch*: the token rows of all spans laid
end to end. Attention needs to know, for each span, which rows are its queries
and which cache blocks hold its keys; this module holds that description and
nothing else, so that kernels and models agree on it without knowing requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class PagedLayout:
    """Placement of T token rows, in S spans, over cache blocks of ``block_size`` tokens.

    Row ``t`` of span ``s`` (``span_start[s] <= t < span_start[s + 1]``) is the token with
    *index* ``kv_len[s] - (span_start[s + 1] - t)`` of its sequence: causality goes by this
    index. ``positions`` is what rotary or learned position embeddings see; it equals the index
    unless a request chose its own positions.

    Spans of one row (decodes) come first: the first ``n_decode`` spans.

    Attributes:
        positions: [T] int64.
        slots: [T] int64, physical row ``block * block_size + offset`` where K and V are written.
        span_start: [S + 1] int32, cumulative row counts.
        kv_len: [S] int32, keys visible to the last row of the span, itself included.
        block_table: [S, >= max blocks] int32, physical block of each logical block.
        block_size: tokens a block.
        n_decode: how many leading spans have one row.
        max_query: longest span in rows (0 for an empty batch).
        max_kv: largest ``kv_len``.
        span_start_host, kv_len_host: the same numbers as Python lists, so that a CPU path
            needs no device read; empty inside a CUDA graph.
        state_slots: [S] int64, slot of each span's recurrent state; None: every span is a whole
            sequence from its first token, and its state is not kept.
        prepared: what a kernel derives from this layout alone (masks, groups) and reuses in
            every layer; it lives as long as the layout, which must not change once used.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    span_start: torch.Tensor
    kv_len: torch.Tensor
    block_table: torch.Tensor
    block_size: int
    n_decode: int
    max_query: int
    max_kv: int
    span_start_host: list[int]
    kv_len_host: list[int]
    state_slots: torch.Tensor | None = None
    prepared: dict[object, Any] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        return int(self.positions.shape[0])

    @property
    def n_spans(self) -> int:
        return int(self.kv_len.shape[0])


def contiguous_layout(
    lengths: list[int], *, block_size: int = 16, device: torch.device | str = "cpu"
) -> PagedLayout:
    """Layout of whole sequences from their first token, each with blocks of its own.

    This is what a plain forward pass needs (tests, training, one-off scoring).

    Args:
        lengths: tokens of each sequence, all >= 1.
        block_size: tokens a block.
        device: where the index tensors go.
    """
    span_start = [0]
    slots: list[int] = []
    positions: list[int] = []
    tables: list[list[int]] = []
    next_block = 0
    for n in lengths:
        span_start.append(span_start[-1] + n)
        positions.extend(range(n))
        n_blocks = -(-n // block_size)
        tables.append(list(range(next_block, next_block + n_blocks)))
        slots.extend(next_block * block_size + i for i in range(n))
        next_block += n_blocks
    width = max((len(t) for t in tables), default=1)
    table = torch.zeros(len(lengths), max(width, 1), dtype=torch.int32)
    for row, blocks in enumerate(tables):
        table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    n_decode = 0
    while n_decode < len(lengths) and lengths[n_decode] == 1:
        n_decode += 1
    return PagedLayout(
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
        span_start=torch.tensor(span_start, dtype=torch.int32, device=device),
        kv_len=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table=table.to(device),
        block_size=block_size,
        n_decode=n_decode,
        max_query=max(lengths, default=0),
        max_kv=max(lengths, default=0),
        span_start_host=span_start,
        kv_len_host=list(lengths),
    )


def part_of(layout: PagedLayout, spans: Sequence[int]) -> tuple[PagedLayout, slice | torch.Tensor]:
    """The layout of some of a batch's spans (ascending), and which of its rows are theirs.

    The rows are a slice where the spans are the first ones; the tensors are then views.
    """
    starts, lengths = layout.span_start_host, layout.kv_len_host
    n = len(spans)
    device = layout.positions.device
    span_start = [0, *itertools.accumulate(starts[s + 1] - starts[s] for s in spans)]
    which: slice | torch.Tensor
    rows: slice | torch.Tensor
    if n == 0 or spans[-1] == n - 1:
        which, rows = slice(0, n), slice(0, span_start[-1])
        first_rows = layout.span_start[: n + 1]
    else:
        at = [row for s in spans for row in range(starts[s], starts[s + 1])]
        which, rows = _on(device, list(spans), torch.int64), _on(device, at, torch.int64)
        first_rows = _on(device, span_start, torch.int32)
    kv_len = [lengths[s] for s in spans]
    part = PagedLayout(
        positions=layout.positions[rows],
        slots=layout.slots[rows],
        span_start=first_rows,
        kv_len=layout.kv_len[which],
        block_table=layout.block_table[which],
        block_size=layout.block_size,
        n_decode=sum(1 for s in spans if s < layout.n_decode),
        max_query=max((b - a for a, b in itertools.pairwise(span_start)), default=0),
        max_kv=max(kv_len, default=0),
        span_start_host=span_start,
        kv_len_host=kv_len,
        state_slots=None if layout.state_slots is None else layout.state_slots[which],
    )
    return part, rows


def _on(device: torch.device, numbers: list[int], dtype: torch.dtype) -> torch.Tensor:
    """On the device, without the host waiting for what is queued there."""
    tensor = torch.tensor(numbers, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def blocks_needed(lengths: list[int], block_size: int = 16) -> int:
    """How many blocks :func:`contiguous_layout` uses for these lengths."""
    return sum(-(-n // block_size) for n in lengths)
