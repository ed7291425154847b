"""Linear maps: ``x @ weight.T + bias``.

On CPUs a matrix may be *packed*: reordered once into blocks of oneDNN. With few rows the plain
layout runs far below the memory's speed there. All matrices of SmolLM2-135M in float32 on two
Zen 4 cores, milliseconds by rows (538 MB; reading them once takes 17 ms):

| rows   | 1  | 2  | 4  | 8  | 16 | 32  | 128 |
|--------|----|----|----|----|----|-----|-----|
| plain  | 46 | 80 | 78 | 69 | 95 | 121 | 251 |
| packed | 24 | 27 | 23 | 25 | 34 | 53  | 184 |
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

# The blocks chosen for this many rows were the best or near it for 1 to 128 rows.
PACKED_FOR_ROWS = 64


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, d_in], weight [d_out, d_in] (plain or packed), bias [d_out] -> [T, d_out]."""
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        y = _PackedLinear.apply(x, weight)
        return y if bias is None else y + bias
    return _packed(x, weight, bias)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A packed copy of ``weight`` [d_out, d_in], or ``weight`` itself where packing does not apply.

    Packing applies to float32 matrices on CPUs whose torch has oneDNN. A packed matrix can only
    be given to :func:`linear` and :func:`unpack`; it is frozen (no gradient reaches it).
    """
    packable = (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.dim() == 2
        and not weight.is_mkldnn
        and torch.backends.mkldnn.is_available()
    )
    if not packable:
        return weight
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight.detach().contiguous(), PACKED_FOR_ROWS
    )
    return packed


def unpack(weight: torch.Tensor) -> torch.Tensor:
    """The plain matrix of a packed one; a plain one is returned as it is."""
    return weight.to_dense() if weight.is_mkldnn else weight


def _packed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


class _PackedLinear(torch.autograd.Function):
    """The packed product with a gradient for ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return _packed(x, weight, None)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad @ unpack(ctx.weight), None
