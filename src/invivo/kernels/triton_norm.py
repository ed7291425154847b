"""RMS normalisation on GPUs, with the residual addition before it in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from invivo.kernels.rounding import power_of_2


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
    width = x.shape[-1]
    rows = x.reshape(-1, width)  # a view where rows lie at one stride, as queries in qkv do not
    normed = torch.empty_like(rows, memory_format=torch.contiguous_format)
    before = rows if residual is None else residual.reshape(-1, width)
    total = rows if residual is None else torch.empty_like(normed)
    width_pad = power_of_2(width)
    if rows.shape[0]:
        _rms_norm_kernel[(rows.shape[0],)](
            rows, before, weight, normed, total, rows.stride(0), before.stride(0), eps,
            D=width, D_PAD=width_pad, ADD=residual is not None, UNIT_OFFSET=unit_offset,
            num_warps=max(1, min(8, width_pad // 512)),
        )  # fmt: skip
    return normed.view(x.shape), x if residual is None else total.view(x.shape)


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
    width = x.shape[-1]
    dy_rows, rows = dy.reshape(-1, width), x.reshape(-1, width)
    added = rows if beside is None else beside.reshape(-1, width)
    dx = torch.empty_like(rows, memory_format=torch.contiguous_format)
    width_pad = power_of_2(width)
    if rows.shape[0]:
        _rms_norm_backward_kernel[(rows.shape[0],)](
            dy_rows, rows, weight, added, dx,
            dy_rows.stride(0), rows.stride(0), added.stride(0), eps,
            D=width, D_PAD=width_pad, ADD=beside is not None, UNIT_OFFSET=unit_offset,
            num_warps=max(1, min(8, width_pad // 512)),
        )  # fmt: skip
    return dx.view(x.shape)
