"""Steps of the training pass with a written-out backward: one kernel each way on a GPU.

Plain autograd takes several kernels for each and keeps what lies between them. Under torch.compile
the plain forms are taken, which the compiler fuses itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from invivo.kernels.activation import gated_activation, gated_activation_reference
from invivo.kernels.activation_backward import gated_activation_gradient
from invivo.kernels.gated_norm import gated_norm, gated_norm_backward, gated_norm_reference
from invivo.kernels.rotary import rotary_rows, turn_heads, turn_rows

InDtype = Callable[[torch.Tensor], torch.Tensor]


def in_dtype(module: nn.Module, dtype: torch.dtype) -> InDtype:
    """A module's parameters in the dtype of the products, each by the parameter itself.

    All are cast at once where they are float32 masters, and their gradients back at once.
    """
    if torch.compiler.is_compiling():
        return lambda parameter: parameter.to(dtype)
    parameters = tuple(module.parameters())
    if all(p.dtype == dtype for p in parameters):
        return lambda parameter: parameter
    made: tuple[torch.Tensor, ...] = _Cast.apply(dtype, *parameters)  # type: ignore[no-untyped-call]
    by_parameter = dict(zip(map(id, parameters), made, strict=True))
    return lambda parameter: by_parameter[id(parameter)]


def gated(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """:func:`~invivo.kernels.activation.gated_activation_reference` of [R, 2 f], which alone is
    kept."""
    if torch.compiler.is_compiling():
        return gated_activation_reference(gate_up, kind)
    out: torch.Tensor = _Gated.apply(gate_up, kind)  # type: ignore[no-untyped-call]
    return out


def normed_and_gated(
    z: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """:func:`~invivo.kernels.gated_norm.gated_norm_reference`; its inputs alone are kept."""
    if torch.compiler.is_compiling():
        return gated_norm_reference(z, r, weight, eps)
    out: torch.Tensor = _GatedNorm.apply(z, r, weight, eps)  # type: ignore[no-untyped-call]
    return out


def turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """x [R, heads, D] turned by the angles of its rows; nothing is kept but those."""
    if torch.compiler.is_compiling():
        return turn_rows(x, *rotary_rows(cos, sin, positions))
    out: torch.Tensor = _Turned.apply(x, cos, sin, positions)  # type: ignore[no-untyped-call]
    return out


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [p.dtype for p in parameters]
        made = [torch.empty_like(p, dtype=dtype) for p in parameters]
        torch._foreach_copy_(made, list(parameters))
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        there = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        made = [torch.empty_like(grad, dtype=ctx.dtypes[i]) for i, grad in there]
        if there:
            torch._foreach_copy_(made, [grad for _, grad in there])
        back: list[torch.Tensor | None] = [None] * len(grads)
        for (i, _), grad in zip(there, made, strict=True):
            back[i] = grad
        return None, *back


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
        return gated_activation_gradient(dy, gate_up, ctx.kind), None


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        ctx.save_for_backward(z, r, weight)
        ctx.eps = eps
        return gated_norm(z, r, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, r, weight = ctx.saved_tensors
        return *gated_norm_backward(dy.contiguous(), z, r, weight, ctx.eps), None


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
