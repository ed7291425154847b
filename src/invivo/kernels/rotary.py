"""Rotary position embedding of query and key rows (Su et al., 2021), halves layout.

Dimension ``i`` of the first half turns together with dimension ``i`` of the second half of the
leading ``rotary_dim`` dimensions, as in the Hub's checkpoints; the rest of a head stays.
"""

from __future__ import annotations

import torch

from invivo.kernels.attention import store_kv
from invivo.kernels.device import runs_on_cpu, runs_triton
from invivo.kernels.native import native_for


def turn_rows(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] by the rows [T, 1, rotary_dim / 2] of its positions; differentiable."""
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
        cos, sin: tables [max_positions, rotary_dim / 2], or what :func:`rotary_rows` made of them.
        positions: [T] int64 rows of the tables.
    """
    c, s = rotary_rows(cos, sin, positions)
    return turn_rows(q, c, s), turn_rows(k, c, s)


def turn_heads(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    *,
    backward: bool = False,
) -> None:
    """Turn x [T, heads, D] as the rotary embedding does, or back by its transpose, into ``out``.

    ``out`` has the shape of x, rows at any stride, and a dtype of its own; it may be x.
    """
    if runs_triton(x, out):
        from invivo.kernels.triton_rotary import turn_heads_triton

        turn_heads_triton(x, cos, sin, positions, out, backward=backward)
        return
    c, s = rotary_rows(cos, sin, positions)
    out.copy_(turn_rows(x, c, -s if backward else s))


def turn_back(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Gradients by queries and keys before the rotary embedding, and by values, side by side.

    From those behind it, dq [T, H, D], and dk and dv [T, G, D] of dtypes of their own, into
    ``out`` [T, H + 2 G, D], contiguous; one kernel on a GPU.
    """
    if runs_triton(dq, dk, dv, out):
        from invivo.kernels.triton_rotary import turn_back_triton

        turn_back_triton(dq, dk, dv, cos, sin, positions, out)
        return
    to_q, to_k, to_v = out.split_with_sizes([x.shape[1] for x in (dq, dk, dv)], 1)
    turn_heads(dq, cos, sin, positions, to_q, backward=True)
    turn_heads(dk, cos, sin, positions, to_k, backward=True)
    to_v.copy_(dv)


def rotary_rows(
    cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables' rows at ``positions``, [T, 1, rotary_dim / 2]; such rows are returned as given.

    On a CPU it pays to pick them once a step and not once a layer.
    """
    if cos.dim() == 3:
        return cos, sin
    return cos.index_select(0, positions).unsqueeze(1), sin.index_select(0, positions).unsqueeze(1)


def _turn_in_place(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    crossed = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(crossed)


def _side_by_side(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """One view [T, H + G, D] of q and k where they are neighbours in one tensor."""
    width = q.shape[1] * q.shape[2]
    adjacent = (
        q.stride() == k.stride()
        and q.stride(1) == q.shape[2]
        and q.stride(2) == 1
        and k.data_ptr() == q.data_ptr() + width * q.element_size()
        and q.stride(0) >= width + k.shape[1] * k.shape[2]
    )
    if not adjacent:
        return None
    shape = (q.shape[0], q.shape[1] + k.shape[1], q.shape[2])
    return q.as_strided(shape, q.stride(), q.storage_offset())


def apply_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`apply_rotary_reference`, by the fastest way; may overwrite and return q and k."""
    if runs_on_cpu(q, k) and q.dtype == k.dtype == cos.dtype:
        c, s = rotary_rows(cos, sin, positions)
        both = _side_by_side(q, k)
        if both is not None:
            _turn_in_place(both, c, s)
        else:
            _turn_in_place(q, c, s)
            _turn_in_place(k, c, s)
        return q, k
    return apply_rotary_reference(q, k, cos, sin, positions)


def rotate_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """:func:`apply_rotary` and ``store_kv`` at once, one kernel on a GPU; returns the turned q.

    q [T, H, D] and k [T, G, D] may be overwritten; v [T, G, D], caches
    [n_blocks, block_size, G, D], slots [T].
    """
    if runs_triton(q, k, v):
        from invivo.kernels.triton_rotary import rotate_and_store_triton

        return rotate_and_store_triton(q, k, v, cos, sin, positions, k_cache, v_cache, slots)
    native = native_for(q, k, v, cos, k_cache)
    if native is not None and _in_equal_rows(q, k, v) and k_cache.is_contiguous():
        c, s = rotary_rows(cos, sin, positions)
        native.rotate_and_store(q, k, v, c, s, slots, k_cache, v_cache)
        return q
    q, k = apply_rotary(q, k, cos, sin, positions)
    store_kv(k, v, k_cache, v_cache, slots)
    return q


def _in_equal_rows(*tensors: torch.Tensor) -> bool:
    """Whether heads lie side by side in rows with the same distance in all tensors."""
    return all(
        t.stride(2) == 1 and t.stride(1) == t.shape[2] and t.stride(0) == tensors[0].stride(0)
        for t in tensors
    )
