"""Gated activations on GPUs in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

KINDS = {
    "silu": 0, "swish": 0, "gelu_tanh": 1, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2,
    "relu": 3, "relu2": 4,
}  # fmt: skip
BLOCK = 1024


@triton.jit
def _gated_kernel(gate_up, out, stride, WIDTH: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr):
    """Part of one row: grid (rows, cdiv(WIDTH, N))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    mask = column < WIDTH
    gate = tl.load(gate_up + row * stride + column, mask=mask, other=0.0)
    up = tl.load(gate_up + row * stride + WIDTH + column, mask=mask, other=0.0)
    g = gate.to(tl.float32)
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
    value = active.to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * WIDTH + column, value.to(gate.dtype), mask=mask)


def gated_activation_triton(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """The function of ``gated_activation_reference`` for [T, 2 f] of one of :data:`KINDS`."""
    n_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((n_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if n_rows:
        _gated_kernel[(n_rows, triton.cdiv(width, BLOCK))](
            gate_up, out, gate_up.stride(0), WIDTH=width, KIND=KINDS[kind], N=BLOCK, num_warps=4
        )
    return out
