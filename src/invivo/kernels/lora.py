"""Low-rank additions to a linear map, another adapter for every row (LoRA, Hu et al., 2021)."""

from __future__ import annotations

import torch

from invivo.kernels.device import runs_on_cpu, runs_triton

# Up to this many rows the CPU gathers a matrix for every row; above, it goes adapter by adapter.
ROWS_EACH = 16


def lora_add_reference(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """``y[t] + b[index[t]] @ (a[index[t]] @ x[t])``; differentiable.

    Rows whose index is 0 or beyond the slots (an adapter without this map) stay untouched.

    Args:
        y: [T, d_out]; not changed.
        x: [T, d_in].
        a: [slots, R, d_in]; slot 0 must be zeros, in ``b`` too.
        b: [slots, d_out, R], the scale folded in.
        index: [T] integers.
    """
    for slot in torch.unique(index).tolist():
        if slot == 0 or slot >= a.shape[0]:
            continue
        rows = torch.nonzero(index == slot).squeeze(1)
        y = y.index_add(0, rows, (x[rows] @ a[slot].T) @ b[slot].T)
    return y


def _lora_add_cpu(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    if x.shape[0] <= ROWS_EACH:
        # A few rows: gather every row's matrices, whichever adapters they are; slot 0 adds zeros.
        index = index.where(index < a.shape[0], 0)
        shrunk = torch.bmm(a.index_select(0, index), x.unsqueeze(2))
        return y.add_(torch.bmm(b.index_select(0, index), shrunk).squeeze(2))
    for slot in torch.unique(index).tolist():
        if slot == 0 or slot >= a.shape[0]:
            continue
        rows = torch.nonzero(index == slot).squeeze(1)
        if rows.shape[0] == x.shape[0]:
            return y.addmm_(x @ a[slot].T, b[slot].T)
        y.index_add_(0, rows, (x[rows] @ a[slot].T) @ b[slot].T)
    return y


def lora_add(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """:func:`lora_add_reference`, by the fastest way; ``y`` may be changed in place."""
    if runs_on_cpu(y, x):
        return _lora_add_cpu(y, x, a, b, index)
    if runs_triton(y, x):
        from invivo.kernels.triton_lora import lora_add_triton

        return lora_add_triton(y, x, a, b, index)
    return lora_add_reference(y, x, a, b, index)
