"""AdamW (Loshchilov and Hutter, 2019) and SGD with momentum, and the learning rate's schedule.

The arithmetic is that of torch's own optimizers; the state is a flat dict of tensors, so that a
checkpoint is one safetensors file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from invivo.engine.job_spec import JobSpec


def learning_rate(spec: JobSpec, step: int) -> float:
    """Of optimizer step ``step``, the first being 0."""
    if step < spec.warmup:
        return spec.learning_rate * (step + 1) / spec.warmup
    done = (step - spec.warmup) / max(1, spec.steps - spec.warmup)
    if spec.schedule == "linear":
        return spec.learning_rate * (1 - done)
    if spec.schedule == "cosine":
        return spec.learning_rate * (1 + math.cos(math.pi * done)) / 2
    return spec.learning_rate


def clip_factor(gradients: Mapping[str, torch.Tensor], clip: float | None) -> tuple[float, float]:
    """(norm of all gradients together, what to multiply them with); waits for the device."""
    squares = [gradient.square().sum() for gradient in gradients.values()]
    norm = float(torch.stack(squares).sum().sqrt())
    if clip is None or norm <= clip:
        return norm, 1.0
    return norm, clip / norm


class Optimizer:
    """Changes parameters in place.

    Attributes:
        state: ``m.<name>`` and ``v.<name>`` of AdamW, ``m.<name>`` of SGD with momentum.
        updates: steps taken, for AdamW's correction.
    """

    def __init__(self, spec: JobSpec, parameters: Mapping[str, torch.Tensor]) -> None:
        self._spec = spec
        self._parameters = parameters
        kinds = "mv" if spec.optimizer == "adamw" else "m" if spec.momentum else ""
        self.state = {
            f"{kind}.{name}": torch.zeros_like(value, requires_grad=False)
            for kind in kinds
            for name, value in parameters.items()
        }
        self.updates = 0

    @torch.no_grad()
    def step(self, gradients: Mapping[str, torch.Tensor], rate: float) -> None:
        """One update; ``gradients`` may be overwritten."""
        self.updates += 1
        for name, parameter in self._parameters.items():
            if self._spec.optimizer == "adamw":
                self._adamw(name, parameter, gradients[name], rate)
            else:
                self._sgd(name, parameter, gradients[name], rate)

    def _adamw(
        self, name: str, parameter: torch.Tensor, gradient: torch.Tensor, rate: float
    ) -> None:
        (first, second), m, v = self._spec.betas, self.state[f"m.{name}"], self.state[f"v.{name}"]
        parameter.mul_(1 - rate * self._spec.weight_decay)
        m.lerp_(gradient, 1 - first)
        v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = v.sqrt().div_(math.sqrt(1 - second**self.updates)).add_(self._spec.epsilon)
        parameter.addcdiv_(m, root, value=-rate / (1 - first**self.updates))

    def _sgd(self, name: str, parameter: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        gradient = gradient.add_(parameter, alpha=self._spec.weight_decay)
        if self._spec.momentum:
            gradient = self.state[f"m.{name}"].mul_(self._spec.momentum).add_(gradient)
        parameter.sub_(gradient, alpha=rate)
