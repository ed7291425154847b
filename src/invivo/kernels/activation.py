"""Pointwise activations, alone and gated. Names are the Hub's ``hidden_act``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from invivo.errors import UnsupportedModel
from invivo.kernels.device import runs_on_cpu, runs_triton
from invivo.kernels.native import native_for

GELU_TANH = ("gelu_tanh", "gelu_pytorch_tanh", "gelu_new")
ACTIVATIONS = ("silu", "swish", "gelu", *GELU_TANH, "relu", "relu2")


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Apply ``kind``, one of :data:`ACTIVATIONS`, to every element.

    Raises:
        UnsupportedModel: unknown ``kind``.
    """
    if kind in ("silu", "swish"):
        return F.silu(x)
    if kind in GELU_TANH:
        return F.gelu(x, approximate="tanh")
    if kind == "gelu":
        return F.gelu(x)
    if kind == "relu":
        return F.relu(x)
    if kind == "relu2":
        return F.relu(x).square()
    raise UnsupportedModel(
        "unknown activation", field="hidden_act", given=kind, remedy=f"Known: {ACTIVATIONS}"
    )


def gated_activation_reference(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """``activation(gate) * up`` for gate_up [T, 2 f] = (gate, up) side by side; differentiable."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate, kind) * up


def gated_activation(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """:func:`gated_activation_reference`, by the fastest way: [T, 2 f] -> [T, f]."""
    native = native_for(gate_up) if kind in ("silu", "swish") and gate_up.dim() == 2 else None
    if native is not None and gate_up.is_contiguous():
        return native.silu_mul(gate_up)
    if runs_on_cpu(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate, kind).mul_(up)
    if gate_up.dim() == 2 and kind in ACTIVATIONS and runs_triton(gate_up):
        from invivo.kernels.triton_activation import gated_activation_triton

        return gated_activation_triton(gate_up, kind)
    return gated_activation_reference(gate_up, kind)
