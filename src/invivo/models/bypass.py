"""The protocol of a bypass: ``Y += f(X)`` around a frozen linear map.

LoRA and its relatives are bypasses. The decoder knows only this protocol; which
adapter serves which row is the business of whoever built the bypass for the batch.
"""

from __future__ import annotations

from typing import Protocol

import torch

# The linear maps of a layer as the decoder stores them: query, key and value in one
# matrix, gate and up in one. A plain MLP has "up" in place of "gate_up".
LINEARS = ("qkv", "o", "gate_up", "up", "down")


class Bypass(Protocol):
    """What a forward pass calls after each linear map of each layer."""

    def __call__(self, layer: int, linear: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return ``y + f(x)``; x [T, d_in], y [T, d_out], which may be changed in place."""
        ...
