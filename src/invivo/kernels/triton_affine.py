"""Elements kept or dropped, multiplied and shifted on GPUs, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from invivo.kernels.rounding import ceil_div, power_of_2

BLOCK = 1024


@triton.jit
def _affine_kernel(
    x, kept, factor, shift, out, x_stride, WIDTH: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Part of one row: grid (rows, cdiv(WIDTH, N)). All but ``x`` are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    mask = column < WIDTH
    at = row * WIDTH + column
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    stays = tl.load(kept + at, mask=mask, other=0) != 0
    wide = tl.where(stays, value.to(tl.float32), 0.0)
    by = tl.load(factor + at, mask=mask, other=0.0).to(tl.float32)
    plus = tl.load(shift + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (wide * by + plus).to(value.dtype), mask=mask)


def affine_triton(
    x: torch.Tensor, kept: torch.Tensor, factor: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """The function of ``affine_reference``, rounded once.

    x [T, ...] of float32, bfloat16 or float16, its rows at one stride; the others contiguous.
    """
    rows = x.reshape(x.shape[0], -1)  # a view where rows lie at one stride
    width = rows.shape[1]
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    block = min(BLOCK, power_of_2(width))
    if out.numel():
        _affine_kernel[(rows.shape[0], ceil_div(width, block))](
            rows, kept.view(torch.uint8), factor, shift, out, rows.stride(0), WIDTH=width, N=block
        )
    return out.view(x.shape)
