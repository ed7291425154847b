"""The launches of one forward and one backward pass over packed rows; nothing of autograd here.

Nothing is kept between the two but the inputs: the backward makes weights and states again (Yang
et al., 2023, arXiv 2312.06635, section 4.3).
"""

from __future__ import annotations

import torch
import triton

from invivo.kernels.triton_gla.gradient import gradient
from invivo.kernels.triton_gla.loads import by_rows
from invivo.kernels.triton_gla.pairs import within_chunks
from invivo.kernels.triton_gla.stream import stream
from invivo.kernels.triton_gla.tables import (
    WANTED,
    WANTED_WIDE,
    WIDE_VALUES,
    Chunks,
    lay_out,
    padded,
    segment_rows_for,
    stream_tile,
)


def forward_pass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    span_start: torch.Tensor,
    initial_state: torch.Tensor | None,
    scale: float,
    tau: float | None,
    want_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [T, H, V], and final states [S, H, K, V] float32 (empty where not wanted)."""
    q, k, v, g = by_rows(q), by_rows(k), by_rows(v), by_rows(g)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    end = state_like(q, v, span_start) if want_state else None
    start = None if initial_state is None else initial_state.float().contiguous()
    chunks = _lay_out(q, v, span_start)
    within = within_chunks(q, k, v, g, chunks, scale=scale, tau=tau, kind=_product_kind(q))
    stream(v, within, chunks, span_start, q.shape[2], start=start, end=end, out=out)
    return out, out.new_empty(0, dtype=torch.float32) if end is None else end


def backward_pass(
    dz: torch.Tensor,
    d_final: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    span_start: torch.Tensor,
    initial_state: torch.Tensor | None,
    scale: float,
    tau: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, g and (empty where there is none) the initial state.

    Temporary memory: states of all chunks and their gradients, ``T / 16 * H * K * V`` bytes in
    bfloat16.
    """
    dz, q, k, v, g = by_rows(dz), by_rows(q), by_rows(k), by_rows(v), by_rows(g)
    kind, channels = _product_kind(q), q.shape[2]
    chunks = _lay_out(q, v, span_start)
    start = None if initial_state is None else initial_state.float().contiguous()
    d_end = None if d_final is None else d_final.float().contiguous()
    d_start = None if initial_state is None else state_like(q, v, span_start)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    within = within_chunks(q, k, v, g, chunks, scale=scale, tau=tau, kind=kind, dz=dz)
    kept = stream(v, within, chunks, span_start, channels, start=start, keep=True)
    d_kept = stream(
        dz, within, chunks, span_start, channels,
        reverse=True, start=d_end, end=d_start, keep=True, out=dv,
    )  # fmt: skip
    dq, dk, dg = gradient(q, k, v, g, dz, within, kept, d_kept, chunks, scale=scale, tau=tau)
    return dq, dk, dv, dg, q.new_empty(0, dtype=torch.float32) if d_start is None else d_start


def state_like(q: torch.Tensor, v: torch.Tensor, span_start: torch.Tensor) -> torch.Tensor:
    """An empty state for every span."""
    size = (span_start.shape[0] - 1, q.shape[1], q.shape[2], v.shape[2])
    return torch.empty(size, dtype=torch.float32, device=q.device)


def _product_kind(q: torch.Tensor) -> torch.dtype:
    # float16 cannot hold the factors of the anchored product; the interpreter, which stands in for
    # a GPU on a CPU, cannot multiply bfloat16.
    plain = q.dtype == torch.float32 or q.device.type == "cpu"
    return torch.float32 if plain else torch.bfloat16


def _lay_out(q: torch.Tensor, v: torch.Tensor, span_start: torch.Tensor) -> Chunks:
    n_spans, n_heads, width = span_start.shape[0] - 1, q.shape[1], v.shape[2]
    wide = _product_kind(q) == torch.float32
    tile = stream_tile(padded(q.shape[2]), width, wide=wide, tracks=n_spans * n_heads)
    programs = n_heads * triton.cdiv(width, tile.v)
    wanted = WANTED_WIDE if tile.v == WIDE_VALUES else WANTED
    rows = segment_rows_for(q.shape[0], n_spans, programs, wanted)
    return lay_out(span_start, q.shape[0], rows)
