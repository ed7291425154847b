"""Gradients of the norms by their input; the scale is found again from the input.

With r = 1 / rms(x), n = x r and g = dy * weight: ``dx = r (g - n mean(g n))``; a layer norm also
takes the mean of g away.
"""

from __future__ import annotations

import torch

from invivo.kernels.device import runs_triton


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    beside: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`rms_norm_backward_reference`, by the fastest way for the device."""
    backward = rms_norm_backward_reference
    if runs_triton(dy, x):
        from invivo.kernels.triton_norm import rms_norm_backward_triton

        backward = rms_norm_backward_triton
    return backward(dy, x, weight, eps, unit_offset=unit_offset, beside=beside)


def rms_norm_backward_reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    beside: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of :func:`invivo.kernels.norm.rms_norm` by ``x``: [..., d] in its dtype.

    Args:
        beside: [..., d] another gradient by ``x`` (of a residual stream), which is added.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * scale
    factor = weight.to(wide.dtype)
    grad = dy.to(wide.dtype) * (1.0 + factor if unit_offset else factor)
    inner = (grad * normed).mean(-1, keepdim=True)
    grad = grad.sub_(normed.mul_(inner)).mul_(scale)
    return (grad if beside is None else grad.add_(beside)).to(x.dtype)


def layer_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Gradient of :func:`invivo.kernels.norm.layer_norm` by ``x``: [..., d] in its dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = centred.mul_(scale)
    grad = dy.to(wide.dtype) * weight.to(wide.dtype)
    inner = (grad * normed).mean(-1, keepdim=True)
    mean = grad.mean(-1, keepdim=True)
    return grad.sub_(mean).sub_(normed.mul_(inner)).mul_(scale).to(x.dtype)
