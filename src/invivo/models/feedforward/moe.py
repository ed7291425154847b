"""Mixture of experts: every row goes through the ``top_k`` experts its router likes best.

Three ways to the same sum: on a CPU one expert after the other over its rows; on a GPU in
bfloat16 a grouped product over rows sorted by expert, whose shapes do not depend on the data, so
that it can be captured in a graph; and all experts on all rows, for taps and other dtypes.
"""

from __future__ import annotations

import torch
from torch import nn

from invivo.kernels.activation import gated_activation
from invivo.kernels.linear import linear
from invivo.models.config import ModelConfig, MoEConfig
from invivo.models.feedforward.mlp import MLP
from invivo.models.sites import Taps, offer


class MoE(nn.Module):
    """``router`` [E, d], ``gate_up`` [E, 2 f, d], ``down`` [E, d, f]; optional shared expert.

    A bypass does not reach into experts: adapters of such a layer act on its attention.
    """

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig,
        layer: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.layer = layer
        self.kind = config.activation
        self.n_experts = moe.n_experts
        self.top_k = moe.top_k
        self.normalize = moe.normalize_weights

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        d, f = config.d_model, moe.d_expert
        self.router = parameter(moe.n_experts, d)
        self.gate_up = parameter(moe.n_experts, 2 * f, d)
        self.down = parameter(moe.n_experts, d, f)
        self.shared: MLP | None = None
        if moe.d_shared:
            self.shared = MLP(config, layer, moe.d_shared, device=device, dtype=dtype)
            self.shared_gate = parameter(1, d)

    def forward(self, x: torch.Tensor, taps: Taps | None = None) -> torch.Tensor:
        """x [T, d] -> [T, d]."""
        logits = linear(x, self.router)
        if taps is not None:
            logits = offer(taps, "moe.router", self.layer, logits)
        weights, chosen = self._route(logits)
        tapped = taps is not None and (
            taps.wants("moe.expert.weight", self.layer) or taps.wants("moe.expert.out", self.layer)
        )
        if tapped:
            assert taps is not None
            out = self._mix_openly(x, weights, chosen, taps)
        else:
            out = self._mix(x, weights, chosen)
        if self.shared is not None:
            shared = torch.sigmoid(linear(x, self.shared_gate)) * self.shared(x)
            if taps is not None:
                shared = offer(taps, "moe.shared.out", self.layer, shared)
            out = out + shared
        return out

    def _route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [T, k] and indices [T, k] of the chosen experts; logits [T, E]."""
        wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
        weights, chosen = torch.topk(torch.softmax(logits, dim=-1, dtype=wide), self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(logits.dtype), chosen

    def _mix(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs."""
        if x.is_cuda and x.dtype != torch.bfloat16:
            return self._combine(self._all_outputs(x), self._dense(weights, chosen))
        expert_of = chosen.flatten()
        order = torch.argsort(expert_of, stable=True)
        rows = x[order // self.top_k]
        counts = torch.zeros(self.n_experts, dtype=torch.int64, device=x.device).scatter_add_(
            0, expert_of, torch.ones_like(expert_of)
        )
        if x.is_cuda:
            ends = counts.cumsum(0).to(torch.int32)
            hidden = torch._grouped_mm(rows, self.gate_up.transpose(1, 2), offs=ends)
            hidden = gated_activation(hidden, self.kind)
            outputs = torch._grouped_mm(hidden, self.down.transpose(1, 2), offs=ends)
        else:
            pieces = rows.split(counts.tolist())
            outputs = torch.cat([self._expert(e, p) for e, p in enumerate(pieces) if len(p)])
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=x.device)
        per_choice = outputs[place].view(x.shape[0], self.top_k, -1)
        return (per_choice * weights[..., None]).sum(1)

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        hidden = gated_activation(linear(x, self.gate_up[expert]), self.kind)
        return linear(hidden, self.down[expert])

    def _all_outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs of all experts on all rows: [T, d] -> [T, E, d]."""
        hidden = x @ self.gate_up.transpose(1, 2)
        hidden = gated_activation(hidden, self.kind)
        return (hidden @ self.down.transpose(1, 2)).transpose(0, 1)

    def _dense(self, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Weights by expert [T, E], 0 where not chosen."""
        return weights.new_zeros(weights.shape[0], self.n_experts).scatter(1, chosen, weights)

    @staticmethod
    def _combine(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (outputs * weights[..., None]).sum(1)

    def _mix_openly(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, taps: Taps
    ) -> torch.Tensor:
        """:meth:`_mix` with weights and outputs of all experts laid open."""
        dense = self._dense(weights, chosen)
        new_weights = offer(taps, "moe.expert.weight", self.layer, dense)
        outputs = self._all_outputs(x)
        new_outputs = offer(taps, "moe.expert.out", self.layer, outputs)
        if new_weights is dense and new_outputs is outputs:
            return self._mix(x, weights, chosen)
        out = self._combine(new_outputs, new_weights)
        if out.requires_grad:
            return out
        changed = (new_weights != dense).any(1, keepdim=True)
        changed |= (new_outputs != outputs).flatten(1).any(1, keepdim=True)
        # Rows that nobody changes keep their bits.
        return torch.where(changed, out, self._mix(x, weights, chosen))
