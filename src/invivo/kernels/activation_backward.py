"""Gradients of the activations of :mod:`invivo.kernels.activation`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from invivo.errors import UnsupportedModel
from invivo.kernels.activation import GELU_TANH, activation


def activation_backward(dy: torch.Tensor, x: torch.Tensor, kind: str) -> torch.Tensor:
    """Gradient of ``activation(x, kind)`` by ``x``.

    Raises:
        UnsupportedModel: unknown ``kind``.
    """
    if kind in ("silu", "swish"):
        return torch.ops.aten.silu_backward(dy, x)
    if kind in GELU_TANH:
        return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")
    if kind == "gelu":
        return torch.ops.aten.gelu_backward(dy, x)
    if kind == "relu":
        return dy * (x > 0)
    if kind == "relu2":
        return dy * (2.0 * F.relu(x))
    raise UnsupportedModel("unknown activation", field="hidden_act", given=kind)


def gated_activation_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str
) -> torch.Tensor:
    """Gradient of ``activation(gate) * up`` by (gate, up) side by side: [T, f] -> [T, 2 f]."""
    width = gate.shape[-1]
    grad = torch.empty(*gate.shape[:-1], 2 * width, dtype=gate.dtype, device=gate.device)
    grad[..., :width] = activation_backward(dy * up, gate, kind)
    torch.mul(dy, activation(gate, kind), out=grad[..., width:])
    return grad
