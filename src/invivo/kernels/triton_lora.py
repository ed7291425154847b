"""LoRA on GPUs: shrink to the rank, then expand and add, another adapter for every row.

Few rows: one program a row and a piece of the width, memory-bound reads of the row's own matrices.
Many rows: tiles of neighbouring rows, which mostly share an adapter; a tile walks through the
adapters it contains. Rows without adapter cost the reading of their index.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from invivo.kernels.rounding import ceil_div, power_of_2
from invivo.kernels.triton_launch import Launch

# Up to this many rows each reads its own matrices.
ROWS_EACH = 256
# Elements of A, and of B, that a program reads: their width is this over the rank.
SHRINK_SIZE = 8192
EXPAND_SIZE = 4096
TILE_ROWS = 64
TILE_WIDTH = 64
NONE = tl.constexpr(1 << 30)


@triton.jit(
    do_not_specialize=["n_slots"],
    do_not_specialize_on_alignment=["index"],
)
def _shrink_rows_kernel(
    x, a, index, partial, n_slots, x_stride,
    D_IN: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Share of one piece of the inputs in one row's [RANK] products. Grid (rows, pieces)."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    slot = tl.load(index + row).to(tl.int64)
    if (slot == 0) | (slot >= n_slots):
        return
    column = piece * WIDTH + tl.arange(0, WIDTH)
    rank = tl.arange(0, RANK_PAD)
    ranks = rank < RANK
    mask = column < D_IN
    values = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    matrix = tl.load(
        a + (slot * RANK + rank)[:, None] * D_IN + column[None, :],
        mask=mask[None, :] & ranks[:, None],
        other=0.0,
    )
    products = tl.sum(matrix.to(tl.float32) * values[None, :], 1)
    tl.store(partial + (row * tl.num_programs(1) + piece) * RANK + rank, products, mask=ranks)


@triton.jit(
    do_not_specialize=["n_slots", "n_pieces"],
    do_not_specialize_on_alignment=["index"],
)
def _expand_rows_kernel(
    y, b, index, partial, n_slots, n_pieces, y_stride,
    D_OUT: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr, WIDTH: tl.constexpr,
    PIECES_PAD: tl.constexpr,
):  # fmt: skip
    """Add to one piece of one row of y. Grid (rows, cdiv(D_OUT, WIDTH))."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(index + row).to(tl.int64)
    if (slot == 0) | (slot >= n_slots):
        return
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    rank = tl.arange(0, RANK_PAD)
    ranks = rank < RANK
    pieces = tl.arange(0, PIECES_PAD)
    shares = tl.load(
        partial + (row * n_pieces + pieces)[:, None] * RANK + rank[None, :],
        mask=(pieces < n_pieces)[:, None] & ranks[None, :],
        other=0.0,
    )
    shrunk = tl.sum(shares, 0)
    mask = column < D_OUT
    matrix = tl.load(
        b + (slot * D_OUT + column)[:, None] * RANK + rank[None, :],
        mask=mask[:, None] & ranks[None, :],
        other=0.0,
    )
    added = tl.sum(matrix.to(tl.float32) * shrunk[None, :], 1)
    place = y + row * y_stride + column
    old = tl.load(place, mask=mask, other=0.0)
    tl.store(place, (old.to(tl.float32) + added).to(old.dtype), mask=mask)


@triton.jit(
    do_not_specialize=["n_rows", "n_slots"],
    do_not_specialize_on_alignment=["index"],
)
def _shrink_tile_kernel(
    x, a, index, shrunk, n_rows, n_slots, x_stride,
    D_IN: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[ROWS, RANK] products of a tile of rows. Grid (cdiv(rows, ROWS),)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, RANK_PAD)
    ranks = rank < RANK
    slots = tl.load(index + row, mask=row < n_rows, other=0)
    todo = tl.where((slots == 0) | (slots >= n_slots), NONE, slots)
    slot = tl.min(todo, 0)
    while slot < NONE:
        mine = slots == slot
        acc = tl.zeros([ROWS, RANK_PAD], tl.float32)
        for begin in range(0, D_IN, WIDTH):
            column = begin + tl.arange(0, WIDTH)
            inside = (column < D_IN)[None, :]
            values = tl.load(
                x + row[:, None] * x_stride + column[None, :],
                mask=mine[:, None] & inside,
                other=0.0,
            )
            matrix = tl.load(
                a + (slot.to(tl.int64) * RANK + rank)[:, None] * D_IN + column[None, :],
                mask=inside & ranks[:, None],
                other=0.0,
            )
            if UPCAST:
                values, matrix = values.to(tl.float32), matrix.to(tl.float32)
            acc = tl.dot(values, tl.trans(matrix), acc, input_precision="ieee")
        place = shrunk + row[:, None] * RANK + rank[None, :]
        tl.store(place, acc.to(shrunk.dtype.element_ty), mask=mine[:, None] & ranks[None, :])
        todo = tl.where(todo == slot, NONE, todo)
        slot = tl.min(todo, 0)


@triton.jit(
    do_not_specialize=["n_rows", "n_slots"],
    do_not_specialize_on_alignment=["index"],
)
def _expand_tile_kernel(
    y, b, index, shrunk, n_rows, n_slots, y_stride,
    D_OUT: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add to a tile of rows and columns of y. Grid (cdiv(rows, ROWS), cdiv(D_OUT, WIDTH))."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    rank = tl.arange(0, RANK_PAD)
    ranks = rank < RANK
    slots = tl.load(index + row, mask=row < n_rows, other=0)
    todo = tl.where((slots == 0) | (slots >= n_slots), NONE, slots)
    slot = tl.min(todo, 0)
    place = y + row[:, None] * y_stride + column[None, :]
    while slot < NONE:
        mine = (slots == slot)[:, None]
        inside = (column < D_OUT)[:, None]
        values = tl.load(
            shrunk + row[:, None] * RANK + rank[None, :], mask=mine & ranks[None, :], other=0.0
        )
        matrix = tl.load(
            b + (slot.to(tl.int64) * D_OUT + column)[:, None] * RANK + rank[None, :],
            mask=inside & ranks[None, :],
            other=0.0,
        )
        if UPCAST:
            values, matrix = values.to(tl.float32), matrix.to(tl.float32)
        added = tl.dot(values, tl.trans(matrix), input_precision="ieee")
        mask = mine & (column < D_OUT)[None, :]
        old = tl.load(place, mask=mask, other=0.0)
        tl.store(place, (old.to(tl.float32) + added).to(old.dtype), mask=mask)
        todo = tl.where(todo == slot, NONE, todo)
        slot = tl.min(todo, 0)


def lora_add_triton(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """The function of ``lora_add_reference``, in place on y; no host reads.

    Rows of x and y may be strided; x, y, a and b have one dtype.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    n_rows, d_in = x.shape
    n_slots, rank, _ = a.shape
    d_out = y.shape[1]
    rank_pad = max(16, power_of_2(rank))
    assert y.stride(1) == 1
    assert a.is_contiguous()
    assert b.is_contiguous()
    if n_rows == 0:
        return y
    if n_rows <= ROWS_EACH:
        width = max(16, SHRINK_SIZE // rank_pad)
        pieces = ceil_div(d_in, width)
        partial = torch.empty((n_rows, pieces, rank), dtype=torch.float32, device=x.device)
        shrink = _shrink_rows(d_in, rank, width)
        shrink((n_rows, pieces), x, a, index, partial, n_slots, x.stride(0))
        width = max(16, EXPAND_SIZE // rank_pad)
        expand = _expand_rows(d_out, rank, width, pieces)
        grid = (n_rows, ceil_div(d_out, width))
        expand(grid, y, b, index, partial, n_slots, pieces, y.stride(0))
        return y
    upcast = x.device.type == "cpu" and x.dtype == torch.bfloat16  # for the interpreter
    shrunk = torch.empty((n_rows, rank), dtype=x.dtype, device=x.device)
    tiles = ceil_div(n_rows, TILE_ROWS)
    shrink = _shrink_tile(d_in, rank, upcast)
    shrink((tiles,), x, a, index, shrunk, n_rows, n_slots, x.stride(0))
    expand = _expand_tile(d_out, rank, upcast)
    grid = (tiles, ceil_div(d_out, TILE_WIDTH))
    expand(grid, y, b, index, shrunk, n_rows, n_slots, y.stride(0))
    return y


@cache
def _shrink_rows(d_in: int, rank: int, width: int) -> Launch:
    return Launch(_shrink_rows_kernel, D_IN=d_in, WIDTH=width, num_warps=4, **_ranks(rank))


@cache
def _expand_rows(d_out: int, rank: int, width: int, pieces: int) -> Launch:
    return Launch(
        _expand_rows_kernel, D_OUT=d_out, WIDTH=width, PIECES_PAD=power_of_2(pieces), num_warps=4,
        **_ranks(rank),
    )  # fmt: skip


@cache
def _shrink_tile(d_in: int, rank: int, upcast: bool) -> Launch:
    return Launch(
        _shrink_tile_kernel, D_IN=d_in, ROWS=TILE_ROWS, WIDTH=128, UPCAST=upcast,
        num_warps=4, num_stages=3, **_ranks(rank),
    )  # fmt: skip


@cache
def _expand_tile(d_out: int, rank: int, upcast: bool) -> Launch:
    return Launch(
        _expand_tile_kernel, D_OUT=d_out, ROWS=TILE_ROWS, WIDTH=TILE_WIDTH, UPCAST=upcast,
        num_warps=4, **_ranks(rank),
    )  # fmt: skip


def _ranks(rank: int) -> dict[str, int]:
    return {"RANK": rank, "RANK_PAD": max(16, power_of_2(rank))}
