"""The gradient of values, of all couples of chunks at once, from kept gradients of states.

With dS leaving the second chunk of a couple (see ``states``), d its decay exp(gn), and P the
weights within each chunk::

    dv_2 = Kg_2 dS + P_2^T dO_2          dv_1 = (d Kg_1) dS + (Kg_1 Qg_2^T) dO_2 + P_1^T dO_1
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from invivo.kernels.rounding import ceil_div
from invivo.kernels.triton_gla.loads import load_rows, store_rows
from invivo.kernels.triton_gla.pairs import Within
from invivo.kernels.triton_gla.tables import CHUNK, Chunks, value_tile
from invivo.kernels.triton_replay import Room


@triton.jit
def _values_kernel(
    dz, queries, keys, pairs, decay, d_kept, couples, dv, dz_stride,
    N_HEADS: tl.constexpr, K_PAD: tl.constexpr, V: tl.constexpr, V_PAD: tl.constexpr,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of V, N_HEADS, couples). A chunk that is alone is its couple's last."""
    tile, head, couple = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(couples + 3 * couple + 1)
    if n == 0:
        return
    first, slot = tl.load(couples + 3 * couple), tl.load(couples + 3 * couple + 2)
    has_both = n > C
    # Of a lone chunk, all of a first one is computed from itself, and not stored.
    before, last = slot * N_HEADS + head, (slot + has_both.to(tl.int32)) * N_HEADS + head
    kind = d_kept.dtype
    at = tl.arange(0, C)
    dv_last = tl.zeros([C, BLOCK_V], tl.float32)
    dv_before = tl.zeros([C, BLOCK_V], tl.float32)
    across = tl.zeros([C, C], tl.float32)
    for begin in range(0, K_PAD, BLOCK_K):
        d_state = tl.trans(d_kept.load([last * V_PAD + tile * BLOCK_V, begin]))
        last_keys, last_queries = keys.load([last * C, begin]), queries.load([last * C, begin])
        keys_before = keys.load([before * C, begin])
        factor = tl.load(decay + last.to(tl.int64) * K_PAD + begin + tl.arange(0, BLOCK_K))
        decayed = (keys_before.to(tl.float32) * factor[None, :]).to(kind)
        dv_before = tl.dot(decayed, d_state, dv_before, input_precision=PRECISION)
        dv_last = tl.dot(last_keys, d_state, dv_last, input_precision=PRECISION)
        # Waited for, as in the gradient's kernel: n is not below 0.
        across = tl.where(n < 0, 0.0, across)
        across = tl.dot(keys_before, tl.trans(last_queries), across, input_precision=PRECISION)

    values = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    row = has_both.to(tl.int32) * C + at
    dz_rows = load_rows(dz, first + row, row < n, values, head, dz_stride, V).to(kind)
    weights = tl.trans(pairs.load([last * C, 0]))
    dv_last = tl.dot(weights, dz_rows, dv_last, input_precision=PRECISION)
    store_rows(dv, dv_last, first + row, row < n, values, head, N_HEADS * V, V)
    if has_both:
        dv_before = tl.dot(across.to(kind), dz_rows, dv_before, input_precision=PRECISION)
        dz_rows = load_rows(dz, first + at, at < n, values, head, dz_stride, V).to(kind)
        weights = tl.trans(pairs.load([before * C, 0]))
        dv_before = tl.dot(weights, dz_rows, dv_before, input_precision=PRECISION)
        store_rows(dv, dv_before, first + at, at < n, values, head, N_HEADS * V, V)


def value_gradient(
    room: Room,
    dz: torch.Tensor,
    within: Within,
    d_kept: torch.Tensor,
    chunks: Chunks,
    dv: torch.Tensor,
) -> None:
    """Writes ``dv`` [T, H, V], contiguous; dz [T, H, V] by rows, d_kept from ``keep_states``."""
    n_heads, width = dz.shape[1:]
    k_pad, v_pad, wide = d_kept.shape[3], d_kept.shape[2], d_kept.dtype == torch.float32
    tile = value_tile(k_pad, width, wide=wide)
    room.launch(
        _values_kernel, (ceil_div(width, tile.v), n_heads, chunks.n_couples),
        dz, *(_tiles(t, CHUNK, tile.k) for t in (within.queries, within.keys)),
        _tiles(within.pairs, CHUNK, CHUNK), within.decay, _tiles(d_kept, tile.v, tile.k),
        chunks.couples, dv, dz.stride(0),
        N_HEADS=n_heads, K_PAD=k_pad, V=width, V_PAD=v_pad, C=CHUNK, BLOCK_K=tile.k,
        BLOCK_V=tile.v, PRECISION="tf32x3" if wide else "tf32",
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _tiles(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [rows, columns])
