"""The plain and the gated multi-layer perceptron."""

from __future__ import annotations

import torch
from torch import nn

from invivo.kernels.activation import activation, gated_activation
from invivo.kernels.linear import linear, pack
from invivo.models.bypass import Bypass, at_place
from invivo.models.config import ModelConfig
from invivo.models.sites import Taps, offer


class MLP(nn.Module):
    """``down(act(gate x) * (up x))`` or ``down(act(up x))``.

    Gate and up lie below each other in ``gate_up`` [2 f, d]; ``up`` is [f, d], ``down`` [d, f].
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        width: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.layer = layer
        self.kind = config.activation
        self.gated = config.gated_mlp

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        bias = config.mlp_bias
        if self.gated:
            self.gate_up = parameter(2 * width, config.d_model)
            self.gate_up_bias = parameter(2 * width) if bias else None
        else:
            self.up = parameter(width, config.d_model)
            self.up_bias = parameter(width) if bias else None
        self.down = parameter(config.d_model, width)
        self.down_bias = parameter(config.d_model) if bias else None
        self.up_packed: torch.Tensor | None = None  # of gate_up where the layer is gated
        self.down_packed: torch.Tensor | None = None

    def pack(self) -> None:
        """Keep packed copies of the matrices; see :meth:`Decoder.pack`."""
        self.up_packed = pack(self.gate_up if self.gated else self.up)
        self.down_packed = pack(self.down)

    def forward(
        self, x: torch.Tensor, bypass: Bypass | None = None, taps: Taps | None = None
    ) -> torch.Tensor:
        """x [T, d] -> [T, d]."""
        layer = self.layer
        if self.gated:
            gate_up = linear(x, self.gate_up, self.gate_up_bias, self.up_packed)
            if bypass is not None:
                gate_up = bypass(layer, "gate_up", x, gate_up)
            if taps is not None:
                gate_up = self._tap_gate_up(gate_up, taps)
            hidden = gated_activation(gate_up, self.kind)
        else:
            up = linear(x, self.up, self.up_bias, self.up_packed)
            if bypass is not None:
                up = bypass(layer, "up", x, up)
            if taps is not None:
                up = offer(taps, "mlp.up", layer, up)
            hidden = activation(up, self.kind)
        hidden = at_place(bypass, "mlp.neuron", layer, hidden)
        if taps is not None:
            hidden = offer(taps, "mlp.neuron", layer, hidden)
        out = linear(hidden, self.down, self.down_bias, self.down_packed)
        if bypass is not None:
            out = bypass(layer, "down", hidden, out)
        return out

    def _tap_gate_up(self, gate_up: torch.Tensor, taps: Taps) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        new_gate = offer(taps, "mlp.gate", self.layer, gate)
        new_up = offer(taps, "mlp.up", self.layer, up)
        if new_gate is gate and new_up is up:
            return gate_up
        return torch.cat((new_gate, new_up), dim=-1)
