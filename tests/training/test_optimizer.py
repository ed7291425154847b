"""The optimizer's groups and its state by name."""

from __future__ import annotations

import torch
from torch import nn

from invivo.training.config import AdamW
from invivo.training.optimizer import load_moments, make_optimizer, moments, set_rate

SETTINGS = AdamW(learning_rate=0.1, weight_decay=0.5)


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": nn.Parameter(torch.randn(3, 4, generator=generator)),
        "norm": nn.Parameter(torch.ones(4)),
    }


def step(optimizer: torch.optim.Optimizer, given: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in given.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_only_matrices_decay() -> None:
    given = parameters()
    optimizer = make_optimizer(given, SETTINGS)
    before = given["matrix"].detach().clone()
    for parameter in given.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(given["matrix"], before * (1 - 0.1 * 0.5))
    assert given["norm"].eq(1).all()


def test_going_on_from_the_named_state_is_going_on() -> None:
    one = parameters()
    optimizer = make_optimizer(one, SETTINGS)
    assert moments(optimizer, one) == {}
    for seed in range(3):
        step(optimizer, one, seed)
    kept = {name: value.clone() for name, value in moments(optimizer, one).items()}
    assert set(kept) == {f"exp_avg{s}.{n}" for s in ("", "_sq") for n in ("matrix", "norm")}

    other = {name: nn.Parameter(value.detach().clone()) for name, value in one.items()}
    resumed = make_optimizer(other, SETTINGS)
    load_moments(resumed, other, kept, updates=3)
    for each in (optimizer, resumed):
        set_rate(each, 0.01)
    step(optimizer, one, 9)
    step(resumed, other, 9)
    assert all(torch.equal(one[name], other[name]) for name in one)
