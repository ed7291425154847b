"""Gradient of a window's attention on Hopper-class GPUs.

Keys and values are gathered out of their pages once; probabilities are made again tile by tile
from queries, keys and log-sum-exp. One kernel walks over the keys of each tile of rows (gradient
of the queries), one over the rows of each tile of keys (gradients of keys and values): every sum
has one owner, so that the result does not change from run to run. Where there are too few tiles
of keys to fill the device, each query head sums for itself first.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from invivo.kernels.attention_backward import gather_text
from invivo.kernels.rounding import ceil_div, power_of_2
from invivo.kernels.triton_launch import Launch

LOG2E = tl.constexpr(1.4426950408889634)
# Programs to aim at: a few for each of the 132 multiprocessors of an H200.
PROGRAMS = 528
SUMMED = 1024  # numbers that one program adds up


class Tile(NamedTuple):
    """Launch shape: rows of queries, keys, warps, pipeline stages."""

    m: int
    n: int
    warps: int
    stages: int


def tile_of(head_dim: int, dtype: torch.dtype) -> Tile:
    """Tile of both kernels; two sums of [n, head_dim] must fit the registers."""
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1)
    if head_dim <= 128:
        return Tile(64, 64, 4, 2)
    return Tile(32, 32, 8, 1)


@triton.jit
def _load(rows, index, head, stride, real, D: tl.constexpr, D_PAD: tl.constexpr,
          UPCAST: tl.constexpr):  # fmt: skip
    """[rows, D_PAD] of one head; zeros where not ``real``."""
    dims = tl.arange(0, D_PAD)
    place = rows + index.to(tl.int64)[:, None] * stride + (head * D + dims)[None, :]
    value = tl.load(place, mask=real[:, None] & (dims < D)[None, :], other=0.0)
    if UPCAST:
        value = value.to(tl.float32)
    return value


@triton.jit
def _probabilities(
    scores, lse, index, keys, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Probabilities, and the factor from the gradient of capped scores to that of plain ones.

    scores: products of queries and keys, either way round; lse, index (of the rows) and keys
    broadcast against it.
    """
    slope = scale
    if SOFTCAP:
        turned = 2.0 * tl.sigmoid(scores * (2.0 * scale / softcap)) - 1.0  # tanh
        capped = softcap * turned
        slope = scale * (1.0 - turned * turned)
    else:
        capped = scores * scale
    probs = tl.exp2((capped - lse) * LOG2E)
    seen = keys <= index
    if WINDOW > 0:
        seen = seen & (index - keys < WINDOW)
    return tl.where(seen, probs, 0.0), slope


@triton.jit(do_not_specialize=["start", "n_rows"])
def _query_kernel(
    q, k, v, z, dz, dq, lse, delta, scale, softcap, start, n_rows, q_stride, dz_stride, z_stride,
    N_HEADS: tl.constexpr, REPEAT: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries of one head, and rowsum(dz z). Grid (tiles, N_HEADS)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    head = tl.program_id(1)
    group = head // REPEAT
    kv_stride: tl.constexpr = N_HEADS // REPEAT * D
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < n_rows
    index = start + row
    queries = _load(q, row, head, q_stride, real, D, D_PAD, UPCAST)
    d_mixed = _load(dz, row, head, dz_stride, real, D, D_PAD, UPCAST)
    mixed = _load(z, row, head, z_stride, real, D, D_PAD, UPCAST)
    row_delta = tl.sum(d_mixed.to(tl.float32) * mixed.to(tl.float32), 1)
    tl.store(delta + row * N_HEADS + head, row_delta, mask=real)
    row_lse = tl.load(lse + row * N_HEADS + head, mask=real, other=0.0)

    stop = start + n_rows
    end = tl.minimum(start + (tile + 1) * BLOCK_M, stop)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(start + tile * BLOCK_M + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
    total = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for begin in range(first, end, BLOCK_N):
        keys = begin + tl.arange(0, BLOCK_N)
        there = keys < stop
        key_rows = _load(k, keys, group, kv_stride, there, D, D_PAD, UPCAST)
        value_rows = _load(v, keys, group, kv_stride, there, D, D_PAD, UPCAST)
        scores = tl.dot(queries, tl.trans(key_rows), input_precision="ieee")
        probs, slope = _probabilities(
            scores, row_lse[:, None], index[:, None], keys[None, :], scale, softcap,
            WINDOW, SOFTCAP,
        )  # fmt: skip
        d_probs = tl.dot(d_mixed, tl.trans(value_rows), input_precision="ieee")
        d_scores = probs * (d_probs - row_delta[:, None]) * slope
        total = tl.dot(d_scores.to(key_rows.dtype), key_rows, total, input_precision="ieee")
    dims = tl.arange(0, D_PAD)
    place = dq + row.to(tl.int64)[:, None] * (N_HEADS * D) + (head * D + dims)[None, :]
    tl.store(place, total.to(dq.dtype.element_ty), mask=real[:, None] & (dims < D)[None, :])


@triton.jit(do_not_specialize=["start", "n_rows", "first_key", "n_keys"])
def _key_kernel(
    q, k, v, dz, dk, dv, lse, delta, scale, softcap, start, n_rows, first_key, n_keys,
    q_stride, dz_stride,
    N_HEADS: tl.constexpr, REPEAT: tl.constexpr, EACH: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values by EACH of the query heads that read them.

    dk, dv: [REPEAT / EACH, n_keys, groups, D] float32, added to where EACH == REPEAT and
    written elsewhere. Keys count from ``first_key`` there. Grid (tiles, N_HEADS / EACH).
    """
    part = tl.program_id(1)
    parts: tl.constexpr = REPEAT // EACH
    group = part // parts
    kv_stride: tl.constexpr = N_HEADS // REPEAT * D
    local = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = first_key + local
    there = local < n_keys
    key_rows = _load(k, keys, group, kv_stride, there, D, D_PAD, UPCAST)
    value_rows = _load(v, keys, group, kv_stride, there, D, D_PAD, UPCAST)
    low = first_key + tl.program_id(0) * BLOCK_N
    begin = tl.maximum(low - start, 0) // BLOCK_M * BLOCK_M
    end = n_rows
    if WINDOW > 0:
        end = tl.minimum(n_rows, low + BLOCK_N - 1 + WINDOW - start)
    sum_k = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    sum_v = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    # One loop over heads and rows: nested ones leave too few registers.
    steps = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M)
    for step in range(steps * EACH):
        head = part * EACH + step // steps
        at = begin + step % steps * BLOCK_M
        row = at + tl.arange(0, BLOCK_M)
        real = row < n_rows
        queries = _load(q, row, head, q_stride, real, D, D_PAD, UPCAST)
        d_mixed = _load(dz, row, head, dz_stride, real, D, D_PAD, UPCAST)
        row_lse = tl.load(lse + row * N_HEADS + head, mask=real, other=0.0)
        # Keys by rows: what comes out feeds the next product from registers.
        scores = tl.dot(key_rows, tl.trans(queries), input_precision="ieee")
        probs, slope = _probabilities(
            scores, row_lse[None, :], (start + row)[None, :], keys[:, None], scale, softcap,
            WINDOW, SOFTCAP,
        )  # fmt: skip
        # Rows beyond the window are zeros in dz and q, but their exponentials may overflow.
        probs = tl.where(real[None, :], probs, 0.0)
        if WANT_V:
            sum_v = tl.dot(probs.to(d_mixed.dtype), d_mixed, sum_v, input_precision="ieee")
        if WANT_K:
            row_delta = tl.load(delta + row * N_HEADS + head, mask=real, other=0.0)
            d_probs = tl.dot(value_rows, tl.trans(d_mixed), input_precision="ieee")
            d_scores = probs * (d_probs - row_delta[None, :]) * slope
            sum_k = tl.dot(d_scores.to(queries.dtype), queries, sum_k, input_precision="ieee")
    dims = tl.arange(0, D_PAD)
    mask = there[:, None] & (dims < D)[None, :]
    place = (part % parts * n_keys + local).to(tl.int64)[:, None] * kv_stride
    place = place + (group * D + dims)[None, :]
    if WANT_K:
        if parts == 1:
            sum_k += tl.load(dk + place, mask=mask, other=0.0)
        tl.store(dk + place, sum_k, mask=mask)
    if WANT_V:
        if parts == 1:
            sum_v += tl.load(dv + place, mask=mask, other=0.0)
        tl.store(dv + place, sum_v, mask=mask)


@triton.jit
def _sum_kernel(
    parts, other_parts, total, other, n,
    PARTS: tl.constexpr, FRESH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Add the parts [PARTS, n] of one sum. Grid (cdiv(n, N), 1 or both sums)."""
    source, target = parts, total
    if tl.program_id(1) == 1:
        source, target = other_parts, other
    place = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask = place < n
    value = tl.load(source + place, mask=mask)
    for part in range(1, PARTS):
        value += tl.load(source + part * n.to(tl.int64) + place, mask=mask)
    if not FRESH:
        value += tl.load(target + place, mask=mask)
    tl.store(target + place, value, mask=mask)


@cache
def _sum_launch(parts: int, fresh: bool) -> Launch:
    return Launch(_sum_kernel, PARTS=parts, FRESH=fresh, N=SUMMED, num_warps=4)


def attention_backward_triton(
    dz: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    blocks: torch.Tensor,
    start: int,
    z: torch.Tensor | None,
    lse: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    fresh: bool = False,
) -> torch.Tensor | None:
    """The function of ``attention_backward_reference``; no host reads.

    Rows of dz, q and z may be strided; lse, dk and dv are contiguous float32.
    """
    n_rows, n_heads, head_dim = q.shape
    n_groups, stop = k_cache.shape[2], start + n_rows
    dz, q = _by_rows(dz), _by_rows(q)
    repeat = n_heads // n_groups
    # Keys before the first that a row of the window sees have no gradient.
    low = 0 if window is None else max(0, start - window + 1)
    k, v = gather_text(k_cache, v_cache, blocks, stop)
    tile = tile_of(head_dim, q.dtype)
    shape = Shape(n_heads, n_groups, head_dim, q.dtype, window or 0, softcap is not None, q.is_cpu)
    cap = 1.0 if softcap is None else softcap
    dq = None
    delta = torch.empty_like(lse)
    if z is not None:
        z = _by_rows(z)
        dq = torch.empty((n_rows, n_heads, head_dim), dtype=q.dtype, device=q.device)
        _query_launch(shape)(
            (ceil_div(n_rows, tile.m), n_heads),
            q, k, v, z, dz, dq, lse, delta, scale, cap, start, n_rows,
            q.stride(0), dz.stride(0), z.stride(0),
        )  # fmt: skip
    if dk is None and dv is None:
        return dq
    assert dk is None or z is not None, "the gradient of keys reads z"
    n_keys = stop - low
    tiles = ceil_div(n_keys, tile.n)
    each = repeat if tiles * n_groups >= PROGRAMS else 1
    into = [_between(total, low, stop) for total in (dk, dv)]
    sums = into
    if fresh and (each == repeat or low > 0):  # where not all of it is written below
        for total in (dk, dv):
            if total is not None:
                total[:stop] = 0.0
    if each < repeat:
        size = (repeat // each, n_keys, n_groups, head_dim)
        sums = [
            None if total is None else torch.empty(size, dtype=torch.float32, device=q.device)
            for total in into
        ]
    nothing = lse  # stands for a sum that nobody wants
    _key_launch(shape, each, dk is not None, dv is not None)(
        (tiles, n_heads // each),
        q, k, v, dz, *(nothing if total is None else total for total in sums), lse, delta,
        scale, cap, start, n_rows, low, n_keys, q.stride(0), dz.stride(0),
    )  # fmt: skip
    if each < repeat:
        pairs = [(a, b) for a, b in zip(sums, into, strict=True) if a is not None and b is not None]
        (parts, total), (other_parts, other) = pairs[0], pairs[-1]
        _sum_launch(repeat // each, fresh)(
            (ceil_div(total.numel(), SUMMED), len(pairs)),
            parts, other_parts, total, other, total.numel(),
        )  # fmt: skip
    return dq


class Shape(NamedTuple):
    """What both kernels are compiled for; window 0 is none."""

    n_heads: int
    n_groups: int
    head_dim: int
    dtype: torch.dtype
    window: int
    softcap: bool
    on_cpu: bool

    def sizes(self) -> dict[str, int | bool]:
        tile = tile_of(self.head_dim, self.dtype)
        return {
            "N_HEADS": self.n_heads,
            "REPEAT": self.n_heads // self.n_groups,
            "D": self.head_dim,
            "D_PAD": max(16, power_of_2(self.head_dim)),
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "WINDOW": self.window,
            "SOFTCAP": self.softcap,
            # The interpreter cannot multiply bfloat16 matrices.
            "UPCAST": self.on_cpu and self.dtype == torch.bfloat16,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


@cache
def _query_launch(shape: Shape) -> Launch:
    return Launch(_query_kernel, **shape.sizes())


@cache
def _key_launch(shape: Shape, each: int, want_k: bool, want_v: bool) -> Launch:
    return Launch(_key_kernel, EACH=each, WANT_K=want_k, WANT_V=want_v, **shape.sizes())


def _between(total: torch.Tensor | None, low: int, stop: int) -> torch.Tensor | None:
    return total if total is None or total.shape[0] == stop - low else total[low:stop]


def _by_rows(x: torch.Tensor) -> torch.Tensor:
    """x [s, H, D] with the heads of a row next to each other."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
