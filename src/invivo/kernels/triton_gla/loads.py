"""What the kernels of this folder share: reading tiles and log gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from invivo.kernels.triton_gla.tables import FLOOR, LOG2E


def by_rows(x: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] with the heads of a row next to each other; rows may lie at any stride."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] by rows so that tensor descriptors can describe it: in steps of 16 bytes."""
    steps = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if steps else x.contiguous()


@triton.jit
def load_rows(x, row, real, dims, head, stride, WIDTH: tl.constexpr):
    """[rows, dims] of one head of x [T, H, WIDTH]; zeros where not ``real`` or beyond WIDTH."""
    place = x + row.to(tl.int64)[:, None] * stride + (head * WIDTH + dims)[None, :]
    return tl.load(place, mask=real[:, None] & (dims < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(x, value, row, real, dims, head, stride, WIDTH: tl.constexpr):
    place = x + row.to(tl.int64)[:, None] * stride + (head * WIDTH + dims)[None, :]
    mask = real[:, None] & (dims < WIDTH)[None, :]
    tl.store(place, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def log2_gates(raw, tau, FROM_LOGITS: tl.constexpr):
    """Log gates in units of log 2, float32, from natural ones or from logits; NaN stays NaN."""
    x = raw.to(tl.float32)
    if FROM_LOGITS:
        # log sigmoid(x) = min(x, 0) - log(1 + exp(-|x|))
        x = (tl.minimum(x, 0.0) * LOG2E - tl.log2(1.0 + tl.exp2(-tl.abs(x) * LOG2E))) / tau
    else:
        x = x * LOG2E
    return tl.maximum(x, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_gates(
    g, row, real, dims, head, stride, tau, WIDTH: tl.constexpr, FROM_LOGITS: tl.constexpr
):
    """Log gates [rows, dims] in units of log 2; 0 (nothing decays) where there is no gate."""
    gates = log2_gates(load_rows(g, row, real, dims, head, stride, WIDTH), tau, FROM_LOGITS)
    if FROM_LOGITS:  # otherwise what is read there is 0 already
        there = real[:, None] & (dims < WIDTH)[None, :]
        gates = tl.where(there, gates, 0.0)
    return gates


@triton.jit
def running(x, ones, REVERSE: tl.constexpr, PARTS: tl.constexpr):
    """Sums of the rows of x up to each row (REVERSE: from it on).

    By products with ``ones`` (see ``Chunks``), of PARTS numbers of bfloat16 that make up each of x:
    faster than a scan, and of 3 with the digits of float32. PARTS 0: by a scan.
    """
    if PARTS == 0:
        return tl.cumsum(x, 0, reverse=REVERSE)
    total = tl.zeros(x.shape, tl.float32)
    for _ in tl.static_range(PARTS):
        part = truncated(x)
        total = tl.dot(tl.trans(ones) if REVERSE else ones, part.to(tl.bfloat16), total)
        x -= part
    return total


@triton.jit
def truncated(x):
    """The digits of x that bfloat16 holds, still in float32: a cheaper instruction than rounding
    where the rest is wanted too."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def halves(x):
    """[2 C, K] as its first and its second C rows."""
    rows: tl.constexpr = x.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(x, [2, rows, x.shape[1]]), [1, 2, 0]))


@triton.jit
def anchored(gates):
    """Of log gates [C, K]: their sums, the last, the middle of their range, and the range."""
    last, middle, span = ends(gates)
    return tl.cumsum(gates, 0), last, middle, span


@triton.jit
def ends(gates):
    """Of log gates [C, K]: the last of their sums, the middle of the sums' range, and the range."""
    last = tl.sum(gates, 0)
    first = tl.sum(tl.where((tl.arange(0, gates.shape[0]) == 0)[:, None], gates, 0.0), 0)
    return last, (first + last) * 0.5, first - last
