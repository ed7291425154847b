"""Outputs, or backwards the gradient of values, of all couples of chunks at once, from kept states.

With S entering the first chunk and dS leaving the second (see ``states``), f and b the decays
exp(gn) of the first and the second, P the weights within each chunk::

    o_1  = Qg_1 S + P_1 v_1              o_2  = (f Qg_2) S + (Qg_2 Kg_1^T) v_1 + P_2 v_2
    dv_2 = Kg_2 dS + P_2^T dO_2          dv_1 = (b Kg_1) dS + (Kg_1 Qg_2^T) dO_2 + P_1^T dO_1

Both are the same with *near* for the chunk that the state touches and *far* for the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from invivo.kernels.rounding import ceil_div
from invivo.kernels.triton_gla.loads import load_rows, store_rows
from invivo.kernels.triton_gla.pairs import Within
from invivo.kernels.triton_gla.tables import CHUNK, Chunks, output_tile
from invivo.kernels.triton_replay import Room


@triton.jit
def _outputs_kernel(
    x, readers, writers, pairs, decay, kept, couples, out, x_stride,
    N_HEADS: tl.constexpr, K_PAD: tl.constexpr, V: tl.constexpr, V_PAD: tl.constexpr,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of V, N_HEADS, couples)."""
    tile, head, couple = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(couples + 3 * couple + 1)
    if n == 0:
        return
    first, slot = tl.load(couples + 3 * couple), tl.load(couples + 3 * couple + 2)
    both = n > C
    near_part, far_part = 0, 1
    if REVERSE:
        near_part, far_part = both.to(tl.int32), 0
    # Of a lone chunk, all of the far one is computed from the near one, and not stored.
    near = (slot + near_part) * N_HEADS + head
    far = (slot + tl.where(both, far_part, 0)) * N_HEADS + head
    kind = kept.dtype
    at = tl.arange(0, C)
    read = tl.zeros([C, BLOCK_V], tl.float32)
    far_read = tl.zeros([C, BLOCK_V], tl.float32)
    across = tl.zeros([C, C], tl.float32)
    for begin in range(0, K_PAD, BLOCK_K):
        state = tl.trans(kept.load([near * V_PAD + tile * BLOCK_V, begin]))
        near_rows = readers.load([near * C, begin])
        far_rows = readers.load([far * C, begin])
        between = writers.load([near * C, begin])
        factor = tl.load(decay + near.to(tl.int64) * K_PAD + begin + tl.arange(0, BLOCK_K))
        decayed = (far_rows.to(tl.float32) * factor[None, :]).to(kind)
        far_read = tl.dot(decayed, state, far_read, input_precision=PRECISION)
        read = tl.dot(near_rows, state, read, input_precision=PRECISION)
        # Waited for, as in the gradient's kernel: n is not below 0.
        across = tl.where(n < 0, 0.0, across)
        across = tl.dot(far_rows, tl.trans(between), across, input_precision=PRECISION)

    values = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    row = near_part * C + at
    x_rows = load_rows(x, first + row, row < n, values, head, x_stride, V).to(kind)
    weights = pairs.load([near * C, 0])
    if REVERSE:
        weights = tl.trans(weights)
    read = tl.dot(weights, x_rows, read, input_precision=PRECISION)
    store_rows(out, read, first + row, row < n, values, head, N_HEADS * V, V)
    if both:
        far_read = tl.dot(across.to(kind), x_rows, far_read, input_precision=PRECISION)
        row = far_part * C + at
        x_rows = load_rows(x, first + row, row < n, values, head, x_stride, V).to(kind)
        weights = pairs.load([far * C, 0])
        if REVERSE:
            weights = tl.trans(weights)
        far_read = tl.dot(weights, x_rows, far_read, input_precision=PRECISION)
        store_rows(out, far_read, first + row, row < n, values, head, N_HEADS * V, V)


def outputs(
    room: Room,
    x: torch.Tensor,
    within: Within,
    kept: torch.Tensor,
    chunks: Chunks,
    out: torch.Tensor,
    *,
    reverse: bool = False,
) -> None:
    """Writes ``out`` [T, H, V]; x and kept as in (or from) ``keep_states``."""
    n_heads, width = x.shape[1:]
    k_pad, v_pad, wide = kept.shape[3], kept.shape[2], kept.dtype == torch.float32
    tile = output_tile(k_pad, width, wide=wide)
    readers, writers = within.queries, within.keys
    if reverse:
        readers, writers = writers, readers
    room.launch(
        _outputs_kernel, (ceil_div(width, tile.v), n_heads, chunks.n_couples),
        x, *(_tiles(t, CHUNK, tile.k) for t in (readers, writers)),
        _tiles(within.pairs, CHUNK, CHUNK), within.decay, _tiles(kept, tile.v, tile.k),
        chunks.couples, out, x.stride(0),
        N_HEADS=n_heads, K_PAD=k_pad, V=width, V_PAD=v_pad, C=CHUNK, BLOCK_K=tile.k,
        BLOCK_V=tile.v, REVERSE=reverse, PRECISION="tf32x3" if wide else "tf32",
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _tiles(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [rows, columns])
