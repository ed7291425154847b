"""The launches of one forward and one backward pass over packed rows; nothing of autograd here.

Nothing is kept between the two but the inputs: the backward makes weights and states again (Yang
et al., 2023, arXiv 2312.06635, section 4.3).
"""

from __future__ import annotations

from typing import cast

import torch

from invivo.kernels.rounding import ceil_div
from invivo.kernels.triton_gla.gradient import gradient
from invivo.kernels.triton_gla.loads import aligned, by_rows
from invivo.kernels.triton_gla.pairs import within_chunks
from invivo.kernels.triton_gla.states import Way, keep_states
from invivo.kernels.triton_gla.stream import stream
from invivo.kernels.triton_gla.tables import Chunks, lay_out, padded, segment_rows_for
from invivo.kernels.triton_gla.values import value_gradient
from invivo.kernels.triton_replay import Room, Tensors, run

SMALLEST = 64  # keys and values of a head whose products are of bfloat16

_Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Outputs [T, H, V], and final states [S, H, K, V] float32 (None where not wanted)."""
    rows = (by_rows(x) for x in (q, k, v, g))
    found = run(_forward, (scale, tau, want_state), *rows, span_start, _whole(initial_state))
    return cast(tuple[torch.Tensor, torch.Tensor | None], found)


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
) -> _Gradients:
    """Gradients of q, k, v, g and (None where there is none) the initial state.

    Temporary memory: states of all chunks and their gradients, ``T / 16 * H * K * V`` bytes in
    bfloat16.
    """
    q, k, g, v, dz = by_rows(q), by_rows(k), by_rows(g), aligned(by_rows(v)), aligned(by_rows(dz))
    states = _whole(d_final), _whole(initial_state)
    found = run(_backward, (scale, tau), q, k, v, g, dz, span_start, *states)
    return cast(_Gradients, found)


def _forward(
    room: Room,
    key: tuple[float, float | None, bool],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    span_start: torch.Tensor,
    start: torch.Tensor | None,
) -> Tensors:
    scale, tau, want_state = key
    out = room.result(v.shape, v.dtype)
    end = room.result(_state_shape(q, v, span_start), torch.float32) if want_state else None
    chunks = _lay_out(room, q, v, span_start, ceil_div(v.shape[2], 64))
    within = within_chunks(room, q, k, v, g, chunks, scale=scale, tau=tau, kind=_product_kind(q, v))
    stream(room, v, within, chunks, span_start, q.shape[2], out, start=start, end=end)
    return out, end


def _backward(
    room: Room,
    key: tuple[float, float | None],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    dz: torch.Tensor,
    span_start: torch.Tensor,
    d_end: torch.Tensor | None,
    start: torch.Tensor | None,
) -> Tensors:
    scale, tau = key
    kind, channels = _product_kind(q, v), q.shape[2]
    programs = 2 * ceil_div(padded(channels), 64) * ceil_div(v.shape[2], 64)
    chunks = _lay_out(room, q, v, span_start, programs)
    d_start = None
    if start is not None:
        d_start = room.result(_state_shape(q, v, span_start), torch.float32)
    dv = room.result(v.shape, v.dtype)
    within = within_chunks(room, q, k, v, g, chunks, scale=scale, tau=tau, kind=kind, dz=dz)
    ways = (Way(v, start, None), Way(dz, d_end, d_start))
    kept, d_kept = keep_states(room, ways, within, chunks, span_start, channels)
    value_gradient(room, dz, within, d_kept, chunks, dv)
    dq, dk, dg = gradient(room, q, k, v, g, dz, within, kept, d_kept, chunks, scale=scale, tau=tau)
    return dq, dk, dv, dg, d_start


def _state_shape(q: torch.Tensor, v: torch.Tensor, span_start: torch.Tensor) -> tuple[int, ...]:
    """Of a state for every span."""
    return span_start.shape[0] - 1, q.shape[1], q.shape[2], v.shape[2]


def _whole(state: torch.Tensor | None) -> torch.Tensor | None:
    return None if state is None else state.float().contiguous()


def _product_kind(q: torch.Tensor, v: torch.Tensor) -> torch.dtype:
    # float16 cannot hold the factors of the anchored product; the interpreter, which stands in for
    # a GPU on a CPU, cannot multiply bfloat16. Of small heads the gradients came out wrong in
    # bfloat16 on an H200 (16 keys, 32 values); the sizes that are right there begin at 64.
    small = padded(q.shape[2]) < SMALLEST or padded(v.shape[2]) < SMALLEST
    plain = q.dtype == torch.float32 or q.device.type == "cpu" or small
    return torch.float32 if plain else torch.bfloat16


def _lay_out(
    room: Room, q: torch.Tensor, v: torch.Tensor, span_start: torch.Tensor, programs: int
) -> Chunks:
    """programs: that may work on one track, a head of a span."""
    rows = segment_rows_for(q.shape[0], span_start.shape[0] - 1, q.shape[1] * programs)
    return lay_out(room, span_start, q.shape[0], rows)
