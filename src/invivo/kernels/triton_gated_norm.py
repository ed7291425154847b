"""RMS norm of heads times a swish gate on GPUs: one kernel each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from invivo.kernels.rounding import ceil_div, power_of_2
from invivo.kernels.triton_replay import Room, Tensors, run

TILE = 2048  # numbers a program holds of each tensor at a time
PROGRAMS = 528  # of the backward, which each add up a part of the weight's gradient


@triton.jit(do_not_specialize=["n_rows"])
def _gated_norm_kernel(
    z, r, weight, out, n_rows, eps, V: tl.constexpr, V_PAD: tl.constexpr, ROWS: tl.constexpr
):
    """Some heads: grid (cdiv(n_rows, ROWS),); a row is one head of one token."""
    row, dims = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, V_PAD)
    mask = (row < n_rows)[:, None] & (dims < V)[None, :]
    place = row.to(tl.int64)[:, None] * V + dims[None, :]
    kind = out.dtype.element_ty
    x = tl.load(z + place, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + dims, mask=dims < V, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / V + eps)
    normed = (x * scale[:, None] * w[None, :]).to(kind).to(tl.float32)
    gate = tl.load(r + place, mask=mask, other=0.0).to(tl.float32)
    active = (gate * tl.sigmoid(gate)).to(kind).to(tl.float32)
    tl.store(out + place, (normed * active).to(kind), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _gated_norm_backward_kernel(
    dy, z, r, weight, dz, dr, d_weight, n_rows, eps,
    V: tl.constexpr, V_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Every so many heads: grid (programs,); d_weight [programs, V] takes each one's sum."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    dims = tl.arange(0, V_PAD)
    w = tl.load(weight + dims, mask=dims < V, other=0.0).to(tl.float32)
    total = tl.zeros([V_PAD], tl.float32)
    for begin in range(program * ROWS, n_rows, programs * ROWS):
        row = begin + tl.arange(0, ROWS)
        mask = (row < n_rows)[:, None] & (dims < V)[None, :]
        place = row.to(tl.int64)[:, None] * V + dims[None, :]
        x = tl.load(z + place, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / V + eps)[:, None]
        normed = x * scale
        gate = tl.load(r + place, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + place, mask=mask, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        d_gate = grad * normed * w[None, :] * share * (1.0 + gate * (1.0 - share))
        tl.store(dr + place, d_gate.to(dr.dtype.element_ty), mask=mask)
        grad = grad * gate * share
        total += tl.sum(grad * normed, 0)
        grad = grad * w[None, :]
        inner = tl.sum(grad * normed, 1) / V
        out = scale * (grad - normed * inner[:, None])
        tl.store(dz + place, out.to(dz.dtype.element_ty), mask=mask)
    tl.store(d_weight + program * V + dims, total, mask=dims < V)


def gated_norm_triton(
    z: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The function of ``gated_norm_reference``."""
    if r.numel() == 0:
        return torch.empty_like(r)
    (out,) = run(_forward, eps, z.contiguous(), r.contiguous(), weight)
    assert out is not None
    return out


def gated_norm_backward_triton(
    dy: torch.Tensor, z: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The function of ``gated_norm_backward_reference``."""
    if r.numel() == 0:
        return torch.empty_like(z), torch.empty_like(r), torch.zeros_like(weight)
    rows = (x.contiguous() for x in (z, r, dy))
    dz, dr, d_weight = run(_backward, eps, *rows, weight)
    assert dz is not None
    assert dr is not None
    assert d_weight is not None
    return dz, dr, d_weight.sum(0).to(weight.dtype)


def _forward(
    room: Room, eps: float, z: torch.Tensor, r: torch.Tensor, weight: torch.Tensor
) -> Tensors:
    n_rows, sizes = _sizes(z)
    out = room.result(r.shape, r.dtype)
    room.launch(
        _gated_norm_kernel, (ceil_div(n_rows, sizes["ROWS"]),), z, r, weight, out, n_rows, eps,
        warps=4, stages=2, **sizes,
    )  # fmt: skip
    return (out,)


def _backward(
    room: Room,
    eps: float,
    z: torch.Tensor,
    r: torch.Tensor,
    dy: torch.Tensor,
    weight: torch.Tensor,
) -> Tensors:
    n_rows, sizes = _sizes(z)
    dz, dr = room.result(z.shape, z.dtype), room.result(r.shape, r.dtype)
    programs = min(PROGRAMS, ceil_div(n_rows, sizes["ROWS"]))
    d_weight = room.result((programs, sizes["V"]), torch.float32)
    room.launch(
        _gated_norm_backward_kernel, (programs,), dy, z, r, weight, dz, dr, d_weight, n_rows, eps,
        warps=4, stages=2, **sizes,
    )  # fmt: skip
    return dz, dr, d_weight


def _sizes(z: torch.Tensor) -> tuple[int, dict[str, int]]:
    """Heads of all tokens, and the kernels' constants."""
    width = z.shape[-1]
    padded = power_of_2(width)
    rows = max(1, TILE // padded)
    return z.numel() // width, {"V": width, "V_PAD": padded, "ROWS": rows}
