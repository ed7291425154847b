"""Gated activations on GPUs in one pass."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from invivo.kernels.rounding import ceil_div
from invivo.kernels.triton_launch import Launch

KINDS = {
    "silu": 0, "swish": 0, "gelu_tanh": 1, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2,
    "relu": 3, "relu2": 4,
}  # fmt: skip
BLOCK = 1024


@triton.jit
def _active(g, KIND: tl.constexpr):
    """The activation of g, float32."""
    if KIND == 0:
        active = g * tl.sigmoid(g)
    elif KIND == 1:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        active = g * tl.sigmoid(2.0 * inner)  # 0.5 (1 + tanh t) = sigmoid(2 t)
    elif KIND == 2:
        active = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:
        active = tl.maximum(g, 0.0)
        if KIND == 4:
            active = active * active
    return active


@triton.jit
def _slope(g, KIND: tl.constexpr):
    """The activation's derivative at g, float32."""
    if KIND == 0:
        s = tl.sigmoid(g)
        slope = s * (1.0 + g * (1.0 - s))
    elif KIND == 1:
        s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        slope = s * (1.0 + g * (1.0 - s) * inner)
    elif KIND == 2:
        bell = 0.3989422804014327 * tl.exp(-0.5 * g * g)
        slope = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476)) + g * bell
    else:
        slope = tl.where(g > 0.0, 1.0, 0.0)
        if KIND == 4:
            slope = 2.0 * tl.maximum(g, 0.0)
    return slope


@triton.jit
def _gated_kernel(gate_up, out, stride, WIDTH: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr):
    """Part of one row: grid (rows, cdiv(WIDTH, N))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    mask = column < WIDTH
    gate = tl.load(gate_up + row * stride + column, mask=mask, other=0.0)
    up = tl.load(gate_up + row * stride + WIDTH + column, mask=mask, other=0.0)
    active = _active(gate.to(tl.float32), KIND)
    value = active.to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * WIDTH + column, value.to(gate.dtype), mask=mask)


@triton.jit
def _gated_backward_kernel(
    dy, gate, up, y, out, dy_stride, gate_stride, up_stride, out_stride,
    WIDTH: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr, WRITE_Y: tl.constexpr,
):  # fmt: skip
    """Part of one row: grid (rows, cdiv(WIDTH, N))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    mask = column < WIDTH
    plain = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dy + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
    kind = plain.dtype
    g = plain.to(tl.float32)
    active = _active(g, KIND).to(kind).to(tl.float32)
    if WRITE_Y:
        tl.store(y + row * WIDTH + column, (active * u).to(kind), mask=mask)
    tl.store(out + row * out_stride + column, (d * u * _slope(g, KIND)).to(kind), mask=mask)
    tl.store(out + row * out_stride + WIDTH + column, (d * active).to(kind), mask=mask)


def gated_activation_backward_triton(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str, out: torch.Tensor
) -> torch.Tensor:
    """The function of ``gated_activation_backward_reference``; y takes the place of ``dy``."""
    _backward(dy, gate, up, kind, out, write_y=True)
    return dy


def gated_activation_gradient_triton(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str, out: torch.Tensor
) -> None:
    """The same without y: ``dy`` stays."""
    _backward(dy, gate, up, kind, out, write_y=False)


def _backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    kind: str,
    out: torch.Tensor,
    *,
    write_y: bool,
) -> None:
    n_rows, width = dy.shape
    assert dy.is_contiguous()
    assert gate.stride(1) == up.stride(1) == out.stride(1) == 1
    if n_rows:
        _backward_launch(width, kind, write_y)(
            (n_rows, ceil_div(width, BLOCK)),
            dy, gate, up, dy, out, dy.stride(0), gate.stride(0), up.stride(0), out.stride(0),
        )  # fmt: skip


@cache
def _backward_launch(width: int, kind: str, write_y: bool) -> Launch:
    return Launch(
        _gated_backward_kernel,
        WIDTH=width, KIND=KINDS[kind], N=BLOCK, WRITE_Y=write_y, num_warps=4,
    )  # fmt: skip


def gated_activation_triton(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """The function of ``gated_activation_reference`` for [T, 2 f] of one of :data:`KINDS`."""
    n_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((n_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if n_rows:
        grid = (n_rows, ceil_div(width, BLOCK))
        _forward_launch(width, kind)(grid, gate_up, out, gate_up.stride(0))
    return out


@cache
def _forward_launch(width: int, kind: str) -> Launch:
    return Launch(_gated_kernel, WIDTH=width, KIND=KINDS[kind], N=BLOCK, num_warps=4)
