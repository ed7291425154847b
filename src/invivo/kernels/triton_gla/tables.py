"""Where chunks and segments of packed spans lie, found on the device; tiles of every kernel.

Rows of a span fall into *chunks* of 64 from its first row on; chunks have *slots* in the scratch
tensors: chunk c of span s has slot ``span_start[s] // 64 + s + c``. That leaves at most one slot a
span unused and needs no sum over spans, so that slots are known on the host from the number of
rows and spans alone: nothing reads the device, and a captured graph replays for other lengths.
*Couples*, two chunks between which no state is written, and *segments*, the units in which states
are streamed, have slots in the same way.

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
COUPLE = 2 * CHUNK
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


class WalkTile(NamedTuple):
    """Channels of keys and of values a program, warps, pipeline stages."""

    k: int
    v: int
    warps: int
    stages: int


class ValueTile(NamedTuple):
    """Channels of keys a step, of values a program, warps, pipeline stages."""

    k: int
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
    return PairTile(min(32, k), min(64, padded(v)), 4, 3)


def stream_tile(k: int, v: int, *, wide: bool, tracks: int, states: bool) -> StreamTile:
    """tracks: segments times heads; states: some are given and some wanted, and take registers."""
    if wide or (k > 128 and states):
        return StreamTile(min(padded(v), 64), 8, 1 if wide else 2)
    if v % 128 == 0 and tracks * (v // 128) >= ENOUGH:
        return StreamTile(128, 8, 3 if k <= 128 else 2)
    return StreamTile(min(padded(v), 64), 4, 2)


def walk_tile(k: int, v: int, *, wide: bool, tracks: int) -> WalkTile:
    """tracks: segments times heads."""
    if wide:
        return WalkTile(min(64, k), min(64, padded(v)), 4, 1)
    # The wider, if there are enough to keep the device busy.
    v_tile = 128 if tracks * ceil_div(k, 64) * ceil_div(v, 128) >= ENOUGH else 64
    return WalkTile(min(64, k), min(v_tile, padded(v)), 4, 3)


def value_tile(k: int, v: int, *, wide: bool) -> ValueTile:
    if wide:
        return ValueTile(min(32, k), min(32, padded(v)), 4, 1)
    return ValueTile(min(64, k), min(128, padded(v)), 4, 3)


def gradient_tile(k: int, v: int, *, wide: bool) -> GradientTile:
    if wide:
        return GradientTile(min(32, k), min(32, padded(v)), 4, 1)
    return GradientTile(min(32, k), min(64, padded(v)), 4, 3)


def step_tile(k: int, v: int) -> StepTile:
    return StepTile(min(32, padded(v)), 4)


class Chunks(NamedTuple):
    """Slots of the chunks and segments of packed spans.

    Attributes:
        chunks: [n_chunks, 3] int32: first row, rows (0 where a slot is unused), and 1 for the
            second of a couple, 0 for the first.
        couples: [n_couples, 3] int32: first row, rows, slot of the first chunk.
        segments: [n_segments, 3] int32: the same.
        segment_rows: rows of a segment, a multiple of 128; 0: a segment is a span.
        ones: [64, 64] bfloat16, 1 on the diagonal and below, 0 above: a product with it sums rows.
    """

    chunks: torch.Tensor
    couples: torch.Tensor
    segments: torch.Tensor
    segment_rows: int
    ones: torch.Tensor

    @property
    def n_chunks(self) -> int:
        return self.chunks.shape[0]

    @property
    def n_couples(self) -> int:
        return self.couples.shape[0]

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
    rows = max(2, ceil_div(rows, COUPLE)) * COUPLE
    return rows if rows * n_spans < n_rows else 0


def n_slots(n_rows: int, n_spans: int, unit: int) -> int:
    return n_rows // unit + n_spans


@triton.jit(do_not_specialize=["n_spans", "steps", "n_chunks", "n_couples", "n_segments"])
def _lay_out_kernel(
    span_start, chunks, couples, segments, ones, n_spans, steps, n_chunks, n_couples, n_segments,
    CHUNK_ROWS: tl.constexpr, COUPLE_ROWS: tl.constexpr, SEGMENT_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK slots a program: grid (cdiv(max(n_chunks, n_segments), BLOCK),)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    span = _span_of(span_start, index, n_spans, steps, CHUNK_ROWS, BLOCK)
    start, rest, local = _unit(span_start, span, index, CHUNK_ROWS)
    mask = index < n_chunks
    tl.store(chunks + 3 * index, start, mask=mask)
    tl.store(chunks + 3 * index + 1, rest, mask=mask)
    tl.store(chunks + 3 * index + 2, local % (COUPLE_ROWS // CHUNK_ROWS), mask=mask)
    if tl.program_id(0) == 0:
        row, column = tl.arange(0, CHUNK_ROWS)[:, None], tl.arange(0, CHUNK_ROWS)[None, :]
        tl.store(ones + row * CHUNK_ROWS + column, (column <= row).to(ones.dtype.element_ty))
    _lay_out_units(
        span_start, couples, index, n_spans, steps, n_couples, CHUNK_ROWS, COUPLE_ROWS, BLOCK
    )
    _lay_out_units(
        span_start, segments, index, n_spans, steps, n_segments, CHUNK_ROWS, SEGMENT_ROWS, BLOCK
    )


@triton.jit
def _lay_out_units(
    span_start, units, index, n_spans, steps, n_units,
    CHUNK_ROWS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Units of several chunks; UNIT 0: of whole spans."""
    mask = index < n_units
    if UNIT > 0:
        span = _span_of(span_start, index, n_spans, steps, UNIT, BLOCK)
        start, rest, local = _unit(span_start, span, index, UNIT)
    else:
        span = tl.minimum(index, n_spans - 1)
        start = tl.load(span_start + span)
        rest = tl.load(span_start + span + 1) - start
        local = tl.zeros([BLOCK], tl.int32)
    slot = tl.load(span_start + span) // CHUNK_ROWS + span + local * (UNIT // CHUNK_ROWS)
    tl.store(units + 3 * index, start, mask=mask)
    tl.store(units + 3 * index + 1, rest, mask=mask)
    tl.store(units + 3 * index + 2, slot, mask=mask)


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
    n_chunks, n_couples = (n_slots(n_rows, n_spans, unit) for unit in (CHUNK, COUPLE))
    n_segments = n_slots(n_rows, n_spans, segment_rows) if segment_rows else n_spans
    chunks, couples, segments = (
        room.scratch(n, 3, dtype=torch.int32) for n in (n_chunks, n_couples, n_segments)
    )
    ones = room.scratch(CHUNK, CHUNK, dtype=torch.bfloat16)
    block = 128
    room.launch(
        _lay_out_kernel, (ceil_div(max(n_chunks, n_segments), block),),
        span_start, chunks, couples, segments, ones, n_spans, n_spans.bit_length(),
        n_chunks, n_couples, n_segments, CHUNK_ROWS=CHUNK, COUPLE_ROWS=COUPLE,
        SEGMENT_ROWS=segment_rows, BLOCK=block, warps=4, stages=3,
    )  # fmt: skip
    return Chunks(chunks, couples, segments, segment_rows, ones)
