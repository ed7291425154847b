"""Gradients of the norms by their input; the scale is found again from the input.

With r = 1 / rms(x), n = x r and g = dy * weight: ``dx = r (g - n mean(g n))``; a layer norm also
takes the mean of g away.
"""

from __future__ import annotations

import torch


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
) -> torch.Tensor:
    """Gradient of :func:`invivo.kernels.norm.rms_norm` by ``x``: [..., d] in its dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * scale
    factor = weight.to(wide.dtype)
    grad = dy.to(wide.dtype) * (1.0 + factor if unit_offset else factor)
    inner = (grad * normed).mean(-1, keepdim=True)
    return grad.sub_(normed.mul_(inner)).mul_(scale).to(x.dtype)


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
