"""States carried along the chunks of a span, forwards or backwards, and what reads them.

One kernel in two directions; S is the state [K, V] entering a chunk, dS its gradient at the
chunk's end, both kept transposed in registers and in float32::

    Qg = scale Q exp(gc)       Kg = K exp(gn - gc)
    forwards    o  = Qg S + P v            S  <- diag(exp gn) S + Kg^T v
    backwards   dv = Kg dS + P^T dO        dS <- diag(exp gn) dS + Qg^T dO

A program owns some value channels of one head and walks over one *segment*. Where spans, heads
and tiles are too few to fill the device, spans are cut: a first walk finds what each segment adds
to a zero state, a scan over segments gives the states they start from, the second walk is the
one above.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from invivo.kernels.rounding import ceil_div
from invivo.kernels.triton_gla.loads import load_rows, store_rows
from invivo.kernels.triton_gla.pairs import Within
from invivo.kernels.triton_gla.tables import CHUNK, Chunks, padded, stream_tile
from invivo.kernels.triton_replay import Room


@triton.jit
def _stream_kernel(
    x, queries, keys, pairs, decay, segments, start, end, end_decay, kept, out, x_stride,
    N_HEADS: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, V: tl.constexpr,
    V_PAD: tl.constexpr, C: tl.constexpr, BLOCK_V: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    STARTS: tl.constexpr, ENDS: tl.constexpr, DECAYS: tl.constexpr, KEEPS: tl.constexpr,
    WRITES: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of V, N_HEADS, segments).

    STARTS: from ``start`` [segments, H, K, V] and not from zero. ENDS: write ``end``, the same.
    DECAYS: write ``end_decay`` [segments, H, K]. KEEPS: write the state entering each chunk to
    ``kept`` [slots, H, V_PAD, K_PAD]. WRITES: write ``out`` [T, H, V].
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
    passed = tl.full([K_PAD], 1.0, tl.float32)
    steps = tl.cdiv(n_rows, C)
    for step in range(steps):
        chunk = step
        if REVERSE:
            chunk = steps - 1 - step
        place = ((first_slot + chunk) * N_HEADS + head).to(tl.int64)
        at_chunk = ((first_slot + chunk) * N_HEADS + head) * C
        row = chunk * C + at
        x_rows = load_rows(x, first + row, row < n_rows, values, head, x_stride, V).to(kind)
        if KEEPS or WRITES:
            narrow = state.to(kind)
        if KEEPS:
            at_kept = ((first_slot + chunk) * N_HEADS + head) * V_PAD + tile * BLOCK_V
            kept.store([at_kept, 0], narrow)
        if WRITES:
            if REVERSE:
                readers = keys.load([at_chunk, 0])
            else:
                readers = queries.load([at_chunk, 0])
            weights = pairs.load([at_chunk, 0])
            if not REVERSE:
                weights = tl.trans(weights)
            read = tl.dot(narrow, tl.trans(readers), input_precision=PRECISION)
            read = tl.dot(tl.trans(x_rows), weights, read, input_precision=PRECISION)
            store_rows(out, tl.trans(read), first + row, row < n_rows, values, head, N_HEADS * V, V)
        if REVERSE:
            writers = queries.load([at_chunk, 0])
        else:
            writers = keys.load([at_chunk, 0])
        factor = tl.load(decay + place * K_PAD + channels)
        state = tl.dot(
            tl.trans(x_rows), writers, state * factor[None, :], input_precision=PRECISION
        )
        if DECAYS:
            passed = passed * factor
    if ENDS:
        tl.store(end + turned, state, mask=state_mask)
    if DECAYS and tile == 0:
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


def stream(
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
    keep: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """One direction over all spans.

    Args:
        x: [T, H, V] by rows: values forwards, the gradient of the outputs backwards.
        channels: K.
        start: [S, H, K, V] float32, the state before each span, or, backwards, the gradient of the
            one after it; None = zeros.
        end: [S, H, K, V] float32, written: the state after each span, or the gradient of the one
            before it.
        keep: return the state entering each chunk (backwards: its gradient at the chunk's end),
            [slots, H, V padded to tiles, K padded] of the products' kind.
        out: [T, H, V], written: outputs, or the gradient of the values.
    """
    n_heads, width = x.shape[1:]
    k_pad, wide = padded(channels), within.queries.dtype == torch.float32
    tracks = n_heads * (span_start.shape[0] - 1)
    states = start is not None or end is not None
    tile = stream_tile(k_pad, width, wide=wide, reverse=reverse, states=states, tracks=tracks)
    v_pad = ceil_div(width, tile.v) * tile.v
    sizes = {"N_HEADS": n_heads, "K": channels, "V": width}
    kept = None
    if keep:
        kept = room.scratch(chunks.n_chunks, n_heads, v_pad, k_pad, dtype=within.keys.dtype)

    def walk(
        start: torch.Tensor | None,
        end: torch.Tensor | None,
        decays: torch.Tensor | None,
        kept: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> None:
        none = within.decay  # stands for what is not wanted
        rows = TensorDescriptor.from_tensor(within.pairs.view(-1, CHUNK), [CHUNK, CHUNK])
        queries, keys = (
            TensorDescriptor.from_tensor(t.view(-1, k_pad), [CHUNK, k_pad])
            for t in (within.queries, within.keys)
        )
        if kept is None:
            into = queries
        else:
            into = TensorDescriptor.from_tensor(kept.view(-1, k_pad), [tile.v, k_pad])
        grid = (ceil_div(width, tile.v), n_heads, chunks.n_segments)
        room.launch(
            _stream_kernel, grid,
            x, queries, keys, rows, within.decay, chunks.segments,
            *(none if t is None else t for t in (start, end, decays)), into,
            none if out is None else out, x.stride(0),
            K_PAD=k_pad, V_PAD=v_pad, C=CHUNK, BLOCK_V=tile.v, REVERSE=reverse,
            PRECISION="tf32x3" if wide else "tf32",
            STARTS=start is not None, ENDS=end is not None, DECAYS=decays is not None,
            KEEPS=kept is not None, WRITES=out is not None,
            warps=tile.warps, stages=tile.stages, **sizes,
        )  # fmt: skip

    if not chunks.segment_rows:
        walk(start, end, None, kept, out)
        return kept
    states = room.scratch(chunks.n_segments, n_heads, channels, width, dtype=torch.float32)
    decays = room.scratch(chunks.n_segments, n_heads, channels, dtype=torch.float32)
    walk(None, states, decays, None, None)
    block_k, block_v = min(16, k_pad), min(128, padded(width))
    grid = ceil_div(channels, block_k) * ceil_div(width, block_v)
    room.launch(
        _scan_kernel, (grid, n_heads, span_start.shape[0] - 1),
        states, decays, states if start is None else start, states if end is None else end,
        span_start, SEGMENT_ROWS=chunks.segment_rows, BLOCK_K=block_k, BLOCK_V=block_v,
        REVERSE=reverse, STARTS=start is not None, ENDS=end is not None,
        warps=4, stages=2, **sizes,
    )  # fmt: skip
    if kept is not None or out is not None:
        walk(states, None, None, kept, out)
    return kept
