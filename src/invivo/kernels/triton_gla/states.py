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
(``values``, ``gradient``), for half the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from invivo.kernels.rounding import ceil_div
from invivo.kernels.triton_gla.loads import load_rows
from invivo.kernels.triton_gla.pairs import Within
from invivo.kernels.triton_gla.tables import CHUNK, Chunks, WalkTile, padded, walk_tile
from invivo.kernels.triton_replay import Room


@triton.jit(do_not_specialize=["n_slots", "n_segments"])
def _walk_kernel(
    x, d_x, writers, decay, steep, segments, start, d_start, end, d_end, end_decay, kept,
    x_stride, d_x_stride, n_slots, n_segments,
    N_HEADS: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, V: tl.constexpr,
    V_PAD: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr, STARTS: tl.constexpr, D_STARTS: tl.constexpr, ENDS: tl.constexpr,
    D_ENDS: tl.constexpr, DECAYS: tl.constexpr, KEEPS: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of K and V, with BOTH twice as many, every other one backwards; N_HEADS;
    segments).

    STARTS: from ``start`` [segments, H, K, V] and not from zero. ENDS: write ``end``, the same.
    DECAYS: write ``end_decay`` [ways, segments, H, K]. KEEPS: write the state entering the first
    chunk of each couple (backwards: at the end of its last), and of each flagged chunk, to ``kept``
    [ways, slots, H, V_PAD, K_PAD] at that chunk. writers [ways, slots, H, C, K_PAD].
    """
    way, tile = 0, tl.program_id(0)
    if BOTH:
        way, tile = tile % 2, tile // 2
    tiles_k: tl.constexpr = K_PAD // BLOCK_K
    tile_k, tile_v = tile % tiles_k, tile // tiles_k
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
    if BOTH:
        x, x_stride = tl.where(way == 0, x, d_x), tl.where(way == 0, x_stride, d_x_stride)

    state = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    if STARTS:
        state += tl.load(start + turned, mask=state_mask & (way == 0), other=0.0)
    if D_STARTS:
        state += tl.load(d_start + turned, mask=state_mask & (way == 1), other=0.0)
    passed = tl.full([BLOCK_K], 1.0, tl.float32)
    steps = tl.cdiv(n_rows, C)
    # Decays and flags are read a step ahead: waited for, they would be most of its time.
    chunk = tl.where(way == 0, 0, tl.maximum(steps - 1, 0))
    place = ((first_slot + chunk) * N_HEADS + head).to(tl.int64)
    any_step = steps > 0  # a segment of no rows may lie beyond the last chunk
    factor = tl.load(decay + place * K_PAD + channels, mask=any_step & (channels >= 0), other=0.0)
    flag = tl.load(steep + place, mask=any_step, other=0)
    for step in range(steps):
        chunk = tl.where(way == 0, step, steps - 1 - step)
        after = tl.where(way == 0, tl.minimum(step + 1, steps - 1), tl.maximum(chunk - 1, 0))
        place = ((first_slot + after) * N_HEADS + head).to(tl.int64)
        next_factor, next_flag = tl.load(decay + place * K_PAD + channels), tl.load(steep + place)
        at_chunk = (way * n_slots + first_slot + chunk) * N_HEADS + head
        row = chunk * C + at
        x_rows = load_rows(x, first + row, row < n_rows, values, head, x_stride, V).to(kind)
        if KEEPS:
            # A lone last chunk is the end of its couple too.
            is_end = (chunk % 2 == way) | ((way == 1) & (step == 0))
            if is_end | (flag != 0):
                at_kept = at_chunk * V_PAD + tile_v * BLOCK_V
                kept.store([at_kept, tile_k * BLOCK_K], state.to(kind))
        rows = writers.load([at_chunk * C, tile_k * BLOCK_K])
        state = tl.dot(tl.trans(x_rows), rows, state * factor[None, :], input_precision=PRECISION)
        if DECAYS:
            passed = passed * factor
        factor, flag = next_factor, next_flag
    if ENDS:
        tl.store(end + turned, state, mask=state_mask & (way == 0))
    if D_ENDS:
        tl.store(d_end + turned, state, mask=state_mask & (way == 1))
    if DECAYS and tile_v == 0:
        at_end = (way * n_segments * N_HEADS + own) * K + channels
        tl.store(end_decay + at_end, passed, mask=channels < K)


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


@dataclass(frozen=True, slots=True)
class Way:
    """What states are carried along of, in one direction.

    Attributes:
        x: [T, H, V] by rows: values forwards, the gradient of the outputs backwards.
        start: [S, H, K, V] float32, the state before each span, or, backwards, the gradient of the
            one after it; None = zeros.
        end: [S, H, K, V] float32, to be written: the state after each span, or the gradient of the
            one before it; None = not wanted.
    """

    x: torch.Tensor
    start: torch.Tensor | None
    end: torch.Tensor | None


def keep_states(
    room: Room,
    ways: tuple[Way] | tuple[Way, Way],
    within: Within,
    chunks: Chunks,
    span_start: torch.Tensor,
    channels: int,
) -> torch.Tensor:
    """States entering couples, and with a second of ``ways`` their gradients at the couples' ends,
    and both of all flagged chunks: [ways, slots, H, V padded to tiles, K padded] of the products'
    kind, written at these chunks alone. channels: K."""
    n_heads, width = ways[0].x.shape[1:]
    if chunks.segment_rows:
        states = segment_starts(room, ways, within, chunks, span_start, channels)
        ways = tuple(Way(way.x, start, None) for way, start in zip(ways, states, strict=True))
    v_tile = _tile(ways, within, chunks, channels).v
    v_pad = ceil_div(width, v_tile) * v_tile
    kept = room.scratch(
        len(ways), chunks.n_chunks, n_heads, v_pad, padded(channels), dtype=within.writers.dtype
    )
    _launch_walk(room, ways, within, chunks, channels, None, kept)
    return kept


def segment_starts(
    room: Room,
    ways: tuple[Way] | tuple[Way, Way],
    within: Within,
    chunks: Chunks,
    span_start: torch.Tensor,
    channels: int,
) -> list[torch.Tensor]:
    """States before all segments, and with a second of ``ways`` their gradients after them:
    [segments, H, K, V] float32."""
    n_heads, width = ways[0].x.shape[1:]
    units = (chunks.n_segments, n_heads, channels)
    states = [room.scratch(*units, width, dtype=torch.float32) for _ in ways]
    decays = room.scratch(len(ways), *units, dtype=torch.float32)
    added = tuple(Way(way.x, None, state) for way, state in zip(ways, states, strict=True))
    _launch_walk(room, added, within, chunks, channels, decays, None)
    block_k, block_v = min(16, padded(channels)), min(128, padded(width))
    grid = ceil_div(channels, block_k) * ceil_div(width, block_v)
    for i, (way, state) in enumerate(zip(ways, states, strict=True)):
        room.launch(
            _scan_kernel, (grid, n_heads, span_start.shape[0] - 1),
            state, decays[i], state if way.start is None else way.start,
            state if way.end is None else way.end, span_start,
            N_HEADS=n_heads, K=channels, V=width, SEGMENT_ROWS=chunks.segment_rows,
            BLOCK_K=block_k, BLOCK_V=block_v, REVERSE=i == 1, STARTS=way.start is not None,
            ENDS=way.end is not None, warps=4, stages=2,
        )  # fmt: skip
    return states


def _tile(ways: tuple[Way, ...], within: Within, chunks: Chunks, channels: int) -> WalkTile:
    n_heads, width = ways[0].x.shape[1:]
    tracks = n_heads * chunks.n_segments * len(ways)
    wide = within.writers.dtype == torch.float32
    return walk_tile(padded(channels), width, wide=wide, tracks=tracks)


def _launch_walk(
    room: Room,
    ways: tuple[Way, ...],
    within: Within,
    chunks: Chunks,
    channels: int,
    decays: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> None:
    """decays, kept: written, of all ways; None = not wanted."""
    there, back = ways[0], ways[-1]
    both = len(ways) == 2
    n_heads, width = there.x.shape[1:]
    tile, k_pad = _tile(ways, within, chunks, channels), padded(channels)
    none = within.decay  # stands for what is not wanted
    writers = TensorDescriptor.from_tensor(within.writers.view(-1, k_pad), [CHUNK, tile.k])
    into = writers
    if kept is not None:
        into = TensorDescriptor.from_tensor(kept.view(-1, k_pad), [tile.v, tile.k])
    tiles = k_pad // tile.k * ceil_div(width, tile.v)
    room.launch(
        _walk_kernel, (tiles * len(ways), n_heads, chunks.n_segments),
        there.x, back.x, writers, within.decay, within.steep, chunks.segments,
        *(none if t is None else t for t in (there.start, back.start, there.end, back.end, decays)),
        into, there.x.stride(0), back.x.stride(0), chunks.n_chunks, chunks.n_segments,
        N_HEADS=n_heads, K=channels, K_PAD=k_pad, V=width, V_PAD=ceil_div(width, tile.v) * tile.v,
        C=CHUNK, BLOCK_K=tile.k, BLOCK_V=tile.v,
        PRECISION="tf32x3" if within.writers.dtype == torch.float32 else "tf32",
        STARTS=there.start is not None, ENDS=there.end is not None,
        D_STARTS=both and back.start is not None, D_ENDS=both and back.end is not None,
        DECAYS=decays is not None, KEEPS=kept is not None, BOTH=both,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
