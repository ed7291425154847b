"""Pointwise steps of the training pass with a written-out backward: one kernel each way on a GPU.

Plain autograd takes several kernels for each and keeps what lies between them. Under torch.compile
the plain forms are taken, which the compiler fuses itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from invivo.kernels.activation import gated_activation, gated_activation_reference
from invivo.kernels.activation_backward import gated_activation_backward
from invivo.kernels.rotary import rotary_rows, turn_heads, turn_rows


def gated(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """:func:`~invivo.kernels.activation.gated_activation_reference` of [R, 2 f], which alone is
    kept."""
    if torch.compiler.is_compiling():
        return gated_activation_reference(gate_up, kind)
    out: torch.Tensor = _Gated.apply(gate_up, kind)  # type: ignore[no-untyped-call]
    return out


def turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """x [R, heads, D] turned by the angles of its rows; nothing is kept but those."""
    if torch.compiler.is_compiling():
        return turn_rows(x, *rotary_rows(cos, sin, positions))
    out: torch.Tensor = _Turned.apply(x, cos, sin, positions)  # type: ignore[no-untyped-call]
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.kind = kind
        return gated_activation(gate_up, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        # The kernel leaves the output in its dy, and this one is someone else's.
        dy = dy.clone(memory_format=torch.contiguous_format)
        gated_activation_backward(dy, gate, up, ctx.kind, out)
        return out, None


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin, positions)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        turn_heads(x, cos, sin, positions, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        turn_heads(dy.contiguous(), cos, sin, positions, dx, backward=True)
        return dx, None, None, None
