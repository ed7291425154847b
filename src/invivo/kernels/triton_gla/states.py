"""States carried along the chunks of a span, forwards or backwards.

S is the state [K, V] entering a chunk, dS its gradient at the chunk's end, both kept transposed in
registers and in float32::

    forwards    S  <- diag(exp gn) S + Kg^T v         Kg = K exp(gn - gc)
    backwards   dS <- diag(exp gn) dS + Qg^T dO       Qg = scale Q exp(gc)

A program owns some key and value channels of one head and walks over one *segment*. Where spans,
heads and tiles are too few to fill the device, spans are cut: a first walk finds what each segment
adds to a zero state, and a scan over segments gives the states they start from.

States are written for whole *couples* of chunks alone: entering the first, and backwards at the
end of the second. What a chunk gives to the other of its couple is told from both without a state
(``outputs``, ``gradient``), for half the bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from invivo.kernels.rounding import ceil_div
from invivo.kernels.triton_gla.loads import load_rows
from invivo.kernels.triton_gla.pairs import Within
from invivo.kernels.triton_gla.tables import CHUNK, Chunks, padded, walk_tile
from invivo.kernels.triton_replay import Room


@triton.jit
def _walk_kernel(
    x, writers, decay, steep, segments, start, end, end_decay, kept, x_stride,
    N_HEADS: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, V: tl.constexpr,
    V_PAD: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    STARTS: tl.constexpr, ENDS: tl.constexpr, DECAYS: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of K and V, N_HEADS, segments).

    STARTS: from ``start`` [segments, H, K, V] and not from zero. ENDS: write ``end``, the same.
    DECAYS: write ``end_decay`` [segments, H, K]. KEEPS: write the state entering the first chunk of
    each couple (backwards: at the end of its last), and of each flagged chunk, to ``kept`` [slots,
    H, V_PAD, K_PAD] at that chunk.
    """
    tiles_k: tl.constexpr = K_PAD // BLOCK_K
    tile_k, tile_v = tl.program_id(0) % tiles_k, tl.program_id(0) // tiles_k
    head, segment = tl.program_id(1), tl.program_id(2)
    first = tl.load(segments + 3 * segment)
    n_rows = tl.load(segments + 3 * segment + 1)
    first_slot = tl.load(segments + 3 * segment + 2)
    kind = writers.dtype
    at, channels = tl.arange(0, C), tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    values = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    own = (segment * N_HEADS + head).to(tl.int64)
    turned = own * (K * V) + channels[None, :] * V + values[:, None]
    state_mask = (channels < K)[None, :] & (values < V)[:, None]

    if STARTS:
        state = tl.load(start + turned, mask=state_mask, other=0.0)
    else:
        state = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    passed = tl.full([BLOCK_K], 1.0, tl.float32)
    steps = tl.cdiv(n_rows, C)
    for step in range(steps):
        chunk = step
        if REVERSE:
            chunk = steps - 1 - step
        place = ((first_slot + chunk) * N_HEADS + head).to(tl.int64)
        row = chunk * C + at
        x_rows = load_rows(x, first + row, row < n_rows, values, head, x_stride, V).to(kind)
        if KEEPS:
            if REVERSE:
                is_kept = (chunk % 2 == 1) | (step == 0) | (tl.load(steep + place) != 0)
            else:
                is_kept = (chunk % 2 == 0) | (tl.load(steep + place) != 0)
            if is_kept:
                at_kept = ((first_slot + chunk) * N_HEADS + head) * V_PAD + tile_v * BLOCK_V
                kept.store([at_kept, tile_k * BLOCK_K], state.to(kind))
        rows = writers.load([((first_slot + chunk) * N_HEADS + head) * C, tile_k * BLOCK_K])
        factor = tl.load(decay + place * K_PAD + channels)
        state = tl.dot(tl.trans(x_rows), rows, state * factor[None, :], input_precision=PRECISION)
        if DECAYS:
            passed = passed * factor
    if ENDS:
        tl.store(end + turned, state, mask=state_mask)
    if DECAYS and tile_v == 0:
        tl.store(end_decay + own * K + channels, passed, mask=channels < K)


@triton.jit
def _scan_kernel(
    states, decays, initial, final, span_start,
    N_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SEGMENT_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, REVERSE: tl.constexpr,
    STARTS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """What each segment adds becomes what it starts from. Grid (tiles of K and V, H, spans)."""
    tiles_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    head, span = tl.program_id(1), tl.program_id(2)
    channels = tl.program_id(0) // tiles_v * BLOCK_K + tl.arange(0, BLOCK_K)
    values = tl.program_id(0) % tiles_v * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = (channels < K)[:, None] & (values < V)[None, :]
    tile = channels[:, None] * V + values[None, :]
    begin = tl.load(span_start + span)
    count = tl.cdiv(tl.load(span_start + span + 1) - begin, SEGMENT_ROWS)
    first = begin // SEGMENT_ROWS + span
    at_span = (span * N_HEADS + head).to(tl.int64) * (K * V)
    if STARTS:
        state = tl.load(initial + at_span + tile, mask=mask, other=0.0)
    else:
        state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for step in range(count):
        segment = first + step
        if REVERSE:
            segment = first + count - 1 - step
        place = (segment * N_HEADS + head).to(tl.int64)
        added = tl.load(states + place * (K * V) + tile, mask=mask, other=0.0)
        factor = tl.load(decays + place * K + channels, mask=channels < K, other=0.0)
        tl.store(states + place * (K * V) + tile, state, mask=mask)
        state = state * factor[:, None] + added
    if ENDS:
        tl.store(final + at_span + tile, state, mask=mask)


def keep_states(
    room: Room,
    x: torch.Tensor,
    within: Within,
    chunks: Chunks,
    span_start: torch.Tensor,
    channels: int,
    *,
    reverse: bool = False,
    start: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
) -> torch.Tensor:
    """States entering couples (backwards: their gradients at the couples' ends), and so of all
    flagged chunks: [slots, H, V padded to tiles, K padded] of the products' kind, written at these
    chunks alone.

    Args:
        x: [T, H, V] by rows: values forwards, the gradient of the outputs backwards.
        channels: K.
        start: [S, H, K, V] float32, the state before each span, or, backwards, the gradient of the
            one after it; None = zeros.
        end: [S, H, K, V] float32, written: the state after each span, or the gradient of the one
            before it.
    """
    size = (room, x, within, chunks, channels, reverse)
    if chunks.segment_rows:
        start = segment_starts(
            room, x, within, chunks, span_start, channels, reverse=reverse, start=start, end=end
        )
        end = None
    n_heads, width = x.shape[1:]
    tile = _tile(x, within, chunks, channels)
    v_pad = ceil_div(width, tile.v) * tile.v
    kept = room.scratch(chunks.n_chunks, n_heads, v_pad, padded(channels), dtype=within.keys.dtype)
    _walk(*size, start, end, None, kept)
    return kept


def segment_starts(
    room: Room,
    x: torch.Tensor,
    within: Within,
    chunks: Chunks,
    span_start: torch.Tensor,
    channels: int,
    *,
    reverse: bool = False,
    start: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
) -> torch.Tensor:
    """States before all segments (backwards: their gradients after them), [segments, H, K, V]
    float32; ``start`` and ``end`` as in :func:`keep_states`."""
    n_heads, width = x.shape[1:]
    states = room.scratch(chunks.n_segments, n_heads, channels, width, dtype=torch.float32)
    decays = room.scratch(chunks.n_segments, n_heads, channels, dtype=torch.float32)
    _walk(room, x, within, chunks, channels, reverse, None, states, decays, None)
    block_k, block_v = min(16, padded(channels)), min(128, padded(width))
    grid = ceil_div(channels, block_k) * ceil_div(width, block_v)
    room.launch(
        _scan_kernel, (grid, n_heads, span_start.shape[0] - 1),
        states, decays, states if start is None else start, states if end is None else end,
        span_start, N_HEADS=n_heads, K=channels, V=width, SEGMENT_ROWS=chunks.segment_rows,
        BLOCK_K=block_k, BLOCK_V=block_v, REVERSE=reverse, STARTS=start is not None,
        ENDS=end is not None, warps=4, stages=2,
    )  # fmt: skip
    return states


def _tile(x: torch.Tensor, within: Within, chunks: Chunks, channels: int):
    wide = within.keys.dtype == torch.float32
    tracks = x.shape[1] * chunks.n_segments
    return walk_tile(padded(channels), x.shape[2], wide=wide, tracks=tracks)


def _walk(
    room: Room,
    x: torch.Tensor,
    within: Within,
    chunks: Chunks,
    channels: int,
    reverse: bool,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    decays: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> None:
    n_heads, width = x.shape[1:]
    tile, k_pad = _tile(x, within, chunks, channels), padded(channels)
    writers = within.queries if reverse else within.keys
    none = within.decay  # stands for what is not wanted
    rows = TensorDescriptor.from_tensor(writers.view(-1, k_pad), [CHUNK, tile.k])
    into = rows
    if kept is not None:
        into = TensorDescriptor.from_tensor(kept.view(-1, k_pad), [tile.v, tile.k])
    tiles = k_pad // tile.k * ceil_div(width, tile.v)
    room.launch(
        _walk_kernel, (tiles, n_heads, chunks.n_segments),
        x, rows, within.decay, within.steep, chunks.segments,
        *(none if t is None else t for t in (start, end, decays)), into, x.stride(0),
        N_HEADS=n_heads, K=channels, K_PAD=k_pad, V=width, V_PAD=ceil_div(width, tile.v) * tile.v,
        C=CHUNK, BLOCK_K=tile.k, BLOCK_V=tile.v, REVERSE=reverse,
        PRECISION="tf32x3" if writers.dtype == torch.float32 else "tf32",
        STARTS=start is not None, ENDS=end is not None, DECAYS=decays is not None,
        KEEPS=kept is not None, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
