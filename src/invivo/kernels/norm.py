"""Root-mean-square and layer normalisation over the last dimension.

The arithmetic is done in float32 (float64 for float64 inputs) and rounded once at the end, as
the Hub's Llama and Gemma models do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from invivo.kernels.device import runs_triton, wants_grad
from invivo.kernels.native import native_for


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool = False
) -> torch.Tensor:
    """``x / rms(x) * weight``; differentiable. x [..., d], weight [d].

    Args:
        unit_offset: the weight is stored minus one (Gemma): multiply by ``1 + weight``. The
            product is then rounded after, and not before, the multiplication.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return weight * normed.to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rms_norm(x + residual), x + residual)``; differentiable."""
    total = x + residual
    return rms_norm_reference(total, weight, eps, unit_offset=unit_offset), total


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool = False
) -> torch.Tensor:
    """:func:`rms_norm_reference`, by the fastest way for the device. x [..., d], weight [d]."""
    native = native_for(x, weight)
    if native is not None and x.is_contiguous():
        return native.add_rms_norm(x, None, weight, eps, unit_offset=unit_offset)[0]
    if _runs_lean(x, weight, unit_offset):
        return _rms_norm_lean(x, weight, eps)
    if runs_triton(x):
        from invivo.kernels.triton_norm import rms_norm_triton

        return rms_norm_triton(x, weight, eps, unit_offset=unit_offset)[0]
    return rms_norm_reference(x, weight, eps, unit_offset=unit_offset)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(normed, new_residual)`` of :func:`add_rms_norm_reference`, by the fastest way."""
    native = native_for(x, residual, weight)
    if native is not None and x.is_contiguous() and residual.is_contiguous():
        return native.add_rms_norm(x, residual, weight, eps, unit_offset=unit_offset)
    if _runs_lean(x, weight, unit_offset):
        total = x + residual
        return _rms_norm_lean(total, weight, eps), total
    if runs_triton(x, residual):
        from invivo.kernels.triton_norm import rms_norm_triton

        return rms_norm_triton(x, weight, eps, unit_offset=unit_offset, residual=residual)
    return add_rms_norm_reference(x, residual, weight, eps, unit_offset=unit_offset)


def _runs_lean(x: torch.Tensor, weight: torch.Tensor, unit_offset: bool) -> bool:
    """Whether :func:`_rms_norm_lean` gives the same: no rounding between its steps."""
    return (
        x.is_cpu
        and not unit_offset
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not wants_grad(x, weight)
    )


def _rms_norm_lean(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm in six operations; torch's own is twelve on a CPU, and their number is the cost."""
    length = torch.linalg.vector_norm(x, 2, -1, True)
    mean_square = torch.addcmul(x.new_full((1,), eps), length, length, value=1 / x.shape[-1])
    return (x * mean_square.rsqrt_()).mul_(weight)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Layer normalisation over the last dimension; x [..., d], weight and bias [d]."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
