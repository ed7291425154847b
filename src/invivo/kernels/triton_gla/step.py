"""One token of each of many sequences, their states moving on in place; for decode graphs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from invivo.kernels.rounding import ceil_div
from invivo.kernels.triton_gla.loads import by_rows, log2_gates
from invivo.kernels.triton_gla.tables import padded, step_tile


@triton.jit
def _step_kernel(
    q, k, v, g, state, slots, out, scale, tau, q_stride, k_stride, v_stride, g_stride,
    N_HEADS: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, FROM_LOGITS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of V, N_HEADS, rows)."""
    values = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channels = tl.arange(0, K_PAD)
    there, real = channels < K, values < V
    slot = tl.load(slots + row).to(tl.int64)
    at = head * K + channels
    query = tl.load(q + row * q_stride + at, mask=there, other=0.0).to(tl.float32) * scale
    key = tl.load(k + row * k_stride + at, mask=there, other=0.0).to(tl.float32)
    gate = log2_gates(tl.load(g + row * g_stride + at, mask=there, other=0.0), tau, FROM_LOGITS)
    value = tl.load(v + row * v_stride + head * V + values, mask=real, other=0.0).to(tl.float32)
    place = state + (slot * N_HEADS + head) * (K * V) + channels[:, None] * V + values[None, :]
    mask = there[:, None] & real[None, :]
    moved = tl.load(place, mask=mask, other=0.0) * tl.exp2(gate)[:, None]
    moved += key[:, None] * value[None, :]
    tl.store(place, moved, mask=mask)
    read = tl.sum(moved * query[:, None], 0)
    to = out + (row * N_HEADS + head) * V + values
    tl.store(to, read.to(out.dtype.element_ty), mask=real)


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    *,
    scale: float,
    tau: float | None = None,
) -> torch.Tensor:
    """``gla_step`` on a GPU: [B, H, V]; ``state`` [n_slots, H, K, V] float32 moves on at ``slots``.

    Rows of slot 0 race for it: what they give means nothing. tau: ``g`` are logits.
    """
    assert state.is_contiguous(), "states move on in place"
    q, k, v, g = by_rows(q), by_rows(k), by_rows(v), by_rows(g)
    n_rows, n_heads, channels = q.shape
    width = v.shape[2]
    out = torch.empty((n_rows, n_heads, width), dtype=v.dtype, device=v.device)
    if n_rows == 0:
        return out
    tile = step_tile(padded(channels), width)
    _step_kernel[(ceil_div(width, tile.v), n_heads, n_rows)](
        q, k, v, g, state, slots, out, scale, 1.0 if tau is None else tau,
        q.stride(0), k.stride(0), v.stride(0), g.stride(0),
        N_HEADS=n_heads, K=channels, K_PAD=padded(channels), V=width, BLOCK_V=tile.v,
        FROM_LOGITS=tau is not None, num_warps=tile.warps,
    )  # fmt: skip
    return out
