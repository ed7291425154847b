"""Elements kept or dropped, multiplied and shifted: the changes that tables hold."""

from __future__ import annotations

import torch

from invivo.kernels.device import runs_triton


def affine_reference(
    x: torch.Tensor, kept: torch.Tensor, factor: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """``(x where kept, else 0) * factor + shift``; all of one shape [T, ...], ``kept`` bool.

    What is dropped need not be finite. A factor of 1 with a shift of -0.0 changes no number.
    """
    return torch.addcmul(shift, torch.where(kept, x, x.new_zeros(())), factor)


def affine(
    x: torch.Tensor, kept: torch.Tensor, factor: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """:func:`affine_reference`, by the fastest way.

    Where the factor is 1 or the shift -0.0 both round alike: once.
    """
    if runs_triton(x, factor, shift):
        from invivo.kernels.triton_affine import affine_triton

        return affine_triton(x, kept, factor, shift)
    return affine_reference(x, kept, factor, shift)
