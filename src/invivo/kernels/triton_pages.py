"""Pages of several sequences copied side by side into plain rows, for kernels that read in bulk."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from invivo.kernels.paging import PagedLayout
from invivo.kernels.rounding import ceil_div, power_of_2
from invivo.kernels.triton_launch import Launch

# Rooms up to this size stay until the batch has run: making them takes the host longer than the
# card takes to fill them.
KEPT_BYTES = 2**25
COPIED = 2048  # numbers of a block that one program copies


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["kv_len", "block_table", "starts"],
)
def _gather_kernel(
    k_cache, v_cache, k_rows, v_rows, kv_len, block_table, starts, table_stride,
    N_GROUPS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    GROUPS_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One block of one span, rows of padding as zeros. Grid (most blocks, spans, K or V)."""
    span = tl.program_id(1).to(tl.int64)
    length = tl.load(kv_len + span)
    begin = tl.program_id(0) * BLOCK_SIZE
    if begin >= tl.cdiv(length, ALIGN) * ALIGN:
        return
    cache, rows = k_cache, k_rows
    if tl.program_id(2) == 1:
        cache, rows = v_cache, v_rows
    exists = begin < length
    block = tl.load(block_table + span * table_stride + tl.program_id(0), mask=exists, other=0)
    start = tl.load(starts + span).to(tl.int64)
    dims = tl.arange(0, D_PAD)[None, :]
    lines = tl.arange(0, BLOCK_SIZE * GROUPS_PAD)[:, None]
    token, group = lines // GROUPS_PAD, lines % GROUPS_PAD
    inside = (group < N_GROUPS) & (dims < D_PAD)
    real = inside & (dims < D) & (begin + token < length)
    source = cache + block.to(tl.int64) * (BLOCK_SIZE * N_GROUPS * D)
    target = rows + (start + begin) * (N_GROUPS * D_PAD)
    values = tl.load(source + (token * N_GROUPS + group) * D + dims, mask=real, other=0.0)
    tl.store(target + (token * N_GROUPS + group) * D_PAD + dims, values, mask=inside)


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["blocks"])
def _copy_blocks_kernel(
    k_cache, v_cache, k_rows, v_rows, blocks, n_rows,
    BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Part of one block. Grid (blocks, cdiv(BLOCK_SIZE * WIDTH, N), K or V)."""
    index = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * N + tl.arange(0, N)
    cache, rows = k_cache, k_rows
    if tl.program_id(2) == 1:
        cache, rows = v_cache, v_rows
    block = tl.load(blocks + index).to(tl.int64)
    target = index * (BLOCK_SIZE * WIDTH) + place
    mask = (place < BLOCK_SIZE * WIDTH) & (target < n_rows.to(tl.int64) * WIDTH)
    values = tl.load(cache + block * (BLOCK_SIZE * WIDTH) + place, mask=mask)
    tl.store(rows + target, values, mask=mask)


def gather_text_triton(
    k_cache: torch.Tensor, v_cache: torch.Tensor, blocks: torch.Tensor, n_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The function of ``gather_text`` in ``attention_backward.py``; the caches are contiguous."""
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    assert blocks.stride(0) == 1
    _, block_size, n_groups, head_dim = k_cache.shape
    size = (n_rows, n_groups, head_dim)
    k_rows = torch.empty(size, dtype=k_cache.dtype, device=k_cache.device)
    v_rows = torch.empty(size, dtype=v_cache.dtype, device=v_cache.device)
    width = n_groups * head_dim
    _copy_launch(block_size, width)(
        (ceil_div(n_rows, block_size), ceil_div(block_size * width, COPIED), 2),
        k_cache, v_cache, k_rows, v_rows, blocks, n_rows,
    )  # fmt: skip
    return k_rows, v_rows


@cache
def _copy_launch(block_size: int, width: int) -> Launch:
    return Launch(_copy_blocks_kernel, BLOCK_SIZE=block_size, WIDTH=width, N=COPIED, num_warps=4)


@dataclass(frozen=True, slots=True)
class SpanTensors:
    """The spans of a layout from ``first`` on, as kernels read them in every layer.

    Attributes:
        span_start, kv_len, block_table: see :class:`~invivo.kernels.paging.PagedLayout`.
        table_stride: of ``block_table``.
        rooms: where :func:`gather_pages` copied to, by what it depends on.
    """

    first: int
    n_spans: int
    span_start: torch.Tensor
    kv_len: torch.Tensor
    block_table: torch.Tensor
    table_stride: int
    rooms: dict[Hashable, PlainRows] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Room for the keys and values of spans, one span after the other.

    A span's rows start at a multiple of ``align`` (itself a multiple of the block size) and are
    followed by zeros up to the next; so are the dimensions beyond the head's.

    Attributes:
        keys, values: descriptors of [N, G * head_dim_pad] in tiles of ``align`` rows of one head.
        starts: where each span's rows start, [spans + 1] int32.
        grid: of the kernel that fills it.
    """

    keys: TensorDescriptor
    values: TensorDescriptor
    starts: torch.Tensor
    grid: tuple[int, int, int]


def spans_from(layout: PagedLayout, first: int) -> SpanTensors:
    """The spans of ``layout`` from ``first`` on; made once for all layers."""
    key = ("triton_pages.spans", first)
    spans: SpanTensors | None = layout.prepared.get(key)
    if spans is None:
        spans = SpanTensors(
            first, layout.n_spans - first, layout.span_start[first:], layout.kv_len[first:],
            layout.block_table[first:], layout.block_table.stride(0),
        )  # fmt: skip
        layout.prepared[key] = spans
    return spans


def gather_pages(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: PagedLayout,
    spans: SpanTensors,
    *,
    align: int,
    head_dim_pad: int,
) -> PlainRows:
    """Keys and values of ``spans``; reads the layout's host lists.

    Small rooms serve every layer of the batch in turn: what is there is overwritten by the next.
    """
    n_groups, head_dim = k_cache.shape[2:]
    key = (k_cache.dtype, n_groups, align, head_dim_pad)
    room = spans.rooms.get(key)
    if room is None:
        room, n_bytes = _room(k_cache, layout, spans, align, head_dim_pad)
        if n_bytes <= KEPT_BYTES:
            spans.rooms[key] = room
    _gather_launch(n_groups, head_dim, head_dim_pad, layout.block_size, align)(
        room.grid,
        k_cache, v_cache, room.keys.base, room.values.base, spans.kv_len, spans.block_table,
        room.starts, spans.table_stride,
    )  # fmt: skip
    return room


@cache
def _gather_launch(
    n_groups: int, head_dim: int, head_dim_pad: int, block_size: int, align: int
) -> Launch:
    return Launch(
        _gather_kernel,
        N_GROUPS=n_groups, D=head_dim, D_PAD=head_dim_pad,
        GROUPS_PAD=power_of_2(n_groups), BLOCK_SIZE=block_size, ALIGN=align,
        num_warps=8,
    )  # fmt: skip


def _room(
    cache: torch.Tensor, layout: PagedLayout, spans: SpanTensors, align: int, head_dim_pad: int
) -> tuple[PlainRows, int]:
    """Room for keys and values like those of ``cache``, and its bytes."""
    lengths = layout.kv_len_host[spans.first :]
    assert len(lengths) == spans.n_spans
    assert align % layout.block_size == 0
    key = ("triton_pages.starts", spans.first, align)
    starts = layout.prepared.get(key)
    if starts is None:
        padded = (spans.kv_len + (align - 1)) // align * align
        starts = torch.nn.functional.pad(padded.cumsum(0, dtype=torch.int32), (1, 0))
        layout.prepared[key] = starts
    n_rows = sum(-(-n // align) * align for n in lengths)
    size = (n_rows, cache.shape[2] * head_dim_pad)
    rows = [torch.empty(size, dtype=cache.dtype, device=cache.device) for _ in range(2)]
    keys, values = (TensorDescriptor.from_tensor(x, [align, head_dim_pad]) for x in rows)
    most = -(-max(lengths) // align) * align // layout.block_size
    return PlainRows(keys, values, starts, (most, len(lengths), 2)), 2 * rows[0].nbytes
