"""A norm layer of the decoder: RMS or layer norm, with its scale open to taps."""

from __future__ import annotations

import torch
from torch import nn

from invivo.kernels.norm import add_rms_norm, layer_norm, rms_norm
from invivo.models.config import ModelConfig
from invivo.models.sites import Taps, offer


class Norm(nn.Module):
    """RMS norm or layer norm of the last dimension, as ``config.norm`` says."""

    def __init__(self, config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype):
        super().__init__()
        self.eps = config.norm_eps
        self.unit_offset = config.norm_unit_offset
        self.is_rms = config.norm == "rms"
        self.weight = nn.Parameter(
            torch.empty(config.d_model, device=device, dtype=dtype), requires_grad=False
        )
        self.bias: nn.Parameter | None = None
        if not self.is_rms:
            self.bias = nn.Parameter(torch.empty_like(self.weight), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, d] -> [T, d]."""
        if self.is_rms:
            return rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + residual, x + residual)."""
        if self.is_rms:
            return add_rms_norm(x, residual, self.weight, self.eps, unit_offset=self.unit_offset)
        residual = residual + x
        return layer_norm(residual, self.weight, self.bias, self.eps), residual

    def retap(
        self, x: torch.Tensor, normed: torch.Tensor, taps: Taps, site: str, layer: int
    ) -> torch.Tensor:
        """Offer the reciprocal scale [T, 1] of ``x``; return ``normed``, redone if that changed."""
        if not taps.wants(site, layer):
            return normed
        wide = x if x.dtype == torch.float64 else x.float()
        if not self.is_rms:
            wide = wide - wide.mean(-1, keepdim=True)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        answer = offer(taps, site, layer, scale)
        if answer is scale:
            return normed
        weight = self.weight.to(wide.dtype)
        redone = wide * answer * (1.0 + weight if self.unit_offset else weight)
        if self.bias is not None:
            redone = redone + self.bias
        redone = redone.to(x.dtype)
        # Rows whose scale stays keep their bits (a gradient needs the formula).
        return redone if answer.requires_grad else torch.where(answer == scale, normed, redone)
