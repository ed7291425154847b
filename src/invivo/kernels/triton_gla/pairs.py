"""What happens within chunks: the weights of pairs of rows, and queries and keys with decays.

With ``gc`` the sums of a chunk's log gates and m the middle of their range (per channel)::

    P_ij = scale * sum_c q_ic k_jc exp(gc_ic - gc_jc)  =  (scale q exp(gc - m)) (k exp(m - gc))^T

one product on the matrix units. Where some channel decays by more than 120 nats within a chunk
the factors leave the range of a float: such a chunk is flagged, and a second kernel, which
returns at once for all others, makes P again by sub-chunks of 16 rows (secondary chunking, Yang
et al., 2023, arXiv 2312.06635, section 4.3) with no exponent above 0. No flag is read by the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from invivo.kernels.triton_gla.loads import load_gates, load_rows, log2_gates
from invivo.kernels.triton_gla.tables import CHUNK, STEEP, SUB, Chunks, padded, pair_tile
from invivo.kernels.triton_replay import Room


class PairGradients(NamedTuple):
    """dO V^T of each chunk.

    Attributes:
        below: [N, H, C, C], of the products' kind: what lies below the diagonal, zero elsewhere.
        rest: [N, H, C, C], of the products' kind: what that misses of float32.
        own: [N, H, C] the diagonal, float32.
        across: [N, H, C, C], of the products' kind: dO V^T with the values of the other chunk of
            the couple, for the second of a couple; zero for the first.
    """

    below: torch.Tensor
    rest: torch.Tensor
    own: torch.Tensor
    across: torch.Tensor


class Within(NamedTuple):
    """What streaming and gradients read of each chunk; N slots, C = 64 rows, K padded.

    Attributes:
        writers: [2, N, H, C, K] what writes states forwards and backwards: keys
            k * exp(gn - gc), gn the last of gc, and queries scale * q * exp(gc).
        pairs: [N, H, C, C] P, zero above the diagonal.
        decay: [N, H, K] exp(gn), float32.
        ends: [N, H, 2, K] the first and the last of gc, in units of log 2, float32.
        steep: [N, H] int32, 1 where the chunk is flagged.
        d_pairs: of the backward pass alone.
    """

    writers: torch.Tensor
    pairs: torch.Tensor
    decay: torch.Tensor
    ends: torch.Tensor
    steep: torch.Tensor
    d_pairs: PairGradients | None

    @property
    def keys(self) -> torch.Tensor:
        return self.writers[0]

    @property
    def queries(self) -> torch.Tensor:
        return self.writers[1]


@triton.jit
def _pairs_kernel(
    q, k, g, v, dz, chunks, queries, keys, pairs, d_pairs, d_rest, d_own, d_across, decay,
    ends, steep, scale, tau, q_stride, k_stride, g_stride, v_stride, dz_stride,
    N_HEADS: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FROM_LOGITS: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head. Grid (N_HEADS, slots)."""
    head, slot = tl.program_id(0), tl.program_id(1)
    n = tl.load(chunks + 3 * slot + 1)
    if n == 0:
        return
    kind = queries.dtype.element_ty
    at = tl.arange(0, C)
    first = tl.load(chunks + 3 * slot)
    row, real = first + at, at < n
    place = (slot * N_HEADS + head).to(tl.int64)
    seen = at[None, :] <= at[:, None]

    total = tl.zeros([C, C], tl.float32)
    widest = tl.zeros([BLOCK_K], tl.float32)
    for begin in range(0, K_PAD, BLOCK_K):
        dims = begin + tl.arange(0, BLOCK_K)
        gates = load_gates(g, row, real, dims, head, g_stride, tau, K, FROM_LOGITS)
        q_rows = load_rows(q, row, real, dims, head, q_stride, K).to(tl.float32) * scale
        k_rows = load_rows(k, row, real, dims, head, k_stride, K).to(tl.float32)
        sums, last = tl.cumsum(gates, 0), tl.sum(gates, 0)
        top = tl.load(g + first.to(tl.int64) * g_stride + head * K + dims,
                      mask=dims < K, other=0.0)  # fmt: skip
        top = tl.where(dims < K, log2_gates(top, tau, FROM_LOGITS), 0.0)
        middle = (top + last) * 0.5
        widest = tl.maximum(widest, top - last)
        # In float32, a product of tf32: rounded to bfloat16 they would be half of the error of P.
        # Where factors leave the range of a float, the chunk is flagged and all of it made again.
        down = q_rows * tl.exp2(sums - middle[None, :])
        up = k_rows * tl.exp2(middle[None, :] - sums)
        total = tl.dot(down, tl.trans(up), total, input_precision=PRECISION)
        to = (place * C + at)[:, None] * K_PAD + dims[None, :]
        tl.store(queries + to, (down * tl.exp2(middle)[None, :]).to(kind))
        tl.store(keys + to, (up * tl.exp2(last - middle)[None, :]).to(kind))
        tl.store(decay + place * K_PAD + dims, tl.exp2(last))
        if BACKWARD:
            tl.store(ends + place * (2 * K_PAD) + dims, top)
            tl.store(ends + place * (2 * K_PAD) + K_PAD + dims, last)
    square = (place * C + at)[:, None] * C + at[None, :]
    # Rows that do not exist too: their zeros were multiplied by factors that may be infinite.
    tl.store(pairs + square, tl.where(seen & real[:, None], total, 0.0).to(kind))
    tl.store(steep + place, (tl.max(widest, 0) > STEEP).to(tl.int32))

    if BACKWARD:
        total = tl.zeros([C, C], tl.float32)
        across = tl.zeros([C, C], tl.float32)
        is_second = tl.load(chunks + 3 * slot + 2) == 1
        for begin in range(0, V, BLOCK_V):
            dims = begin + tl.arange(0, BLOCK_V)
            dz_rows = load_rows(dz, row, real, dims, head, dz_stride, V).to(kind)
            v_rows = load_rows(v, row, real, dims, head, v_stride, V).to(kind)
            total = tl.dot(dz_rows, tl.trans(v_rows), total, input_precision=PRECISION)
            v_rows = load_rows(v, row - C, is_second & (at < C), dims, head, v_stride, V).to(kind)
            across = tl.dot(dz_rows, tl.trans(v_rows), across, input_precision=PRECISION)
        before = tl.where(at[None, :] < at[:, None], total, 0.0)
        large = before.to(kind)
        tl.store(d_pairs + square, large)
        tl.store(d_rest + square, (before - large.to(tl.float32)).to(kind))
        own = tl.sum(tl.where(at[None, :] == at[:, None], total, 0.0), 1)
        tl.store(d_own + place * C + at, own)
        tl.store(d_across + square, across.to(kind))


@triton.jit
def _steep_pairs_kernel(
    q, k, g, chunks, queries, keys, pairs, steep, scale, tau, q_stride, k_stride, g_stride,
    N_HEADS: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
    C: tl.constexpr, SUB_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    FROM_LOGITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All of a flagged chunk. Grid (N_HEADS, slots): most programs only find that it is not."""
    head, slot = tl.program_id(0), tl.program_id(1)
    n = tl.load(chunks + 3 * slot + 1)
    if n == 0:
        return
    place = (slot * N_HEADS + head).to(tl.int64)
    if tl.load(steep + place) == 0:
        return
    first = tl.load(chunks + 3 * slot)
    _steep_rows(
        q, k, g, queries, keys, place, first, n, head, scale, tau, q_stride, k_stride, g_stride,
        K, K_PAD, C, SUB_ROWS, BLOCK_K, FROM_LOGITS,
    )  # fmt: skip
    for part in range(tl.cdiv(n, SUB_ROWS)):
        for past in range(part + 1):
            _steep_pair(
                q, k, g, pairs, place, first, n, part, past, head, scale, tau,
                q_stride, k_stride, g_stride, K, K_PAD, C, SUB_ROWS, BLOCK_K, FROM_LOGITS,
                PRECISION,
            )  # fmt: skip


@triton.jit
def _steep_rows(
    q, k, g, queries, keys, place, first, n, head, scale, tau, q_stride, k_stride, g_stride,
    K: tl.constexpr, K_PAD: tl.constexpr, C: tl.constexpr, SUB_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, FROM_LOGITS: tl.constexpr,
):  # fmt: skip
    """Queries and keys with decays from the chunk's start and to its end."""
    sub = tl.arange(0, SUB_ROWS)
    for begin in range(0, K_PAD, BLOCK_K):
        dims = begin + tl.arange(0, BLOCK_K)
        before = tl.zeros([BLOCK_K], tl.float32)
        for part in range(C // SUB_ROWS):
            i = part * SUB_ROWS + sub
            gates = load_gates(g, first + i, i < n, dims, head, g_stride, tau, K, FROM_LOGITS)
            later = load_gates(
                g, first + i + 1, (sub + 1 < SUB_ROWS) & (i + 1 < n), dims, head, g_stride, tau,
                K, FROM_LOGITS,
            )  # fmt: skip
            after = _sum_between(
                g, first, n, dims, head, g_stride, tau, (part + 1) * SUB_ROWS, C, K, C, FROM_LOGITS
            )
            q_rows = load_rows(q, first + i, i < n, dims, head, q_stride, K).to(tl.float32)
            k_rows = load_rows(k, first + i, i < n, dims, head, k_stride, K).to(tl.float32)
            down = q_rows * scale * tl.exp2(tl.cumsum(gates, 0) + before[None, :])
            up = k_rows * tl.exp2(tl.cumsum(later, 0, reverse=True) + after[None, :])
            to = (place * C + i)[:, None] * K_PAD + dims[None, :]
            tl.store(queries + to, down.to(queries.dtype.element_ty))
            tl.store(keys + to, up.to(keys.dtype.element_ty))
            before += tl.sum(gates, 0)


@triton.jit
def _steep_pair(
    q, k, g, pairs, place, first, n, part, past, head, scale, tau, q_stride, k_stride, g_stride,
    K: tl.constexpr, K_PAD: tl.constexpr, C: tl.constexpr, SUB_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, FROM_LOGITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P between the queries of one sub-chunk and the keys of another, not later."""
    sub = tl.arange(0, SUB_ROWS)
    i, j = part * SUB_ROWS + sub, past * SUB_ROWS + sub
    total = tl.zeros([SUB_ROWS, SUB_ROWS], tl.float32)
    for begin in range(0, K_PAD, BLOCK_K):
        dims = begin + tl.arange(0, BLOCK_K)
        q_rows = load_rows(q, first + i, i < n, dims, head, q_stride, K).to(tl.float32) * scale
        gates = load_gates(g, first + i, i < n, dims, head, g_stride, tau, K, FROM_LOGITS)
        inside = tl.cumsum(gates, 0)
        if past < part:
            k_rows = load_rows(k, first + j, j < n, dims, head, k_stride, K).to(tl.float32)
            # Decay from row j to the start of this sub-chunk.
            between = _sum_between(
                g, first, n, dims, head, g_stride, tau, (past + 1) * SUB_ROWS, part * SUB_ROWS,
                K, C, FROM_LOGITS,
            )  # fmt: skip
            later = load_gates(
                g, first + j + 1, (sub + 1 < SUB_ROWS) & (j + 1 < n), dims, head, g_stride, tau,
                K, FROM_LOGITS,
            )  # fmt: skip
            to_end = tl.cumsum(later, 0, reverse=True) + between[None, :]
            down = q_rows * tl.exp2(inside)
            up = k_rows * tl.exp2(to_end)
            total = tl.dot(down, tl.trans(up), total, input_precision=PRECISION)
        else:
            for column in range(SUB_ROWS):
                there = (dims < K) & (part * SUB_ROWS + column < n)
                key_place = k + (first + part * SUB_ROWS + column).to(tl.int64) * k_stride
                key = tl.load(key_place + head * K + dims, mask=there, other=0.0).to(tl.float32)
                # Only the gates after that row: nothing cancels.
                since = tl.cumsum(tl.where((sub > column)[:, None], gates, 0.0), 0)
                weight = tl.sum(q_rows * key[None, :] * tl.exp2(since), 1)
                here = (sub[None, :] == column) & (sub[:, None] >= column)
                total += tl.where(here, weight[:, None], 0.0)
    to = (place * C + i)[:, None] * C + j[None, :]
    tl.store(pairs + to, total.to(pairs.dtype.element_ty))


@triton.jit
def _sum_between(
    g, first, n, dims, head, stride, tau, begin, end,
    K: tl.constexpr, C: tl.constexpr, FROM_LOGITS: tl.constexpr,
):  # fmt: skip
    """Sum of the log gates of a chunk's rows [begin, end): [dims]."""
    at = tl.arange(0, C)
    there = (at >= begin) & (at < end) & (at < n)
    return tl.sum(load_gates(g, first + at, there, dims, head, stride, tau, K, FROM_LOGITS), 0)


def within_chunks(
    room: Room,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    chunks: Chunks,
    *,
    scale: float,
    tau: float | None,
    kind: torch.dtype,
    dz: torch.Tensor | None = None,
) -> Within:
    """Both kernels. q, k, g [T, H, K] and v, dz [T, H, V] by rows; with ``dz``, d_pairs too.

    Args:
        tau: ``g`` are logits, and log gates their logsigmoid over this; None: ``g`` are log gates.
        kind: of the products' operands, bfloat16 or float32.
    """
    n_heads, channels = q.shape[1:]
    k_pad, wide, slots = padded(channels), kind == torch.float32, chunks.n_chunks
    tile = pair_tile(k_pad, v.shape[2], wide=wide)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return room.scratch(slots, n_heads, *shape, dtype=dtype)

    out = Within(
        writers=room.scratch(2, slots, n_heads, CHUNK, k_pad, dtype=kind),
        pairs=empty(CHUNK, CHUNK, dtype=kind),
        decay=empty(k_pad, dtype=torch.float32),
        ends=empty(2, k_pad, dtype=torch.float32),
        steep=empty(dtype=torch.int32),
        d_pairs=None
        if dz is None
        else PairGradients(
            empty(CHUNK, CHUNK, dtype=kind),
            empty(CHUNK, CHUNK, dtype=kind),
            empty(CHUNK, dtype=torch.float32),
            empty(CHUNK, CHUNK, dtype=kind),
        ),
    )
    d_pairs = out.d_pairs or (out.decay,) * 4  # stands for what the forward pass lacks
    common = {
        "N_HEADS": n_heads,
        "K": channels,
        "K_PAD": k_pad,
        "C": CHUNK,
        "FROM_LOGITS": tau is not None,
    }
    divisor = 1.0 if tau is None else tau
    room.launch(
        _pairs_kernel, (n_heads, slots),
        q, k, g, v, v if dz is None else dz, chunks.chunks, out.queries, out.keys, out.pairs,
        *d_pairs, out.decay, out.ends, out.steep, scale, divisor,
        q.stride(0), k.stride(0), g.stride(0), v.stride(0),
        0 if dz is None else dz.stride(0),
        V=v.shape[2], BLOCK_K=tile.k, BLOCK_V=tile.v, BACKWARD=dz is not None,
        PRECISION="tf32x3" if wide else "tf32",
        warps=tile.warps, stages=tile.stages, **common,
    )  # fmt: skip
    room.launch(
        _steep_pairs_kernel, (n_heads, slots),
        q, k, g, chunks.chunks, out.queries, out.keys, out.pairs, out.steep, scale, divisor,
        q.stride(0), k.stride(0), g.stride(0),
        SUB_ROWS=SUB, BLOCK_K=min(32, k_pad), PRECISION="tf32x3" if wide else "tf32",
        warps=1, stages=1, **common,
    )  # fmt: skip
    return out
