"""What the gradient of queries and keys takes from states, of all couples: ``dO S^T``, ``V dS^T``.

With S entering the first chunk of a couple and dS leaving the second (see ``states``), for all
rows of both. Written as they are, without decays, which ``gradient`` knows row by row; in one
kernel with what it does they would be read again for every few channels of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from invivo.kernels.rounding import ceil_div
from invivo.kernels.triton_gla.pairs import Within
from invivo.kernels.triton_gla.tables import CHUNK, COUPLE, Chunks, read_tile
from invivo.kernels.triton_replay import Room


class Reads(NamedTuple):
    """Of N slots of chunks, K padded, float32.

    Attributes:
        rows: [2, N, H, C, K] ``dO S^T`` and ``V dS^T``.
        passing: [N, H, K] exp(gn) rowsum(S dS), of the states that enter and leave the chunk.
    """

    rows: torch.Tensor
    passing: torch.Tensor


@triton.jit(do_not_specialize=["n_slots"])
def _reads_kernel(
    dz_tiles, v_tiles, kept, d_kept, queries, keys, decay, couples, rows, passing, n_slots,
    N_HEADS: tl.constexpr, K_PAD: tl.constexpr, V: tl.constexpr, V_PAD: tl.constexpr,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of K, N_HEADS, couples)."""
    tile, head, couple = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(couples + 3 * couple + 1)
    if n == 0:
        return
    first, slot = tl.load(couples + 3 * couple), tl.load(couples + 3 * couple + 2)
    has_both = n > C
    here, there = slot * N_HEADS + head, (slot + has_both.to(tl.int32)) * N_HEADS + head
    kind = kept.dtype
    read = tl.zeros([2 * C, BLOCK_K], tl.float32)
    written = tl.zeros([2 * C, BLOCK_K], tl.float32)
    products = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    for begin in range(0, V, BLOCK_V):
        state = kept.load([here * V_PAD + begin, tile * BLOCK_K])
        d_state = d_kept.load([there * V_PAD + begin, tile * BLOCK_K])
        dz_rows = dz_tiles.load([first, head * V + begin]).to(kind)
        v_rows = v_tiles.load([first, head * V + begin]).to(kind)
        read = tl.dot(dz_rows, state, read, input_precision=PRECISION)
        # n is not below 0; but so the products are waited for before tiles to come are read into
        # the place of theirs (Triton 3.6 has one place too few for tiles that are also read into
        # registers, as those of states are).
        written = tl.where(n < 0, 0.0, written)
        written = tl.dot(v_rows, d_state, written, input_precision=PRECISION)
        products += state.to(tl.float32) * d_state.to(tl.float32)

    at = tl.arange(0, 2 * C)
    dims = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    # Rows beyond the chunks are those of other spans.
    real = (at < n)[:, None]
    read, written = tl.where(real, read, 0.0), tl.where(real, written, 0.0)
    place = ((slot + at // C) * N_HEADS + head).to(tl.int64) * C + at % C
    to = place[:, None] * K_PAD + dims[None, :]
    tl.store(rows + to, read, mask=real)
    tl.store(rows + n_slots.to(tl.int64) * (N_HEADS * C * K_PAD) + to, written, mask=real)

    # What passes the first chunk comes to the second's end, and what passes the second comes from
    # the first's beginning: the other chunk's share is added.
    first_rows, second_rows = real & (at < C)[:, None], real & (at >= C)[:, None]
    key_rows = tl.load(keys + to, mask=first_rows, other=0.0).to(tl.float32)
    query_rows = tl.load(queries + to, mask=second_rows, other=0.0).to(tl.float32)
    both = tl.sum(products, 0)
    factor = tl.load(decay + here.to(tl.int64) * K_PAD + dims)
    factor_2 = tl.load(decay + there.to(tl.int64) * K_PAD + dims)
    passing_2 = factor_2 * (factor * both + tl.sum(key_rows * written, 0))
    factor_2 = tl.where(has_both, factor_2, 1.0)
    passing_1 = factor * (factor_2 * both + tl.sum(query_rows * read, 0))
    tl.store(passing + there.to(tl.int64) * K_PAD + dims, passing_2, mask=has_both & (dims >= 0))
    tl.store(passing + here.to(tl.int64) * K_PAD + dims, passing_1)


def reads(
    room: Room,
    v: torch.Tensor,
    dz: torch.Tensor,
    within: Within,
    kept: torch.Tensor,
    d_kept: torch.Tensor,
    chunks: Chunks,
) -> Reads:
    """v, dz [T, H, V]: ``aligned``; kept, d_kept: as ``keep_states`` gives them."""
    n_heads, width = v.shape[1:]
    v_pad, k_pad = kept.shape[2:]
    wide = kept.dtype == torch.float32
    tile = read_tile(k_pad, width, wide=wide)
    size = (chunks.n_chunks, n_heads)
    found = Reads(
        room.scratch(2, *size, CHUNK, k_pad, dtype=torch.float32),
        room.scratch(*size, k_pad, dtype=torch.float32),
    )
    states = (
        TensorDescriptor.from_tensor(t.view(-1, k_pad), [tile.v, tile.k]) for t in (kept, d_kept)
    )
    room.launch(
        _reads_kernel, (ceil_div(k_pad, tile.k), n_heads, chunks.n_couples),
        *(_row_tiles(t, tile.v) for t in (dz, v)), *states, within.queries, within.keys,
        within.decay, chunks.couples, *found, chunks.n_chunks,
        N_HEADS=n_heads, K_PAD=k_pad, V=width, V_PAD=v_pad, C=CHUNK, BLOCK_K=tile.k,
        BLOCK_V=tile.v, PRECISION="tf32x3" if wide else "tf32",
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return found


def _row_tiles(x: torch.Tensor, width: int) -> TensorDescriptor:
    """Tiles of a couple's rows and ``width`` channels of x [T, H, V]; zeros beyond the last row."""
    size = [x.shape[0], x.shape[1] * x.shape[2]]
    return TensorDescriptor(x, size, [x.stride(0), 1], [COUPLE, width])
