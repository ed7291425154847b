"""RMS normalisation on GPUs, with the residual addition before it in the same pass."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from invivo.kernels.rounding import power_of_2
from invivo.kernels.triton_launch import Launch


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, normed, total, x_stride, residual_stride, eps,
    D: tl.constexpr, D_PAD: tl.constexpr, ADD: tl.constexpr, UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    """One row a program: grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, D_PAD)
    mask = dims < D
    value = tl.load(x + row * x_stride + dims, mask=mask, other=0.0)
    kind = value.dtype
    if ADD:
        before = tl.load(residual + row * residual_stride + dims, mask=mask, other=0.0)
        value = (value.to(tl.float32) + before.to(tl.float32)).to(kind)
        tl.store(total + row * D + dims, value, mask=mask)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    w = tl.load(weight + dims, mask=mask, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        out = wide * scale * (1.0 + w)
    else:
        out = (wide * scale).to(kind).to(tl.float32) * w
    tl.store(normed + row * D + dims, out.to(kind), mask=mask)


def rms_norm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rms_norm(x + residual), x + residual)``, or ``(rms_norm(x), x)`` without a residual.

    x [..., d] of float32, bfloat16 or float16; rounds where ``rms_norm_reference`` does.
    """
    rows = _rows(x)
    before = rows if residual is None else _rows(residual)
    n_rows, width = rows.shape
    normed = torch.empty((n_rows, width), dtype=x.dtype, device=x.device)
    total = rows if residual is None else torch.empty_like(normed)
    if n_rows:
        _forward_launch(width, residual is not None, unit_offset)(
            (n_rows,),
            rows, before, weight, normed, total, rows.stride(0), before.stride(0), eps,
        )  # fmt: skip
    if rows is x:
        return normed, total
    return normed.view(x.shape), x if residual is None else total.view(x.shape)


@cache
def _forward_launch(width: int, add: bool, unit_offset: bool) -> Launch:
    return Launch(_rms_norm_kernel, ADD=add, UNIT_OFFSET=unit_offset, **_sizes(width))


@cache
def _backward_launch(width: int, add: bool, unit_offset: bool) -> Launch:
    return Launch(_rms_norm_backward_kernel, ADD=add, UNIT_OFFSET=unit_offset, **_sizes(width))


def _sizes(width: int) -> dict[str, int]:
    pad = power_of_2(width)
    return {"D": width, "D_PAD": pad, "num_warps": max(1, min(8, pad // 512))}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., d] as [n, d]: a view where rows lie at one stride, as queries in qkv do not."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


@triton.jit
def _rms_norm_backward_kernel(
    dy, x, weight, beside, dx, dy_stride, x_stride, beside_stride, eps,
    D: tl.constexpr, D_PAD: tl.constexpr, ADD: tl.constexpr, UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    """One row a program: grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, D_PAD)
    mask = dims < D
    value = tl.load(x + row * x_stride + dims, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * dy_stride + dims, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(weight + dims, mask=mask, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        factor += 1.0
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    normed = value * scale
    grad = grad * factor
    out = (grad - normed * (tl.sum(grad * normed, 0) / D)) * scale
    if ADD:
        out += tl.load(beside + row * beside_stride + dims, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + row * D + dims, out.to(dx.dtype.element_ty), mask=mask)


def rms_norm_backward_triton(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    beside: torch.Tensor | None = None,
) -> torch.Tensor:
    """The function of ``rms_norm_backward_reference``, rounded once."""
    dy_rows, rows = _rows(dy), _rows(x)
    added = rows if beside is None else _rows(beside)
    n_rows, width = rows.shape
    dx = torch.empty((n_rows, width), dtype=x.dtype, device=x.device)
    if n_rows:
        _backward_launch(width, beside is not None, unit_offset)(
            (n_rows,),
            dy_rows, rows, weight, added, dx,
            dy_rows.stride(0), rows.stride(0), added.stride(0), eps,
        )  # fmt: skip
    return dx if rows is x else dx.view(x.shape)
