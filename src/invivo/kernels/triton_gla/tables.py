"""Where chunks and segments of packed spans lie, found on the device; tiles of every kernel.

Rows of a span fall into *chunks* of 64 from its first row on; chunks have *slots* in the scratch
tensors: chunk c of span s has slot ``span_start[s] // 64 + s + c``. That leaves at most one slot a
span unused and needs no sum over spans, so that slots are known on the host from the number of
rows and spans alone: nothing reads the device, and a captured graph replays for other lengths.
*Segments*, the units in which states are streamed, have slots in the same way.

Tiles are tables and not searched for at run time: each entry is checked against float64 on the
device before it is used (bench/gla.py), for Triton's compilers have mistranslated some.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from invivo.kernels.rounding import ceil_div, power_of_2
from invivo.kernels.triton_replay import Room

CHUNK = 64
SUB = 16  # rows of a sub-chunk, where gates are too steep for one product
# Log gates below this, in units of log 2, are this: 2 ** -150 is 0 in float32, and beside sums of
# 64 of them mild gates keep the digits that bfloat16 needs (an error of 1e-4 at worst).
FLOOR = tl.constexpr(-150.0)
LOG2E = tl.constexpr(1.4426950408889634)
# Decay of a channel over a chunk, in units of log 2 (120 nats), up to which one product serves:
# its factors are at most 2 ** 87 and the smallest keep all digits of a bfloat16 or float32.
STEEP = tl.constexpr(173.0)
# Programs that keep the 132 multiprocessors of an H200 busy; fewer are split into segments.
ENOUGH = 100
WANTED = 264
WANTED_WIDE = 132  # of the widest tiles, of which a multiprocessor holds one
WIDE_VALUES = 128


class PairTile(NamedTuple):
    """Channels of keys and of values a step, warps, pipeline stages."""

    k: int
    v: int
    warps: int
    stages: int


class StreamTile(NamedTuple):
    """Channels of values a program, warps, pipeline stages."""

    v: int
    warps: int
    stages: int


class GradientTile(NamedTuple):
    """Channels of keys a program, of values a step, warps, pipeline stages."""

    k: int
    v: int
    warps: int
    stages: int


class StepTile(NamedTuple):
    """Channels of values a program, warps."""

    v: int
    warps: int


def padded(channels: int) -> int:
    """Channels of keys that tiles and scratch tensors have."""
    return max(16, power_of_2(channels))


def pair_tile(k: int, v: int, *, wide: bool) -> PairTile:
    """wide: the products are of float32."""
    if wide:
        return PairTile(min(32, k), min(32, padded(v)), 4, 1)
    return PairTile(min(64, k), min(WIDE_VALUES, padded(v)), 4, 3)


def stream_tile(
    k: int, v: int, *, wide: bool, reverse: bool = False, states: bool = False, tracks: int = 0
) -> StreamTile:
    """states: some are given or wanted, and take registers; tracks: spans times heads."""
    v_tile = min(padded(v), 64)
    if wide:
        return StreamTile(v_tile, 8, 1)
    if k <= 128:
        return StreamTile(v_tile, 4, 3)
    if states:
        return StreamTile(v_tile, 8, 2)
    # The widest, if its programs keep the device busy, or if spans will be cut in any case.
    fits = tracks * (v // WIDE_VALUES) >= ENOUGH or tracks * (v // 64) < ENOUGH
    if fits and not reverse and v % WIDE_VALUES == 0:
        return StreamTile(WIDE_VALUES, 8, 2)
    return StreamTile(v_tile, 4, 2)


def gradient_tile(k: int, v: int, *, wide: bool) -> GradientTile:
    if wide:
        return GradientTile(min(32, k), min(32, padded(v)), 4, 1)
    return GradientTile(min(32, k), min(64, padded(v)), 4, 3)


def step_tile(k: int, v: int) -> StepTile:
    return StepTile(min(32, padded(v)), 4)


class Chunks(NamedTuple):
    """Slots of the chunks and segments of packed spans.

    Attributes:
        chunks: [n_chunks, 2] int32: first row and rows; 0 rows where a slot is unused.
        segments: [n_segments, 3] int32: first row, rows, slot of the first chunk.
        segment_rows: rows of a segment, a multiple of 64; 0: a segment is a span.
    """

    chunks: torch.Tensor
    segments: torch.Tensor
    segment_rows: int

    @property
    def n_chunks(self) -> int:
        return self.chunks.shape[0]

    @property
    def n_segments(self) -> int:
        return self.segments.shape[0]


def segment_rows_for(n_rows: int, n_spans: int, programs: int, wanted: int = WANTED) -> int:
    """Rows of a segment so that the device is busy; 0: spans alone keep it so.

    programs: that stream one segment, heads times tiles of values.
    wanted: programs that keep the device busy.
    """
    if n_spans * programs >= ENOUGH or n_rows <= 8 * CHUNK:
        return 0
    rows = ceil_div(n_rows, max(1, wanted // programs))
    rows = max(4, ceil_div(rows, CHUNK)) * CHUNK
    return rows if rows * n_spans < n_rows else 0


def n_slots(n_rows: int, n_spans: int, unit: int) -> int:
    return n_rows // unit + n_spans


@triton.jit(do_not_specialize=["n_spans", "steps", "n_chunks", "n_segments"])
def _lay_out_kernel(
    span_start, chunks, segments, n_spans, steps, n_chunks, n_segments,
    CHUNK_ROWS: tl.constexpr, SEGMENT_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK slots a program: grid (cdiv(max(n_chunks, n_segments), BLOCK),)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    span = _span_of(span_start, index, n_spans, steps, CHUNK_ROWS, BLOCK)
    start, rest, _ = _unit(span_start, span, index, CHUNK_ROWS)
    mask = index < n_chunks
    tl.store(chunks + 2 * index, start, mask=mask)
    tl.store(chunks + 2 * index + 1, rest, mask=mask)

    mask = index < n_segments
    if SEGMENT_ROWS > 0:
        span = _span_of(span_start, index, n_spans, steps, SEGMENT_ROWS, BLOCK)
        start, rest, local = _unit(span_start, span, index, SEGMENT_ROWS)
    else:
        span = tl.minimum(index, n_spans - 1)
        start = tl.load(span_start + span)
        rest = tl.load(span_start + span + 1) - start
        local = tl.zeros([BLOCK], tl.int32)
    slot = tl.load(span_start + span) // CHUNK_ROWS + span + local * (SEGMENT_ROWS // CHUNK_ROWS)
    tl.store(segments + 3 * index, start, mask=mask)
    tl.store(segments + 3 * index + 1, rest, mask=mask)
    tl.store(segments + 3 * index + 2, slot, mask=mask)


@triton.jit
def _span_of(span_start, index, n_spans, steps, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """The last span whose first slot is not after ``index``; by halving, ``steps`` times."""
    low = tl.zeros([BLOCK], tl.int32)
    high = low + (n_spans - 1)
    for _ in range(steps):
        middle = (low + high + 1) // 2
        below = tl.load(span_start + middle) // UNIT + middle <= index
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle - 1)
    return low


@triton.jit
def _unit(span_start, span, index, UNIT: tl.constexpr):
    """First row and rows of the unit of that slot, and its number within the span."""
    start = tl.load(span_start + span)
    local = index - (start // UNIT + span)
    rows = tl.load(span_start + span + 1) - start - local * UNIT
    return start + local * UNIT, tl.minimum(tl.maximum(rows, 0), UNIT), local


def lay_out(room: Room, span_start: torch.Tensor, n_rows: int, segment_rows: int) -> Chunks:
    """span_start [S + 1] int32 on the device, from 0 to ``n_rows``; S >= 1."""
    n_spans = span_start.shape[0] - 1
    n_chunks = n_slots(n_rows, n_spans, CHUNK)
    n_segments = n_slots(n_rows, n_spans, segment_rows) if segment_rows else n_spans
    chunks = room.scratch(n_chunks, 2, dtype=torch.int32)
    segments = room.scratch(n_segments, 3, dtype=torch.int32)
    block = 128
    room.launch(
        _lay_out_kernel, (ceil_div(max(n_chunks, n_segments), block),),
        span_start, chunks, segments, n_spans, n_spans.bit_length(), n_chunks, n_segments,
        CHUNK_ROWS=CHUNK, SEGMENT_ROWS=segment_rows, BLOCK=block, warps=4, stages=3,
    )  # fmt: skip
    return Chunks(chunks, segments, segment_rows)
