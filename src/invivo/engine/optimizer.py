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


def total_norm(gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The norm of all gradients together: [], on the device."""
    norms = torch._foreach_norm(list(gradients.values()))
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def clip_factor(norm: float, clip: float | None) -> float:
    """What to multiply gradients of this norm with."""
    return 1.0 if clip is None or norm <= clip else clip / norm


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
        names = list(self._parameters)
        parameters = [self._parameters[name] for name in names]
        ordered = [gradients[name] for name in names]
        if self._spec.optimizer == "adamw":
            self._adamw(names, parameters, ordered, rate)
        else:
            self._sgd(names, parameters, ordered, rate)

    @torch.no_grad()
    def step_if_finite(
        self,
        gradients: Mapping[str, torch.Tensor],
        rate: float,
        loss: torch.Tensor,
        norm: torch.Tensor,
        clip: float | None,
    ) -> None:
        """One update of clipped gradients that the host need not wait for.

        Where ``loss`` or ``norm`` [] are not finite, parameters and state are afterwards what they
        were; ``updates`` is then one too many, until the host learns of it.
        """
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        if clip is not None:
            torch._foreach_mul_(list(gradients.values()), (clip / norm).clamp(max=1.0))
        changed = [*self._parameters.values(), *self.state.values()]
        before = _flat(changed)
        self.step(gradients, rate)
        kept = torch.where(finite, _flat(changed), before)
        pieces = kept.split([tensor.numel() for tensor in changed])
        shaped = [piece.view_as(one) for piece, one in zip(pieces, changed, strict=True)]
        torch._foreach_copy_(changed, shaped)

    # All tensors together: a GPU spends longer on launching so many small operations than on them.
    def _adamw(
        self,
        names: list[str],
        parameters: list[torch.Tensor],
        gradients: list[torch.Tensor],
        rate: float,
    ) -> None:
        first, second = self._spec.betas
        m = [self.state[f"m.{name}"] for name in names]
        v = [self.state[f"v.{name}"] for name in names]
        torch._foreach_mul_(parameters, 1 - rate * self._spec.weight_decay)
        torch._foreach_lerp_(m, gradients, 1 - first)
        torch._foreach_mul_(v, second)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - second)
        root = torch._foreach_sqrt(v)
        torch._foreach_div_(root, math.sqrt(1 - second**self.updates))
        torch._foreach_add_(root, self._spec.epsilon)
        torch._foreach_addcdiv_(parameters, m, root, -rate / (1 - first**self.updates))

    def _sgd(
        self,
        names: list[str],
        parameters: list[torch.Tensor],
        gradients: list[torch.Tensor],
        rate: float,
    ) -> None:
        torch._foreach_add_(gradients, parameters, alpha=self._spec.weight_decay)
        if self._spec.momentum:
            m = [self.state[f"m.{name}"] for name in names]
            torch._foreach_mul_(m, self._spec.momentum)
            torch._foreach_add_(m, gradients)
            gradients = m
        torch._foreach_add_(parameters, gradients, alpha=-rate)


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """A copy of all of them, one after the other."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
