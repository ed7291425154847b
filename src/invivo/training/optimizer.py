"""AdamW over a decoder's parameters, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from invivo.training.config import AdamW

_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: AdamW) -> torch.optim.AdamW:
    """torch's AdamW; vectors (norms and biases) are a group without decay."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=all(p.is_cuda for p in parameters.values()),
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """``exp_avg.<name>`` and ``exp_avg_sq.<name>``, the optimizer's own tensors; none before the
    first step."""
    return {
        f"{kind}.{name}": optimizer.state[parameter][kind]
        for name, parameter in parameters.items()
        if parameter in optimizer.state
        for kind in _MOMENTS
    }


def empty_moments(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Tensors of the names and shapes of :func:`moments`, to read into."""
    return {
        f"{kind}.{name}": torch.zeros_like(parameter.detach())
        for name, parameter in parameters.items()
        for kind in _MOMENTS
    }


def load_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    given: Mapping[str, torch.Tensor],
    updates: int,
) -> None:
    """Put back what :func:`moments` gave after ``updates`` steps."""
    for name, parameter in parameters.items() if updates else ():
        fused = optimizer.defaults["fused"]
        count = torch.tensor(float(updates), device=parameter.device if fused else "cpu")
        state: dict[str, torch.Tensor] = {"step": count}
        for kind in _MOMENTS:
            state[kind] = given[f"{kind}.{name}"].to(parameter.device, copy=True)
        optimizer.state[parameter] = state
