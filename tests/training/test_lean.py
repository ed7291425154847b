"""Written-out backwards of pointwise steps: those of plain autograd, and of finite differences."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from invivo.kernels.activation import gated_activation_reference
from invivo.kernels.gated_norm import gated_norm_reference
from invivo.kernels.rotary import apply_rotary_reference
from invivo.training.lean import gated, in_dtype, normed_and_gated, turned


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu2"])
def test_gates(kind: str) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(5, 12, generator=rng, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(gated(x, kind), gated_activation_reference(x, kind))
    assert torch.autograd.gradcheck(partial(gated, kind=kind), (x,))


def test_normed_and_gated_heads() -> None:
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(5, 2, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    r = torch.randn(5, 12, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, generator=rng, dtype=torch.float64, requires_grad=True)
    form = partial(normed_and_gated, eps=1e-5)
    torch.testing.assert_close(form(z, r, weight), gated_norm_reference(z, r, weight, 1e-5))
    assert torch.autograd.gradcheck(form, (z, r, weight))


@pytest.mark.parametrize("turning", [3, 4])
def test_turns_of_strided_heads(turning: int) -> None:
    """Where less than a head turns, the rest stays."""
    rng = torch.Generator().manual_seed(0)
    table = torch.randn(2, 9, turning, generator=rng, dtype=torch.float64)
    positions = torch.tensor([0, 3, 8, 3])
    wide = torch.randn(4, 5, 8, generator=rng, dtype=torch.float64, requires_grad=True)

    def turn(wide: torch.Tensor) -> torch.Tensor:
        return turned(wide[:, 1:4], *table, positions)

    heads = wide[:, 1:4]
    wanted = apply_rotary_reference(heads, heads, *table, positions)[0]
    torch.testing.assert_close(turn(wide), wanted)
    assert torch.autograd.gradcheck(turn, (wide,))


def test_gradients_of_others_are_not_overwritten() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    dy = torch.randn(3, 4)
    kept = dy.clone()
    torch.autograd.grad(gated(x, "silu"), x, dy)
    assert torch.equal(dy, kept)


def test_parameters_in_another_dtype_and_their_gradients_back() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    w = in_dtype(module, torch.bfloat16)
    first, second = module[0].weight, module[1].bias
    assert torch.equal(w(first), first.to(torch.bfloat16))
    ((w(first).sum() + w(first).square().sum()) * 0.3 + w(second)[0]).backward()
    assert first.grad is not None
    assert first.grad.dtype == torch.float32
    again = first.detach().clone().requires_grad_()
    cast = again.to(torch.bfloat16)
    ((cast.sum() + cast.square().sum()) * 0.3).backward()
    assert torch.equal(first.grad, again.grad)
    assert module[1].bias.grad.tolist() == [1.0, 0.0]
    assert module[0].bias.grad is None, "what nobody used has no gradient"


def test_parameters_in_their_own_dtype_are_themselves() -> None:
    module = nn.Linear(3, 5)
    assert in_dtype(module, torch.float32)(module.weight) is module.weight
