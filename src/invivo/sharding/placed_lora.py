"""A LoRA beside a linear map of a sharded model, placed as :func:`plan_parallel` says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate

from invivo.sharding.moves import entered, local_weight, moved, spread, weight_placement
from invivo.sharding.parallel_plan import Candidate, State, Weight


class PlacedLora(nn.Module):
    """``Y += scale B A X`` (Hu et al., 2021), its parts and transfers those of a candidate.

    ``a`` [r, d_in] and ``b`` [d_out, r] are DTensors over the mesh.

    Args:
        a, b: whole, the same in all processes.
        candidate: of ``plan_parallel(lora_stages(d_in, d_out, r), backbone, mesh)``.
        start: ``backbone.x``, the state of X.
        mesh: of one dimension, with as many devices as the plan's.
    """

    def __init__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        candidate: Candidate,
        start: State,
        mesh: DeviceMesh,
    ) -> None:
        super().__init__()
        self.scale, self.candidate, self.start, self.mesh = scale, candidate, start, mesh
        weights = candidate.weights
        self.a = nn.Parameter(spread(a, mesh, weight_placement(weights["A"])))
        self.b = nn.Parameter(spread(b, mesh, weight_placement(weights["B"])))

    def forward(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """What is added to this process's part of Y.

        Args:
            x: this process's part of X [R, d_in].
            rows: R, of the whole.
        """
        state, width = self.start, self.a.shape[1]
        for step in self.candidate.steps:
            if step.weight is None:
                x = moved(x, self.mesh, (rows, width), state, step.state)
            else:
                x = self._through(self.a if step.what == "A" else self.b, x, state, step.weight)
                if step.what == "A":
                    x, width = x * self.scale, self.a.shape[0]
                else:
                    width = self.b.shape[0]
            state = step.state
        return x

    def _through(
        self, parameter: torch.Tensor, x: torch.Tensor, state: State, weight: Weight
    ) -> torch.Tensor:
        gradient: Placement = weight_placement(weight)
        if weight is Weight.REPLICATED:
            # From its own tokens, or its own summand, a process knows a summand of the gradient.
            summands = state in (State.TOKENS, State.PARTIAL)
            gradient = Partial() if summands else Replicate()
        elif weight is Weight.COLUMNS:
            x = entered(x, self.mesh)
        return F.linear(x, local_weight(parameter, gradient=gradient).to(x.dtype))
