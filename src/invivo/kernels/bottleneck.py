"""Bottleneck adapters at a site, another for every row (Houlsby et al., 2019)."""

from __future__ import annotations

import torch

from invivo.kernels.activation import activation


def bottleneck_reference(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, index: torch.Tensor, kind: str
) -> torch.Tensor:
    """``x[t] + up[index[t]] @ act(down[index[t]] @ x[t])``.

    Rows whose index is 0 or beyond the slots stay untouched.

    Args:
        x: [T, d]; not changed.
        down: [slots, R, d]; a narrower adapter has zeros in the last rows.
        up: [slots, d, R].
        index: [T] integers.
        kind: the activation.
    """
    out = x.clone()
    for row, slot in enumerate(index.tolist()):
        if 0 < slot < down.shape[0]:
            out[row] += up[slot] @ activation(down[slot] @ x[row], kind)
    return out


def bottleneck_add(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, index: torch.Tensor, kind: str
) -> torch.Tensor:
    """:func:`bottleneck_reference` in two products over all slots, so that no shape and no branch
    depends on the indices; ``down`` and ``up`` must be finite."""
    slots, width, d = down.shape
    neuron = activation(x @ down.view(slots * width, d).T, kind).view(-1, slots, width)
    own = index[:, None] == torch.arange(1, slots, device=index.device, dtype=index.dtype)
    neuron = neuron[:, 1:].masked_fill(~own[:, :, None], 0.0)
    return x + neuron.flatten(1) @ up[1:].transpose(1, 2).flatten(0, 1)
