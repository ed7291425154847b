"""Gradients of the activations of :mod:`invivo.kernels.activation`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from invivo.errors import UnsupportedModel
from invivo.kernels.activation import ACTIVATIONS, GELU_TANH, activation
from invivo.kernels.device import runs_triton


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


def gated_activation_backward_reference(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str, out: torch.Tensor
) -> torch.Tensor:
    """Gradient of ``y = activation(gate) * up`` by (gate, up), and y itself once more.

    Args:
        dy: [T, f]; may be overwritten, by y.
        gate, up: [T, f], rows at any stride.
        out: [T, 2 f] takes the gradients side by side; gate and up may lie in it at the same
            places.

    Returns:
        y [T, f], as the forward pass rounded it.
    """
    width = gate.shape[-1]
    active = activation(gate, kind)
    y = active * up
    d_gate = activation_backward(dy * up, gate, kind)
    torch.mul(dy, active, out=out[..., width:])
    out[..., :width] = d_gate
    return y


def gated_activation_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str, out: torch.Tensor
) -> torch.Tensor:
    """:func:`gated_activation_backward_reference`, by the fastest way for the device."""
    if kind in ACTIVATIONS and runs_triton(dy, gate, up):
        from invivo.kernels.triton_activation import gated_activation_backward_triton

        return gated_activation_backward_triton(dy, gate, up, kind, out)
    return gated_activation_backward_reference(dy, gate, up, kind, out)


def gated_activation_gradient(dy: torch.Tensor, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """The gradient alone, by the fastest way for the device; ``dy`` stays as it is.

    dy [T, f], gate_up [T, 2 f] = (gate, up) side by side -> [T, 2 f].
    """
    out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    gate, up = gate_up.chunk(2, dim=-1)
    if kind in ACTIVATIONS and runs_triton(dy, gate_up):
        from invivo.kernels.triton_activation import gated_activation_gradient_triton

        gated_activation_gradient_triton(dy.contiguous(), gate, up, kind, out)
    else:
        gated_activation_backward_reference(dy, gate, up, kind, out)
    return out
