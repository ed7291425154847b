"""Gradients of queries, keys and gates, all chunks at once, from the kept states.

With S entering a chunk, dS leaving it and dA = tril(dO V^T) (see ``gla_chunked``)::

    dQ / scale = exp(gc) (dO S^T)    + sum_j dA_ij K_j exp(gc_i - gc_j)
    dK         = exp(gn - gc)(V dS^T) + sum_i dA_ij (scale Q_i) exp(gc_i - gc_j)
    dg_t = sum_{i >= t in the chunk} (Q_i dQ_i - K_i dK_i) + carry
    carry = exp(gn) rowsum(S dS) + sum_j K_j (state part of dK_j)

What a row has from itself (i = j) drops out of dg and is left out there: it would only add its
rounding. For the same reason the steep chunks take what keys give to the state from the other side,
as the sum over the rows before t. The products with dA are of two bfloat16 parts where the inputs
are bfloat16: rounding to one would be the larger part of the error of dg. Two kernels share the
chunks between them by the flag of ``pairs``: one anchored product for the mild, sub-chunks of 16
rows for the steep.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from invivo.kernels.rounding import ceil_div
from invivo.kernels.triton_gla.loads import (
    anchored,
    halves,
    load_gates,
    load_rows,
    running,
    store_rows,
    truncated,
)
from invivo.kernels.triton_gla.pairs import Within
from invivo.kernels.triton_gla.tables import CHUNK, COUPLE, SUB, Chunks, gradient_tile, padded
from invivo.kernels.triton_replay import Room


@triton.jit
def _read_states(
    dz, v, kept, d_kept, place, row, real, head, tile, dz_stride, v_stride,
    V: tl.constexpr, V_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dO S^T`` and ``V dS^T`` [ROWS, BLOCK_K], and ``rowsum(S dS)`` [BLOCK_K]."""
    kind = kept.dtype
    read = tl.zeros([ROWS, BLOCK_K], tl.float32)
    d_written = tl.zeros([ROWS, BLOCK_K], tl.float32)
    both = tl.zeros([BLOCK_K], tl.float32)
    for begin in range(0, V, BLOCK_V):
        values = begin + tl.arange(0, BLOCK_V)
        dz_rows = load_rows(dz, row, real, values, head, dz_stride, V).to(kind)
        v_rows = load_rows(v, row, real, values, head, v_stride, V).to(kind)
        at = (place * V_PAD + begin).to(tl.int32)
        state = kept.load([at, tile * BLOCK_K])
        d_state = d_kept.load([at, tile * BLOCK_K])
        read = tl.dot(dz_rows, state, read, input_precision=PRECISION)
        d_written = tl.dot(v_rows, d_state, d_written, input_precision=PRECISION)
        both += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
    return read, d_written, both


@triton.jit
def _weighed(weights, rest, rows, PRECISION: tl.constexpr):
    """``(weights + rest) rows``. In bfloat16 of two parts each: rounding to one would be the larger
    part of the error of dg."""
    if PRECISION == "tf32x3":
        return tl.dot(weights, rows, input_precision=PRECISION)
    large = truncated(rows)
    small = (rows - large).to(weights.dtype)
    large = large.to(weights.dtype)
    total = tl.dot(rest, large)
    total = tl.dot(weights, small, total)
    return tl.dot(weights, large, total)


@triton.jit
def _store_gates(
    dg, g, value, row, real, dims, head, stride, tau,
    N_HEADS: tl.constexpr, K: tl.constexpr, FROM_LOGITS: tl.constexpr,
):  # fmt: skip
    """Gradient of log gates, or of the logits they came from."""
    if FROM_LOGITS:
        logits = load_rows(g, row, real, dims, head, stride, K).to(tl.float32)
        value = value * tl.sigmoid(-logits) / tau
    store_rows(dg, value, row, real, dims, head, N_HEADS * K, K)


@triton.jit
def _gradient_kernel(
    q, k, g, v_tiles, dz_tiles, dq, dk, dg, kept, d_kept, queries, keys,
    d_pairs, d_rest, d_across, lower, d_own, decay, chunk_ends, steep, couples,
    scale, tau, q_stride, k_stride, g_stride,
    N_HEADS: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, V: tl.constexpr,
    V_PAD: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FROM_LOGITS: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Couples of chunks; what is flagged of them is not written. Grid (tiles of K, N_HEADS,
    couples)."""
    tile, head, couple = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(couples + 3 * couple + 1)
    if n == 0:
        return
    first, slot = tl.load(couples + 3 * couple), tl.load(couples + 3 * couple + 2)
    has_both = n > C
    # Where there is no second chunk, its place is the first's, its rows are none and its share 0.
    here, there = slot * N_HEADS + head, (slot + has_both.to(tl.int32)) * N_HEADS + head
    kind = kept.dtype
    read = tl.zeros([2 * C, BLOCK_K], tl.float32)
    written = tl.zeros([2 * C, BLOCK_K], tl.float32)
    products = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    for begin in range(0, V, BLOCK_V):
        state = kept.load([here * V_PAD + begin, tile * BLOCK_K])
        d_state = d_kept.load([there * V_PAD + begin, tile * BLOCK_K])
        dz_rows = dz_tiles.load([first, head * V + begin]).to(kind)
        v_rows = v_tiles.load([first, head * V + begin]).to(kind)
        # The diagonal alone is wanted; the matrix units have the time.
        products = tl.dot(tl.trans(state), d_state, products, input_precision=PRECISION)
        read = tl.dot(dz_rows, state, read, input_precision=PRECISION)
        # n is not below 0; but so the products are waited for before tiles to come are read into
        # the place of theirs (Triton 3.6 has one place too few for tiles that are also read into
        # registers, as those of states are above).
        written = tl.where(n < 0, 0.0, written)
        written = tl.dot(v_rows, d_state, written, input_precision=PRECISION)

    dims = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    factor = tl.load(decay + here.to(tl.int64) * K_PAD + dims)
    factor_2 = tl.load(decay + there.to(tl.int64) * K_PAD + dims)
    factor_2 = tl.where(has_both, factor_2, 1.0)
    channel = tl.arange(0, BLOCK_K)
    both = tl.sum(tl.where(channel[:, None] == channel[None, :], products, 0.0), 0)
    # Rows beyond the chunks are those of other spans.
    real = (tl.arange(0, 2 * C) < n)[:, None]
    read, read_2 = halves(tl.where(real, read, 0.0))
    written, written_2 = halves(tl.where(real, written, 0.0))
    # What the chunks of a couple give each other. The square is 0 where there is but one.
    keys_1 = keys.load([here * C, tile * BLOCK_K])
    queries_2 = queries.load([there * C, tile * BLOCK_K])
    passing_2 = factor_2 * (factor * both + tl.sum(keys_1.to(tl.float32) * written, 0))
    passing = factor * (factor_2 * both + tl.sum(queries_2.to(tl.float32) * read_2, 0))
    if has_both:
        read_2 = tl.dot(
            d_across.load([there * C, 0]), keys_1, read_2 * factor[None, :],
            input_precision=PRECISION,
        )  # fmt: skip
        if tl.load(steep + there) == 0:
            _rows_gradient(
                q, k, g, dq, dk, dg, read_2, written_2, passing_2,
                d_pairs, d_rest, lower, d_own, chunk_ends, there, first + C, n - C, dims, head,
                scale, tau, q_stride, k_stride, g_stride,
                N_HEADS, K, K_PAD, C, FROM_LOGITS, PRECISION, PARTS,
            )  # fmt: skip
    if tl.load(steep + here) == 0:
        written = tl.dot(
            tl.trans(d_across.load([there * C, 0])), queries_2, written * factor_2[None, :],
            input_precision=PRECISION,
        )  # fmt: skip
        _rows_gradient(
            q, k, g, dq, dk, dg, read, written, passing,
            d_pairs, d_rest, lower, d_own, chunk_ends, here, first, n, dims, head,
            scale, tau, q_stride, k_stride, g_stride,
            N_HEADS, K, K_PAD, C, FROM_LOGITS, PRECISION, PARTS,
        )  # fmt: skip


@triton.jit
def _rows_gradient(
    q, k, g, dq, dk, dg, read, d_written, passing, d_pairs, d_rest, lower, d_own, chunk_ends,
    place, first, n, dims, head, scale, tau, q_stride, k_stride, g_stride,
    N_HEADS: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, C: tl.constexpr,
    FROM_LOGITS: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One mild chunk, of which ``dO S^T``, ``V dS^T`` and ``exp(gn) rowsum(S dS)`` are known."""
    at = tl.arange(0, C)
    row, real = first + at, at < n
    # Each tile is read as late as it can be: few of them fit the registers at once.
    gates = load_gates(g, row, real, dims, head, g_stride, tau, K, FROM_LOGITS)
    ones = lower.load([0, 0])
    sums = running(gates, ones, False, PARTS)
    at_ends = chunk_ends + place.to(tl.int64) * (2 * K_PAD) + dims
    last = tl.load(at_ends + K_PAD)
    middle = (tl.load(at_ends) + last) * 0.5
    # The chunk is mild: no factor leaves the range of a float, nor do their products.
    down, up = tl.exp2(sums - middle[None, :]), tl.exp2(middle[None, :] - sums)
    k_rows = load_rows(k, row, real, dims, head, k_stride, K).to(tl.float32)
    d_written = d_written * (up * tl.exp2(last - middle)[None, :])
    carry = passing + tl.sum(k_rows * d_written, 0)
    weights, rest = d_pairs.load([place * C, 0]), d_rest.load([place * C, 0])
    from_keys = _weighed(weights, rest, k_rows * up, PRECISION)
    own = tl.load(d_own + place.to(tl.int64) * C + at)[:, None] * scale
    dq_rows = (read * tl.exp2(middle)[None, :] + from_keys) * down * scale
    store_rows(dq, dq_rows + own * k_rows, row, real, dims, head, N_HEADS * K, K)
    q_rows = load_rows(q, row, real, dims, head, q_stride, K).to(tl.float32)
    both_rows = q_rows * dq_rows
    from_queries = _weighed(tl.trans(weights), tl.trans(rest), q_rows * down * scale, PRECISION)
    dk_rows = d_written + from_queries * up
    store_rows(dk, dk_rows + own * q_rows, row, real, dims, head, N_HEADS * K, K)
    both_rows -= k_rows * dk_rows
    dg_rows = running(both_rows, ones, True, min(PARTS, 2)) + carry[None, :]
    _store_gates(dg, g, dg_rows, row, real, dims, head, g_stride, tau, N_HEADS, K, FROM_LOGITS)


@triton.jit
def _steep_gradient_kernel(
    q, k, g, v, dz, dq, dk, dg, kept, d_kept, d_pairs, d_rest, d_own, steep, chunks,
    scale, tau, q_stride, k_stride, g_stride, v_stride, dz_stride,
    N_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, V_PAD: tl.constexpr,
    C: tl.constexpr, SUB_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FROM_LOGITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Flagged chunks. Grid (N_HEADS, slots): most programs only find that theirs is not."""
    head, slot = tl.program_id(0), tl.program_id(1)
    n = tl.load(chunks + 3 * slot + 1)
    if n == 0:
        return
    place = (slot * N_HEADS + head).to(tl.int64)
    if tl.load(steep + place) == 0:
        return
    for tile in range(tl.cdiv(K, BLOCK_K)):
        _steep_gradient(
            q, k, g, v, dz, dq, dk, dg, kept, d_kept, d_pairs, d_rest, d_own, chunks, place, n,
            head, slot, tile, scale, tau, q_stride, k_stride, g_stride, v_stride, dz_stride,
            N_HEADS, K, V, V_PAD, C, SUB_ROWS, BLOCK_K, BLOCK_V, FROM_LOGITS, PRECISION,
        )  # fmt: skip


@triton.jit
def _steep_gradient(
    q, k, g, v, dz, dq, dk, dg, kept, d_kept, d_pairs, d_rest, d_own, chunks, place, n, head,
    slot, tile, scale, tau, q_stride, k_stride, g_stride, v_stride, dz_stride,
    N_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, V_PAD: tl.constexpr,
    C: tl.constexpr, SUB_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FROM_LOGITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some channels of a flagged chunk, sub-chunk by sub-chunk from the last."""
    at, sub = tl.arange(0, C), tl.arange(0, SUB_ROWS)
    first = tl.load(chunks + 3 * slot)
    dims = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    square, rest = d_pairs + place * (C * C), d_rest + place * (C * C)
    gates = load_gates(g, first + at, at < n, dims, head, g_stride, tau, K, FROM_LOGITS)
    _, d_written, both = _read_states(
        dz, v, kept, d_kept, place, first + at, at < n, head, tile, dz_stride, v_stride,
        V, V_PAD, C, BLOCK_K, BLOCK_V, PRECISION,
    )  # fmt: skip
    k_chunk = load_rows(k, first + at, at < n, dims, head, k_stride, K).to(tl.float32)
    sums, last, _, _ = anchored(gates)
    # What keys give to the state leaving the chunk: a gate concerns those of the rows before it.
    given = k_chunk * d_written * tl.exp2(last[None, :] - sums)
    passing = tl.exp2(last) * both
    carry = tl.zeros([BLOCK_K], tl.float32)

    parts: tl.constexpr = C // SUB_ROWS
    for back in range(parts):
        part = parts - 1 - back
        begin = part * SUB_ROWS
        i = begin + sub
        real = i < n
        q_rows = load_rows(q, first + i, real, dims, head, q_stride, K).to(tl.float32)
        k_rows = load_rows(k, first + i, real, dims, head, k_stride, K).to(tl.float32)
        inside = tl.cumsum(_gates_of(g, first, begin, begin, n, dims, head, g_stride, tau,
                                     K, SUB_ROWS, FROM_LOGITS), 0)  # fmt: skip
        to_end = _to_end(g, first, begin, n, dims, head, g_stride, tau, K, SUB_ROWS, FROM_LOGITS)
        before = tl.sum(tl.where((at < begin)[:, None], gates, 0.0), 0)
        after = tl.sum(tl.where((at >= begin + SUB_ROWS)[:, None], gates, 0.0), 0)
        read, written, _ = _read_states(
            dz, v, kept, d_kept, place, first + i, real, head, tile, dz_stride, v_stride,
            V, V_PAD, SUB_ROWS, BLOCK_K, BLOCK_V, PRECISION,
        )  # fmt: skip
        dq_rows = read * tl.exp2(inside + before[None, :])
        from_state = written * tl.exp2(to_end + after[None, :])

        # Earlier sub-chunks, as seen by these queries; later ones, as they see these keys.
        from_keys = tl.zeros([SUB_ROWS, BLOCK_K], tl.float32)
        from_queries = tl.zeros([SUB_ROWS, BLOCK_K], tl.float32)
        for other in range(parts):
            start = other * SUB_ROWS
            j = start + sub
            if other < part:
                between = (at >= start + SUB_ROWS) & (at < begin)
                between_sum = tl.sum(tl.where(between[:, None], gates, 0.0), 0)
                up = _to_end(
                    g, first, start, n, dims, head, g_stride, tau, K, SUB_ROWS, FROM_LOGITS
                )
                keys = load_rows(k, first + j, j < n, dims, head, k_stride, K).to(tl.float32)
                weights = _both(square, rest, i[:, None] * C + j[None, :])
                keys = keys * tl.exp2(up + between_sum[None, :])
                from_keys = tl.dot(weights, keys, from_keys, input_precision=PRECISION)
            if other > part:
                between = (at >= begin + SUB_ROWS) & (at < start)
                between_sum = tl.sum(tl.where(between[:, None], gates, 0.0), 0)
                down = tl.cumsum(_gates_of(g, first, start, start, n, dims, head, g_stride, tau,
                                           K, SUB_ROWS, FROM_LOGITS), 0)  # fmt: skip
                queries = load_rows(q, first + j, j < n, dims, head, q_stride, K).to(tl.float32)
                weights = _both(square, rest, j[None, :] * C + i[:, None])
                queries = queries * tl.exp2(down + between_sum[None, :]) * scale
                from_queries = tl.dot(weights, queries, from_queries, input_precision=PRECISION)
        dq_rows += from_keys * tl.exp2(inside)
        dk_rows = from_queries * tl.exp2(to_end)

        for column in range(SUB_ROWS):
            since = tl.cumsum(_gates_of(g, first, begin, begin + column + 1, n, dims, head,
                                        g_stride, tau, K, SUB_ROWS, FROM_LOGITS), 0)  # fmt: skip
            factor = tl.where((sub > column)[:, None], tl.exp2(since), 0.0)
            weight = _both(square, rest, i * C + begin + column)
            key = tl.sum(tl.where((sub == column)[:, None], k_rows, 0.0), 0)
            dq_rows += weight[:, None] * factor * key[None, :]
            query_sum = tl.sum(weight[:, None] * factor * q_rows, 0) * scale
            dk_rows += tl.where((sub == column)[:, None], query_sum[None, :], 0.0)

        dq_rows = dq_rows * scale
        pairs_rows = q_rows * dq_rows - k_rows * dk_rows
        dk_rows += from_state
        own = tl.load(d_own + place * C + i)[:, None] * scale
        store_rows(dq, dq_rows + own * k_rows, first + i, real, dims, head, N_HEADS * K, K)
        store_rows(dk, dk_rows + own * q_rows, first + i, real, dims, head, N_HEADS * K, K)
        earlier = tl.sum(tl.where((at < begin)[:, None], given, 0.0), 0)
        later = (sub[None, :] < sub[:, None])[:, :, None]
        given_rows = tl.sum(tl.where(later, (k_rows * from_state)[None, :, :], 0.0), 1)
        dg_rows = tl.cumsum(pairs_rows, 0, reverse=True) + given_rows
        dg_rows += (carry + passing + earlier)[None, :]
        _store_gates(
            dg, g, dg_rows, first + i, real, dims, head, g_stride, tau, N_HEADS, K, FROM_LOGITS
        )
        carry += tl.sum(pairs_rows, 0)


@triton.jit
def _both(square, rest, at):
    return tl.load(square + at).to(tl.float32) + tl.load(rest + at).to(tl.float32)


@triton.jit
def _gates_of(
    g, first, begin, low, n, dims, head, stride, tau,
    K: tl.constexpr, SUB_ROWS: tl.constexpr, FROM_LOGITS: tl.constexpr,
):  # fmt: skip
    """Log gates of the sub-chunk from row ``begin`` of the chunk; 0 before row ``low``."""
    i = begin + tl.arange(0, SUB_ROWS)
    there = (i >= low) & (i < n)
    return load_gates(g, first + i, there, dims, head, stride, tau, K, FROM_LOGITS)


@triton.jit
def _to_end(
    g, first, begin, n, dims, head, stride, tau,
    K: tl.constexpr, SUB_ROWS: tl.constexpr, FROM_LOGITS: tl.constexpr,
):  # fmt: skip
    """Sums of the log gates after each row of a sub-chunk, up to its end."""
    sub = tl.arange(0, SUB_ROWS)
    later = begin + sub + 1
    there = (sub + 1 < SUB_ROWS) & (later < n)
    gates = load_gates(g, first + later, there, dims, head, stride, tau, K, FROM_LOGITS)
    return tl.cumsum(gates, 0, reverse=True)


def gradient(
    room: Room,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    dz: torch.Tensor,
    within: Within,
    kept: torch.Tensor,
    d_kept: torch.Tensor,
    chunks: Chunks,
    *,
    scale: float,
    tau: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dg, contiguous, in the dtypes of q, k and g.

    v, dz: ``aligned``.
    kept, d_kept: [slots, H, V padded, K padded], the states entering chunks and their gradients at
        their ends, as ``stream`` gives them; the rest as in ``within_chunks``.
    """
    assert within.d_pairs is not None
    n_heads, channels = q.shape[1:]
    k_pad, wide = padded(channels), kept.dtype == torch.float32
    tile = gradient_tile(k_pad, v.shape[2], wide=wide)
    dq, dk, dg = (room.result(t.shape, t.dtype) for t in (q, k, g))
    below, rest, own, across = within.d_pairs
    sizes = {
        "N_HEADS": n_heads,
        "K": channels,
        "V": v.shape[2],
        "V_PAD": kept.shape[2],
        "C": CHUNK,
        "FROM_LOGITS": tau is not None,
        "PRECISION": "tf32x3" if wide else "tf32",
    }
    divisor = 1.0 if tau is None else tau
    room.launch(
        _gradient_kernel, (ceil_div(k_pad, tile.k), n_heads, chunks.n_couples),
        q, k, g, *(_row_tiles(t, tile.v) for t in (v, dz)), dq, dk, dg,
        *(_tiles(t, tile.v, tile.k) for t in (kept, d_kept)),
        *(_tiles(t, CHUNK, tile.k) for t in (within.queries, within.keys)),
        *(_tiles(t, CHUNK, CHUNK) for t in (below, rest, across, chunks.ones)),
        own, within.decay, within.ends, within.steep, chunks.couples, scale, divisor,
        q.stride(0), k.stride(0), g.stride(0),
        K_PAD=k_pad, BLOCK_K=tile.k, BLOCK_V=tile.v, PARTS=0 if wide else 3,
        warps=tile.warps, stages=tile.stages, **sizes,
    )  # fmt: skip
    block, block_v = min(32, k_pad), min(32, tile.v)
    room.launch(
        _steep_gradient_kernel, (n_heads, chunks.n_chunks),
        q, k, g, v, dz, dq, dk, dg, *(_tiles(t, block_v, block) for t in (kept, d_kept)),
        below, rest, own, within.steep, chunks.chunks, scale, divisor,
        q.stride(0), k.stride(0), g.stride(0), v.stride(0), dz.stride(0),
        SUB_ROWS=SUB, BLOCK_K=block, BLOCK_V=block_v, warps=4, stages=1, **sizes,
    )  # fmt: skip
    return dq, dk, dg


def _tiles(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [rows, columns])


def _row_tiles(x: torch.Tensor, width: int) -> TensorDescriptor:
    """Tiles of a couple's rows and ``width`` channels of x [T, H, V]; zeros beyond the last row."""
    size = [x.shape[0], x.shape[1] * x.shape[2]]
    return TensorDescriptor(x, size, [x.stride(0), 1], [COUPLE, width])
