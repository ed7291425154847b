"""RMS norm of heads times a swish gate, what gated linear attention's heads end in (Yang et al.,
2023, arXiv 2312.06635, section 4.4)::

    y = rms_norm(z) * weight * silu(r)

With n = z / rms(z) and a = silu(r): ``dr = dy n weight silu'(r)``, ``d(weight) = sum of dy a n``
over all rows, and with g = dy a weight, ``dz = (g - n mean(g n)) / rms(z)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from invivo.kernels.device import runs_triton


def gated_norm_reference(
    z: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """[R, H * V] in z's dtype; differentiable.

    Args:
        z: [R, H, V], normalised head by head.
        r: [R, H * V] of the same dtype.
        weight: [V], the same for all heads.
    """
    return F.rms_norm(z, weight.shape, weight, eps).reshape(r.shape) * F.silu(r)


def gated_norm(z: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """:func:`gated_norm_reference`, by the fastest way for the device."""
    if runs_triton(z, r, weight):
        from invivo.kernels.triton_gated_norm import gated_norm_triton

        return gated_norm_triton(z, r, weight, eps)
    return gated_norm_reference(z, r, weight, eps)


def gated_norm_backward_reference(
    dy: torch.Tensor, z: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients by z, r and weight from that of the output, dy [R, H * V]; each in its dtype."""
    kind = torch.float64 if z.dtype == torch.float64 else torch.float32
    wide, gate, grad = z.to(kind), r.view(z.shape).to(kind), dy.view(z.shape).to(kind)
    factor = weight.to(kind)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * scale
    share = torch.sigmoid(gate)
    d_gate = grad * normed * factor * share * (1.0 + gate * (1.0 - share))
    grad = grad * gate * share
    d_weight = (grad * normed).sum((0, 1))
    grad = grad * factor
    dz = scale * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    return dz.to(z.dtype), d_gate.to(r.dtype).view(r.shape), d_weight.to(weight.dtype)


def gated_norm_backward(
    dy: torch.Tensor, z: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`gated_norm_backward_reference`, by the fastest way for the device."""
    if runs_triton(dy, z, r, weight):
        from invivo.kernels.triton_gated_norm import gated_norm_backward_triton

        return gated_norm_backward_triton(dy, z, r, weight, eps)
    return gated_norm_backward_reference(dy, z, r, weight, eps)
