"""RMS normalisation on GPUs, with the residual addition before it in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


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
    width_pad = triton.next_power_of_2(width)
    if rows.shape[0]:
        _rms_norm_kernel[(rows.shape[0],)](
            rows, before, weight, normed, total, rows.stride(0), before.stride(0), eps,
            D=width, D_PAD=width_pad, ADD=residual is not None, UNIT_OFFSET=unit_offset,
            num_warps=max(1, min(8, width_pad // 512)),
        )  # fmt: skip
    return normed.view(x.shape), x if residual is None else total.view(x.shape)
