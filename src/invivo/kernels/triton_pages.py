"""Pages of several sequences copied side by side into plain rows, for kernels that read in bulk."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from invivo.kernels.paging import PagedLayout
from invivo.kernels.rounding import power_of_2


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


def gather_pages(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: PagedLayout,
    *,
    first: int,
    align: int,
    head_dim_pad: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values of the spans from ``first`` on, one span after the other.

    A span's rows start at a multiple of ``align`` (itself a multiple of the block size) and are
    followed by zeros up to the next; so are the dimensions beyond the head's. Reads the layout's
    host lists.

    Returns:
        keys and values [N, G, head_dim_pad], and where each span starts, [spans + 1] int32.
    """
    n_groups, head_dim = k_cache.shape[2:]
    lengths = layout.kv_len_host[first:]
    assert len(lengths) == layout.n_spans - first
    assert align % layout.block_size == 0
    key = ("triton_pages.starts", first, align)
    starts = layout.prepared.get(key)
    if starts is None:
        padded = (layout.kv_len[first:] + (align - 1)) // align * align
        starts = torch.nn.functional.pad(padded.cumsum(0, dtype=torch.int32), (1, 0))
        layout.prepared[key] = starts
    n_rows = sum(-(-n // align) * align for n in lengths)
    size = (n_rows, n_groups, head_dim_pad)
    k_rows = torch.empty(size, dtype=k_cache.dtype, device=k_cache.device)
    v_rows = torch.empty(size, dtype=v_cache.dtype, device=v_cache.device)
    most = -(-max(lengths) // align) * align // layout.block_size
    _gather_kernel[(most, len(lengths), 2)](
        k_cache, v_cache, k_rows, v_rows, layout.kv_len[first:], layout.block_table[first:],
        starts, layout.block_table.stride(0),
        N_GROUPS=n_groups, D=head_dim, D_PAD=head_dim_pad,
        GROUPS_PAD=power_of_2(n_groups), BLOCK_SIZE=layout.block_size, ALIGN=align,
        num_warps=8,
    )  # fmt: skip
    return k_rows, v_rows, starts
