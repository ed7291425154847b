"""Root-mean-square and layer normalisation over the last dimension.

The arithmetic is done in float32 (float64 for float64 inputs) and rounded once at the end, as
the Hub's Llama and Gemma models do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    return add_rms_norm_reference(x, residual, weight, eps, unit_offset=unit_offset)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Layer normalisation over the last dimension; x [..., d], weight and bias [d]."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
