"""Linear maps: ``x @ weight.T + bias``."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, d_in], weight [d_out, d_in], bias [d_out] -> [T, d_out]."""
    return F.linear(x, weight, bias)
