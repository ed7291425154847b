"""Rotary position embedding of query and key rows (Su et al., 2021), halves layout.

Dimension ``i`` of the first half turns together with dimension ``i`` of the second half of the
leading ``rotary_dim`` dimensions, as in the Hub's checkpoints; the rest of a head stays.
"""

from __future__ import annotations

import torch


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    wide = torch.promote_types(x.dtype, cos.dtype)
    first, second = x[..., :half].to(wide), x[..., half : 2 * half].to(wide)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), dim=-1)


def apply_rotary_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn q [T, H, D] and k [T, G, D] by the angles of their positions; differentiable.

    Args:
        cos, sin: tables [max_positions, rotary_dim / 2].
        positions: [T] int64 rows of the tables.
    """
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    return _turn(q, c, s), _turn(k, c, s)


def apply_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`apply_rotary_reference`, by the fastest way; may overwrite and return q and k."""
    return apply_rotary_reference(q, k, cos, sin, positions)
