"""Paged attention on Hopper-class GPUs: one kernel for spans of many rows, one for decodes.

Both read keys and values through the block table and take every length from device memory, so a
captured graph replays for any lengths. Where there are rows enough, the span kernel reads keys and
values from a copy that lies in plain rows instead: the chip's bulk copy engine can fetch those,
which leaves the arithmetic units to the softmax (8,192 tokens of 32 heads of 128 on an H200: 1.0
against 1.4 ms, the copy itself 0.03). The query heads that share a key head lie next to each
other in the M dimension of the products, so keys are read once a group. The softmax runs online
in float32 and base 2.

The keys of decodes are cut into pieces of one length, about as many as fill the device, whatever
the lengths: one long sequence among short ones would else keep its layer waiting. The cuts are
found on the device too, once a batch.

Arguments that change from batch to batch are kept out of Triton's specialisation: else every new
combination of "is 1" and "is a multiple of 16" would compile the kernel again while requests wait.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from invivo.kernels.paging import PagedLayout
from invivo.kernels.rounding import power_of_2
from invivo.kernels.triton_launch import Launch
from invivo.kernels.triton_pages import gather_pages, spans_from

# Score of a hidden key. Finite, so that a row whose first blocks are all hidden stays a number;
# what such a row collects there is scaled to nothing once it meets a visible key (its own).
HIDDEN = tl.constexpr(-1.0e30)
# Decode programs to aim at: a few for each of the 132 multiprocessors of an H200.
PROGRAMS = 528
# From so many rows on, and so many rows times the longest keys, copying the keys of the spans into
# plain rows pays. Of 256 rows over 256 keys the device makes as much of either way (9 us on an
# H200; of 512 over 512 15 and 18), but the host has twice as much to do where they are copied.
BULK_ROWS = 256
BULK_PAIRS = 2**18
# Pieces of one row.
MAX_PIECES = 64
# Rows looked at in one go while cutting.
CUT_ROWS = 1024


class Tile(NamedTuple):
    """Launch shape: rows of M, keys a step, warps, pipeline stages."""

    m: int
    n: int
    warps: int
    stages: int


def prefill_tile(head_dim: int, dtype: torch.dtype, *, bulk: bool) -> Tile:
    """Tile of the span kernel; by head size because tiles live in registers and shared memory."""
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1)
    if bulk:
        return Tile(64, 64, 4, 3) if head_dim <= 128 else Tile(128, 64, 8, 2)
    if head_dim <= 128:
        return Tile(64, 32, 4, 4)
    return Tile(64, 32, 4, 2)


def decode_tile(head_dim: int, dtype: torch.dtype) -> Tile:
    """Tile of the decode kernel; M is raised to the heads of a group where they are more."""
    if dtype == torch.float32:
        return Tile(16, 32, 8, 2)
    if head_dim <= 128:
        return Tile(16, 64, 4, 2)
    return Tile(16, 32, 4, 3)


def most_pieces(n_rows: int, n_groups: int) -> int:
    """Bound on the pieces into which the keys of so many decodes are cut."""
    return n_rows + PROGRAMS // n_groups + 1


@triton.jit
def _load_rows(
    cache, table, begin, keys, end, group,
    N_GROUPS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BULK: tl.constexpr, WIDE: tl.constexpr, EDGE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys or values [keys, D_PAD] of one group.

    BULK: ``cache`` is a descriptor of plain rows and ``table`` the row where the span starts.
    EDGE: keys from ``end`` on do not exist. WIDE: offsets need 64 bits.
    """
    if BULK:
        rows = cache.load([table + begin, group * D_PAD])
    else:
        dims = tl.arange(0, D_PAD)
        if EDGE:
            blocks = tl.load(table + keys // BLOCK_SIZE, mask=keys < end, other=0)
        else:
            blocks = tl.load(table + keys // BLOCK_SIZE)
        if WIDE:
            blocks = blocks.to(tl.int64)
        place = (blocks * BLOCK_SIZE + keys % BLOCK_SIZE) * (N_GROUPS * D)
        place = place[:, None] + (group * D + dims)[None, :]
        if EDGE:
            mask = (keys < end)[:, None] & (dims < D)[None, :]
            rows = tl.load(cache + place, mask=mask, other=0.0)
        elif D == D_PAD:
            rows = tl.load(cache + place)
        else:
            rows = tl.load(cache + place, mask=(dims < D)[None, :], other=0.0)
    if UPCAST:
        rows = rows.to(tl.float32)
    return rows


@triton.jit
def _visit_keys(
    acc, row_max, row_sum, q, index, first, stop, end,
    k_cache, v_cache, table, group, scale, softcap,
    N_GROUPS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BULK: tl.constexpr, WIDE: tl.constexpr,
    EDGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Take keys [first, stop) into the running softmax.

    index [M]: index of each row's token. EDGE: rows may not see all of these keys, and those
    from ``end`` on do not exist.
    """
    factor = 1.4426950408889634  # scores to units of log 2
    if not SOFTCAP:
        factor = scale * 1.4426950408889634
    for begin in range(first, stop, BLOCK_N):
        keys = begin + tl.arange(0, BLOCK_N)
        k = _load_rows(
            k_cache, table, begin, keys, end, group,
            N_GROUPS, D, D_PAD, BLOCK_SIZE, BULK, WIDE, EDGE, UPCAST,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            # softcap * tanh(x): tanh(x) = 2 sigmoid(2 x) - 1
            scores = softcap * (2.0 * tl.sigmoid(scores * (2.0 * scale / softcap)) - 1.0)
        if EDGE or WINDOW > 0:
            # Scaled before they are hidden: a fused multiply-subtract of HIDDEN is not exact,
            # and the difference of two hidden scores has to be 0.
            scores = scores * factor
            if EDGE:
                scores = tl.where(keys[None, :] <= index[:, None], scores, HIDDEN)
            if WINDOW > 0:
                scores = tl.where(index[:, None] - keys[None, :] < WINDOW, scores, HIDDEN)
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            probs = tl.exp2(scores - new_max[:, None])
        else:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
            probs = tl.exp2(scores * factor - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(probs, 1)
        row_max = new_max
        acc = acc * shrink[:, None]
        v = _load_rows(
            v_cache, table, begin, keys, end, group,
            N_GROUPS, D, D_PAD, BLOCK_SIZE, BULK, WIDE, EDGE, UPCAST,
        )  # fmt: skip
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit(
    do_not_specialize=["n_spans", "first_row", "table_stride"],
    do_not_specialize_on_alignment=["span_start", "kv_len", "block_table", "starts"],
)
def _span_kernel(
    q, k_cache, v_cache, out, lse, span_start, kv_len, block_table, starts, scale, softcap,
    n_spans, first_row, q_stride, table_stride,
    N_GROUPS: tl.constexpr, REPEAT: tl.constexpr, REPEAT_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BULK: tl.constexpr, WIDE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """A tile of rows of one span, for the heads of one group.

    BULK: ``k_cache`` and ``v_cache`` are descriptors of gathered rows, ``starts`` says where each
    span's begin, a multiple of BLOCK_N. LSE: the log-sum-exp of the scores goes to ``lse`` too.

    Grid (rows // TILE_ROWS + n_spans, N_GROUPS), TILE_ROWS = BLOCK_M / REPEAT_PAD: span s owns
    tiles from (rows before it) // TILE_ROWS + s on, at least as many as it needs, so that a
    program finds its span by bisection and no host needs the lengths.
    """
    TILE_ROWS: tl.constexpr = BLOCK_M // REPEAT_PAD
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    group = tl.program_id(1)
    span = 0
    beyond = n_spans
    while beyond - span > 1:
        middle = (span + beyond) // 2
        if (tl.load(span_start + middle) - first_row) // TILE_ROWS + middle <= tile:
            span = middle
        else:
            beyond = middle
    start = tl.load(span_start + span)
    n_rows = tl.load(span_start + span + 1) - start
    begin = (tile - (start - first_row) // TILE_ROWS - span) * TILE_ROWS
    if begin >= n_rows:
        return
    length = tl.load(kv_len + span)
    before = length - n_rows

    m = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D_PAD)
    row = begin + m // REPEAT_PAD
    head = group * REPEAT + m % REPEAT_PAD
    real = (row < n_rows) & (m % REPEAT_PAD < REPEAT)
    mask = real[:, None] & (dims < D)[None, :]
    place = (start + row).to(tl.int64)
    queries = tl.load(
        q + place[:, None] * q_stride + head[:, None] * D + dims[None, :], mask=mask, other=0.0
    )
    if UPCAST:
        queries = queries.to(tl.float32)
    index = before + row
    end = before + tl.minimum(begin + TILE_ROWS, n_rows)
    seen_by_all = (before + begin + 1) // BLOCK_N * BLOCK_N
    first = 0
    if WINDOW > 0:
        first = tl.maximum(before + begin + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N

    if BULK:
        table = tl.load(starts + span)
    else:
        table = block_table + span.to(tl.int64) * table_stride
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    row_max = tl.full([BLOCK_M], HIDDEN, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc, row_max, row_sum = _visit_keys(
        acc, row_max, row_sum, queries, index, first, seen_by_all, end,
        k_cache, v_cache, table, group, scale, softcap,
        N_GROUPS, D, D_PAD, BLOCK_SIZE, BLOCK_N, BULK, WIDE, False, WINDOW, SOFTCAP, UPCAST,
    )  # fmt: skip
    acc, row_max, row_sum = _visit_keys(
        acc, row_max, row_sum, queries, index, seen_by_all, end, end,
        k_cache, v_cache, table, group, scale, softcap,
        N_GROUPS, D, D_PAD, BLOCK_SIZE, BLOCK_N, BULK, WIDE, True, WINDOW, SOFTCAP, UPCAST,
    )  # fmt: skip
    acc = acc / row_sum[:, None]
    if LSE:
        natural = (row_max + tl.log2(row_sum)) * 0.6931471805599453
        tl.store(lse + place * (N_GROUPS * REPEAT) + head, natural, mask=real)
    out_stride: tl.constexpr = N_GROUPS * REPEAT * D
    tl.store(
        out + place[:, None] * out_stride + head[:, None] * D + dims[None, :],
        acc.to(out.dtype.element_ty),
        mask=mask,
    )


@triton.jit(do_not_specialize=["n_rows", "most"], do_not_specialize_on_alignment=["kv_len"])
def _cut_kernel(
    kv_len, pieces, arrived, n_rows, most,
    N_GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
    MAX_PIECES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Cut the visible keys of every row into pieces of one length, some PER_GROUP of them.

    pieces [4, most]: row (-1 behind the last piece), first key, key behind the last, and how many
    pieces the row has * 2 * MAX_PIECES + number of the piece. arrived [n_rows, N_GROUPS]: zeros.
    One program.
    """
    lanes = tl.arange(0, ROWS)
    total = tl.zeros([], tl.int32)
    longest = tl.zeros([], tl.int32)
    for begin in range(0, n_rows, ROWS):
        rows = begin + lanes
        lengths = tl.load(kv_len + rows, mask=rows < n_rows, other=0)
        n_keys = lengths - _first_key(lengths, BLOCK_N, WINDOW)
        total += tl.sum(n_keys, 0)
        longest = tl.maximum(longest, tl.max(n_keys, 0))
    share = tl.maximum(tl.cdiv(total, PER_GROUP), tl.cdiv(longest, MAX_PIECES))
    share = tl.maximum(tl.cdiv(share, BLOCK_N), 1) * BLOCK_N
    n_before = tl.zeros([], tl.int32)
    for begin in range(0, n_rows, ROWS):
        rows = begin + lanes
        lengths = tl.load(kv_len + rows, mask=rows < n_rows, other=0)
        first = _first_key(lengths, BLOCK_N, WINDOW)
        counts = tl.cdiv(lengths - first, share)
        place = pieces + n_before + tl.cumsum(counts, 0) - counts
        for number in range(tl.max(counts, 0)):
            mask = number < counts
            start = first + number * share
            tl.store(place + number, rows, mask=mask)
            tl.store(place + number + most, start, mask=mask)
            tl.store(place + number + 2 * most, tl.minimum(start + share, lengths), mask=mask)
            tl.store(place + number + 3 * most, counts * (2 * MAX_PIECES) + number, mask=mask)
        n_before += tl.sum(counts, 0)
    for begin in range(0, most, ROWS):
        places = begin + lanes
        behind = (places >= n_before) & (places < most)
        tl.store(pieces + places, tl.full([ROWS], -1, tl.int32), mask=behind)
    for begin in range(0, n_rows * N_GROUPS, ROWS):
        places = begin + lanes
        tl.store(arrived + places, tl.zeros([ROWS], tl.int32), mask=places < n_rows * N_GROUPS)


@triton.jit
def _first_key(lengths, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """First key that a decode of so many keys reads: the first of a tile."""
    if WINDOW > 0:
        return tl.maximum(lengths - WINDOW, 0) // BLOCK_N * BLOCK_N
    return tl.zeros_like(lengths)


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["kv_len", "block_table"],
)
def _decode_kernel(
    q, k_cache, v_cache, out, partial, partial_lse, pieces, arrived,
    kv_len, block_table, scale, softcap, q_stride, table_stride,
    N_GROUPS: tl.constexpr, REPEAT: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MAX_PIECES: tl.constexpr, WIDE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One piece of the keys of one row, for the heads of one group. Grid (most pieces, N_GROUPS).

    The only piece of a row goes to ``out``; others go to ``partial`` and ``partial_lse``, and who
    comes last adds them up, in their order. ``arrived`` is 0 before and after.
    """
    piece = tl.program_id(0)
    group = tl.program_id(1)
    most = tl.num_programs(0)
    found = tl.load(pieces + piece)
    begin = tl.load(pieces + piece + most)
    end = tl.load(pieces + piece + 2 * most)
    which = tl.load(pieces + piece + 3 * most)
    if found < 0:
        return
    row = found.to(tl.int64)
    n_pieces = which // (2 * MAX_PIECES)
    N_HEADS: tl.constexpr = N_GROUPS * REPEAT
    last = end - 1  # index of the row's token, as far as this piece can tell: all before it is seen
    if WINDOW > 0:
        last = tl.load(kv_len + row) - 1

    m = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D_PAD)
    head = group * REPEAT + m
    real = m < REPEAT
    mask = real[:, None] & (dims < D)[None, :]
    queries = tl.load(q + row * q_stride + head[:, None] * D + dims[None, :], mask=mask, other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    index = tl.zeros([BLOCK_M], tl.int32) + last
    table = block_table + row * table_stride
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    row_max = tl.full([BLOCK_M], HIDDEN, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    whole = begin + (end - begin) // BLOCK_N * BLOCK_N
    acc, row_max, row_sum = _visit_keys(
        acc, row_max, row_sum, queries, index, begin, whole, end,
        k_cache, v_cache, table, group, scale, softcap,
        N_GROUPS, D, D_PAD, BLOCK_SIZE, BLOCK_N, False, WIDE, False, WINDOW, SOFTCAP, UPCAST,
    )  # fmt: skip
    acc, row_max, row_sum = _visit_keys(
        acc, row_max, row_sum, queries, index, whole, end, end,
        k_cache, v_cache, table, group, scale, softcap,
        N_GROUPS, D, D_PAD, BLOCK_SIZE, BLOCK_N, False, WIDE, True, WINDOW, SOFTCAP, UPCAST,
    )  # fmt: skip
    acc = acc / row_sum[:, None]
    if n_pieces == 1:
        place = out + (row * N_HEADS + head)[:, None] * D + dims[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=mask)
    else:
        slot = piece.to(tl.int64) * N_HEADS + head
        tl.store(partial + slot[:, None] * D + dims[None, :], acc, mask=mask)
        tl.store(partial_lse + slot, row_max + tl.log2(row_sum), mask=real)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        counter = arrived + row * N_GROUPS + group
        if tl.atomic_add(counter, 1, sem="acq_rel") == n_pieces - 1:
            tl.store(counter, 0)
            first = (piece - which % (2 * MAX_PIECES)).to(tl.int64)
            _add_up(
                partial, partial_lse, out + row * N_HEADS * D, first, n_pieces, head, real,
                N_HEADS, D, D_PAD, BLOCK_M,
            )  # fmt: skip


@triton.jit
def _add_up(
    partial, partial_lse, out, first, n_pieces, head, real,
    N_HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Weigh pieces [first, first + n_pieces) of one row by their sums, for heads ``head``."""
    dims = tl.arange(0, D_PAD)
    mask = real[:, None] & (dims < D)[None, :]
    total = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    largest = tl.full([BLOCK_M], HIDDEN, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    for number in range(0, n_pieces, 4):  # at a time: reading is waiting
        slot = (first + number) * N_HEADS + head
        s0, v0 = _piece(partial, partial_lse, slot, dims, real, mask, True, D)
        s1, v1 = _piece(
            partial, partial_lse, slot + N_HEADS, dims, real, mask, number + 1 < n_pieces, D
        )
        s2, v2 = _piece(
            partial, partial_lse, slot + 2 * N_HEADS, dims, real, mask, number + 2 < n_pieces, D
        )
        s3, v3 = _piece(
            partial, partial_lse, slot + 3 * N_HEADS, dims, real, mask, number + 3 < n_pieces, D
        )
        higher = tl.maximum(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)), largest)
        shrink = tl.exp2(largest - higher)
        w0, w1 = tl.exp2(s0 - higher), tl.exp2(s1 - higher)
        w2, w3 = tl.exp2(s2 - higher), tl.exp2(s3 - higher)
        total = total * shrink[:, None] + v0 * w0[:, None] + v1 * w1[:, None]
        total += v2 * w2[:, None] + v3 * w3[:, None]
        weight = weight * shrink + w0 + w1 + w2 + w3
        largest = higher
    place = out + head[:, None] * D + dims[None, :]
    tl.store(place, (total / weight[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _piece(partial, partial_lse, slot, dims, real, mask, there, D: tl.constexpr):
    """Log-sum-exp (-inf where the piece is not ``there``) and values of one piece.

    Read past the nearest cache, which may hold what stood there before.
    """
    lse = tl.load(partial_lse + slot, mask=real & there, other=float("-inf"), cache_modifier=".cg")
    values = tl.load(
        partial + slot[:, None] * D + dims[None, :],
        mask=mask & there,
        other=0.0,
        cache_modifier=".cg",
    )
    return lse, values


def paged_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """The function of ``paged_attention_reference``; not differentiable, no host reads.

    Rows of q may be strided; the caches are contiguous; ``scale`` is positive. ``lse`` [T, H]
    float32 takes the log-sum-exp of the scores of every row that is not a decode.
    """
    n_rows, n_heads, head_dim = q.shape
    if q.stride()[1:] != (head_dim, 1):
        q = q.contiguous()
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    out = torch.empty((n_rows, n_heads, head_dim), dtype=q.dtype, device=q.device)
    shape = _shape(q, k_cache, layout, window, softcap)
    cap = 1.0 if softcap is None else softcap
    if layout.n_decode:
        _attend_decodes(out, q, k_cache, v_cache, layout, scale, cap, shape)
    if layout.n_spans > layout.n_decode:
        _attend_spans(out, lse, q, k_cache, v_cache, layout, scale, cap, shape)
    return out


class Shape(NamedTuple):
    """What all kernels are compiled for.

    Attributes:
        repeat: query heads that share a key head.
        window: 0 for none.
        wide: places in the cache need 64 bits.
    """

    n_groups: int
    repeat: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    window: int
    softcap: bool
    wide: bool
    on_cpu: bool

    @property
    def head_dim_pad(self) -> int:
        return max(16, power_of_2(self.head_dim))

    def constants(self) -> dict[str, int | bool]:
        return {
            "N_GROUPS": self.n_groups,
            "REPEAT": self.repeat,
            "D": self.head_dim,
            "D_PAD": self.head_dim_pad,
            "BLOCK_SIZE": self.block_size,
            "WINDOW": self.window,
            "SOFTCAP": self.softcap,
            # The interpreter cannot multiply bfloat16 matrices.
            "UPCAST": self.on_cpu and self.dtype == torch.bfloat16,
            "WIDE": self.wide,
        }


def _shape(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    layout: PagedLayout,
    window: int | None,
    softcap: float | None,
) -> Shape:
    _, n_heads, head_dim = q.shape
    n_groups = k_cache.shape[2]
    return Shape(
        n_groups, n_heads // n_groups, head_dim, layout.block_size, q.dtype, window or 0,
        softcap is not None, k_cache.numel() >= 2**31, q.is_cpu,
    )  # fmt: skip


@cache
def _span_launch(shape: Shape, bulk: bool, lse: bool) -> tuple[Launch, Tile, int]:
    """With its tile, and how many rows one program has."""
    tile = prefill_tile(shape.head_dim, shape.dtype, bulk=bulk)
    repeat_pad = power_of_2(shape.repeat)
    block_m = max(tile.m, repeat_pad)
    launch = Launch(
        _span_kernel,
        REPEAT_PAD=repeat_pad, BLOCK_M=block_m, BLOCK_N=tile.n, BULK=bulk, LSE=lse,
        num_warps=tile.warps, num_stages=tile.stages, **shape.constants(),
    )  # fmt: skip
    return launch, tile, block_m // repeat_pad


@cache
def _decode_launch(shape: Shape) -> Launch:
    tile = decode_tile(shape.head_dim, shape.dtype)
    return Launch(
        _decode_kernel,
        BLOCK_M=max(tile.m, power_of_2(shape.repeat)), BLOCK_N=tile.n, MAX_PIECES=MAX_PIECES,
        num_warps=tile.warps, num_stages=tile.stages, **shape.constants(),
    )  # fmt: skip


@cache
def _cut_launch(n_groups: int, per_group: int, block_n: int, window: int, rows: int) -> Launch:
    return Launch(
        _cut_kernel,
        N_GROUPS=n_groups, PER_GROUP=per_group, BLOCK_N=block_n, WINDOW=window,
        MAX_PIECES=MAX_PIECES, ROWS=rows, num_warps=4,
    )  # fmt: skip


def _attend_spans(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: PagedLayout,
    scale: float,
    softcap: float,
    shape: Shape,
) -> None:
    # A decode span is one row, so rows before and spans before agree.
    spans = spans_from(layout, layout.n_decode)
    n_rows = q.shape[0] - spans.first
    many = n_rows >= BULK_ROWS and n_rows * layout.max_kv >= BULK_PAIRS
    bulk = many and q.dtype.itemsize == 2 and len(layout.kv_len_host) > spans.first
    launch, tile, rows_each = _span_launch(shape, bulk, lse is not None)
    keys, values, starts = k_cache, v_cache, spans.kv_len
    if bulk:
        room = gather_pages(
            k_cache, v_cache, layout, spans, align=tile.n, head_dim_pad=shape.head_dim_pad
        )
        keys, values, starts = room.keys, room.values, room.starts
    launch(
        (n_rows // rows_each + spans.n_spans, shape.n_groups),
        q, keys, values, out, out if lse is None else lse,
        spans.span_start, spans.kv_len, spans.block_table, starts,
        scale, softcap, spans.n_spans, spans.first, q.stride(0), spans.table_stride,
    )  # fmt: skip


def _attend_decodes(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: PagedLayout,
    scale: float,
    softcap: float,
    shape: Shape,
) -> None:
    _, n_heads, head_dim = q.shape
    tile = decode_tile(head_dim, q.dtype)
    cuts = decode_cuts(layout, shape.n_groups, tile.n, shape.window)
    most = cuts.pieces.shape[1]
    partial = torch.empty((most, n_heads, head_dim), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((most, n_heads), dtype=torch.float32, device=q.device)
    _decode_launch(shape)(
        (most, shape.n_groups),
        q, k_cache, v_cache, out, partial, partial_lse, *cuts, layout.kv_len, layout.block_table,
        scale, softcap, q.stride(0), layout.block_table.stride(0),
    )  # fmt: skip


class DecodeCuts(NamedTuple):
    """Pieces of the keys of a batch's decodes, see :func:`_cut_kernel`."""

    pieces: torch.Tensor
    arrived: torch.Tensor


def decode_cuts(layout: PagedLayout, n_groups: int, block_n: int, window: int) -> DecodeCuts:
    """How the keys of the decodes are cut: once a layout, window and tile."""
    key = ("decode cuts", n_groups, block_n, window)
    found: DecodeCuts | None = layout.prepared.get(key)
    if found is None:
        n_rows = layout.n_decode
        most = most_pieces(n_rows, n_groups)
        sizes = ((4, most), (n_rows, n_groups))
        found = DecodeCuts(*(layout.kv_len.new_empty(size) for size in sizes))
        launch = _cut_launch(n_groups, max(1, PROGRAMS // n_groups), block_n, window, CUT_ROWS)
        launch((1,), layout.kv_len, *found, n_rows, most)
        layout.prepared[key] = found
    return found
