"""The protocol of a bypass: ``Y += f(X)`` between two tensors of the frozen model.

LoRA and its relatives are bypasses. The decoder knows only this protocol; which adapter serves
which row is the business of whoever built the bypass for the batch.
"""

from __future__ import annotations

from typing import Protocol

import torch

# The linear maps of a layer as the decoder stores them: query, key and value in one
# matrix, gate and up in one. A plain MLP has "up" in place of "gate_up".
LINEARS = ("qkv", "o", "gate_up", "up", "down")

# The other tensors that a bypass may change: sites of models/sites.py, in forward order, and
# "embed" (layer -1), the token embedding before learned positions are added to it.
ROW_PLACES = (
    "embed",
    "resid.pre",
    "attn.in",
    "attn.kvhead.k",
    "attn.kvhead.v",
    "attn.out",
    "resid.mid",
    "mlp.in",
    "mlp.neuron",
    "mlp.out",
    "resid.post",
)


class Bypass(Protocol):
    """What a forward pass calls after each linear map, and at the places that ``at`` names."""

    @property
    def at(self) -> frozenset[str]:
        """Those of :data:`ROW_PLACES` where ``rows`` wants to be called, in some layer at least."""
        ...

    def __call__(self, layer: int, linear: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return ``y + f(x)``; x [T, d_in], y [T, d_out], which may be changed in place."""
        ...

    def rows(self, name: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        """Return what the model goes on with; ``value`` [T, ...] itself stays as it is."""
        ...


def at_place(bypass: Bypass | None, name: str, layer: int, value: torch.Tensor) -> torch.Tensor:
    """Let ``bypass`` change ``value`` if it wants to."""
    if bypass is None or name not in bypass.at:
        return value
    return bypass.rows(name, layer, value)
