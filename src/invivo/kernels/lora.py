"""Low-rank additions to a linear map, another adapter for every row (LoRA, Hu et al., 2021)."""

from __future__ import annotations

import torch


def lora_add_reference(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """``y[t] + b[index[t]] @ (a[index[t]] @ x[t])``, rows with index 0 untouched; differentiable.

    Args:
        y: [T, d_out]; not changed.
        x: [T, d_in].
        a: [slots, R, d_in].
        b: [slots, d_out, R], the scale folded in.
        index: [T] integers.
    """
    for slot in torch.unique(index).tolist():
        if slot == 0:
            continue
        rows = torch.nonzero(index == slot).squeeze(1)
        y = y.index_add(0, rows, (x[rows] @ a[slot].T) @ b[slot].T)
    return y


def lora_add(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """:func:`lora_add_reference`, by the fastest way; ``y`` may be changed in place."""
    return lora_add_reference(y, x, a, b, index)
