"""Gradients of norms and activations against autograd."""

from __future__ import annotations

import pytest
import torch

from invivo.kernels.activation import ACTIVATIONS, activation, gated_activation_reference
from invivo.kernels.activation_backward import activation_backward, gated_activation_backward
from invivo.kernels.norm import layer_norm, rms_norm_reference
from invivo.kernels.norm_backward import layer_norm_backward, rms_norm_backward


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("shape", [(5, 8), (5, 3, 8)])
def test_rms_norm(shape: tuple[int, ...], unit_offset: bool) -> None:
    x, dy, weight = random(*shape, seed=0), random(*shape, seed=1), random(8, seed=2)
    leaf = x.clone().requires_grad_()
    y = rms_norm_reference(leaf, weight, 1e-5, unit_offset=unit_offset)
    (wanted,) = torch.autograd.grad(y, leaf, dy)
    got = rms_norm_backward(dy, x, weight, 1e-5, unit_offset=unit_offset)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    beside = random(*shape, seed=3)
    got = rms_norm_backward(dy, x, weight, 1e-5, unit_offset=unit_offset, beside=beside)
    torch.testing.assert_close(got, wanted + beside, rtol=1e-12, atol=1e-12)


def test_layer_norm() -> None:
    x, dy, weight = random(5, 8, seed=0), random(5, 8, seed=1), random(8, seed=2)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(layer_norm(leaf, weight, random(8, seed=3), 1e-5), leaf, dy)
    torch.testing.assert_close(
        layer_norm_backward(dy, x, weight, 1e-5), wanted, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: str) -> None:
    x, dy = random(6, 5, seed=0), random(6, 5, seed=1)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(activation(leaf, kind), leaf, dy)
    torch.testing.assert_close(activation_backward(dy, x, kind), wanted)
    gate_up = random(6, 10, seed=2).requires_grad_()
    (wanted,) = torch.autograd.grad(gated_activation_reference(gate_up, kind), gate_up, dy)
    gate, up = gate_up.detach().chunk(2, dim=-1)
    out = torch.empty_like(wanted)
    y = gated_activation_backward(dy.clone(), gate, up, kind, out)
    torch.testing.assert_close(out, wanted)
    assert torch.equal(y, gated_activation_reference(gate_up.detach(), kind))
    in_place = gate_up.detach().clone()
    gate, up = in_place.chunk(2, dim=-1)
    gated_activation_backward(dy, gate, up, kind, in_place)
    torch.testing.assert_close(in_place, wanted)
