"""Outputs while the state is carried along: the forward pass where a program's tile of the state
has all key channels and the reads of several chunks still fit beside it.

As ``states`` walks forwards, with ``o = Qg S + P v`` at every chunk; no state goes through memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from invivo.kernels.rounding import ceil_div
from invivo.kernels.triton_gla.loads import load_rows, store_rows
from invivo.kernels.triton_gla.pairs import Within
from invivo.kernels.triton_gla.states import Way, segment_starts
from invivo.kernels.triton_gla.tables import CHUNK, Chunks, padded, stream_tile
from invivo.kernels.triton_replay import Room


@triton.jit
def _stream_kernel(
    x, queries, keys, pairs, decay, segments, start, end, out, x_stride,
    N_HEADS: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
    STARTS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of V, N_HEADS, segments).

    STARTS: from ``start`` [segments, H, K, V] and not from zero. ENDS: write ``end``, the same.
    """
    tile, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(segments + 3 * segment)
    n_rows = tl.load(segments + 3 * segment + 1)
    first_slot = tl.load(segments + 3 * segment + 2)
    kind = queries.dtype
    at, channels = tl.arange(0, C), tl.arange(0, K_PAD)
    values = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    own = (segment * N_HEADS + head).to(tl.int64)
    turned = own * (K * V) + channels[None, :] * V + values[:, None]
    state_mask = (channels < K)[None, :] & (values < V)[:, None]

    if STARTS:
        state = tl.load(start + turned, mask=state_mask, other=0.0)
    else:
        state = tl.zeros([BLOCK_V, K_PAD], tl.float32)
    steps = tl.cdiv(n_rows, C)
    place = (first_slot * N_HEADS + head).to(tl.int64)
    # A step ahead, as in ``states``.
    any_step = (steps > 0) & (channels >= 0)
    factor = tl.load(decay + place * K_PAD + channels, mask=any_step, other=0.0)
    for chunk in range(steps):
        place = ((first_slot + tl.minimum(chunk + 1, steps - 1)) * N_HEADS + head).to(tl.int64)
        next_factor = tl.load(decay + place * K_PAD + channels)
        at_chunk = ((first_slot + chunk) * N_HEADS + head) * C
        row = chunk * C + at
        x_rows = load_rows(x, first + row, row < n_rows, values, head, x_stride, V).to(kind)
        readers = queries.load([at_chunk, 0])
        weights = pairs.load([at_chunk, 0])
        read = tl.dot(state.to(kind), tl.trans(readers), input_precision=PRECISION)
        read = tl.dot(tl.trans(x_rows), tl.trans(weights), read, input_precision=PRECISION)
        store_rows(out, tl.trans(read), first + row, row < n_rows, values, head, N_HEADS * V, V)
        writers = keys.load([at_chunk, 0])
        state = tl.dot(
            tl.trans(x_rows), writers, state * factor[None, :], input_precision=PRECISION
        )
        factor = next_factor
    if ENDS:
        tl.store(end + turned, state, mask=state_mask)


def stream(
    room: Room,
    v: torch.Tensor,
    within: Within,
    chunks: Chunks,
    span_start: torch.Tensor,
    channels: int,
    out: torch.Tensor,
    *,
    start: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
) -> None:
    """Writes ``out`` [T, H, V], and ``end`` where it is given; arguments as in ``keep_states``."""
    if chunks.segment_rows:
        ways = (Way(v, start, end),)
        (start,) = segment_starts(room, ways, within, chunks, span_start, channels)
        end = None
    n_heads, width = v.shape[1:]
    k_pad, wide = padded(channels), within.queries.dtype == torch.float32
    states, tracks = start is not None and end is not None, n_heads * chunks.n_segments
    tile = stream_tile(k_pad, width, wide=wide, tracks=tracks, states=states)
    none = within.decay  # stands for what is not wanted
    rows = TensorDescriptor.from_tensor(within.pairs.view(-1, CHUNK), [CHUNK, CHUNK])
    queries, keys = (
        TensorDescriptor.from_tensor(t.view(-1, k_pad), [CHUNK, k_pad])
        for t in (within.queries, within.keys)
    )
    room.launch(
        _stream_kernel, (ceil_div(width, tile.v), n_heads, chunks.n_segments),
        v, queries, keys, rows, within.decay, chunks.segments,
        *(none if t is None else t for t in (start, end)), out, v.stride(0),
        N_HEADS=n_heads, K=channels, K_PAD=k_pad, V=width, C=CHUNK, BLOCK_V=tile.v,
        PRECISION="tf32x3" if wide else "tf32", STARTS=start is not None, ENDS=end is not None,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
