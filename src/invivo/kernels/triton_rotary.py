"""On GPUs: rotary embedding of queries and keys, and the storing of keys and values, at once."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from invivo.kernels.rounding import ceil_div, power_of_2
from invivo.kernels.triton_launch import Launch

HEADS_EACH = 8


@triton.jit(
    do_not_specialize_on_alignment=["positions", "slots"],
)
def _rotate_and_store_kernel(
    q, k, v, cos, sin, positions, k_cache, v_cache, slots, q_stride, k_stride, v_stride,
    N_HEADS: tl.constexpr, N_GROUPS: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr,
    HEADS_EACH: tl.constexpr,
):  # fmt: skip
    """One row and some of its heads: queries first, then keys, then values.

    Grid (rows, cdiv(N_HEADS + 2 N_GROUPS, HEADS_EACH)).
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_EACH + tl.arange(0, HEADS_EACH)
    is_q = head < N_HEADS
    is_k = (head >= N_HEADS) & (head < N_HEADS + N_GROUPS)
    is_v = (head >= N_HEADS + N_GROUPS) & (head < N_HEADS + 2 * N_GROUPS)
    q_row = q + row * q_stride + head * D
    k_row = k + row * k_stride + (head - N_HEADS) * D
    v_row = v + row * v_stride + (head - N_HEADS - N_GROUPS) * D
    slot = tl.load(slots + row)
    k_out = k_cache + slot * (N_GROUPS * D) + (head - N_HEADS) * D
    v_out = v_cache + slot * (N_GROUPS * D) + (head - N_HEADS - N_GROUPS) * D

    pair = tl.arange(0, HALF_PAD)
    inside = pair < HALF
    angle = tl.load(positions + row) * HALF + pair
    c = tl.load(cos + angle, mask=inside, other=1.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    from_q = is_q[:, None] & inside[None, :]
    from_k = is_k[:, None] & inside[None, :]
    from_v = is_v[:, None] & inside[None, :]
    pairs = pair[None, :]

    first = tl.load(q_row[:, None] + pairs, mask=from_q, other=0.0)
    second = tl.load(q_row[:, None] + pairs + HALF, mask=from_q, other=0.0)
    kind = first.dtype
    first += tl.load(k_row[:, None] + pairs, mask=from_k, other=0.0)
    second += tl.load(k_row[:, None] + pairs + HALF, mask=from_k, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    turned_a, turned_b = (a * c - b * s).to(kind), (b * c + a * s).to(kind)
    tl.store(q_row[:, None] + pairs, turned_a, mask=from_q)
    tl.store(q_row[:, None] + pairs + HALF, turned_b, mask=from_q)
    tl.store(k_out[:, None] + pairs, turned_a, mask=from_k)
    tl.store(k_out[:, None] + pairs + HALF, turned_b, mask=from_k)
    first = tl.load(v_row[:, None] + pairs, mask=from_v, other=0.0)
    second = tl.load(v_row[:, None] + pairs + HALF, mask=from_v, other=0.0)
    tl.store(v_out[:, None] + pairs, first, mask=from_v)
    tl.store(v_out[:, None] + pairs + HALF, second, mask=from_v)
    if REST_PAD > 0:  # dimensions that do not turn
        rest = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
        from_k = is_k[:, None] & (rest < D)
        from_v = is_v[:, None] & (rest < D)
        tl.store(k_out[:, None] + rest, tl.load(k_row[:, None] + rest, mask=from_k), mask=from_k)
        tl.store(v_out[:, None] + rest, tl.load(v_row[:, None] + rest, mask=from_v), mask=from_v)


def rotate_and_store_triton(
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
    """The function of ``rotate_and_store`` in ``rotary.py``; q is turned in place, k is not.

    Rows of q, k and v may be strided; the caches are contiguous.
    """
    q, k, v = (t if t.stride()[1:] == (t.shape[2], 1) else t.contiguous() for t in (q, k, v))
    n_rows, n_heads, head_dim = q.shape
    n_groups, half = k.shape[1], cos.shape[1]
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    if n_rows:
        _store_launch(n_heads, n_groups, head_dim, half)(
            (n_rows, ceil_div(n_heads + 2 * n_groups, HEADS_EACH)),
            q, k, v, cos, sin, positions, k_cache, v_cache, slots,
            q.stride(0), k.stride(0), v.stride(0),
        )  # fmt: skip
    return q


@cache
def _store_launch(n_heads: int, n_groups: int, head_dim: int, half: int) -> Launch:
    return Launch(
        _rotate_and_store_kernel,
        N_HEADS=n_heads, N_GROUPS=n_groups, **_head_sizes(head_dim, half),
    )  # fmt: skip


def _head_sizes(head_dim: int, half: int) -> dict[str, int]:
    """Constants of all kernels."""
    rest = head_dim - 2 * half
    return {
        "D": head_dim,
        "HALF": half,
        "HALF_PAD": power_of_2(half),
        "REST_PAD": power_of_2(rest) if rest else 0,
        "HEADS_EACH": HEADS_EACH,
        "num_warps": 2,
    }


@triton.jit(do_not_specialize_on_alignment=["positions"])
def _turn_kernel(
    x, out, cos, sin, positions, x_stride, out_stride, sign,
    N_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr, HEADS_EACH: tl.constexpr,
):  # fmt: skip
    """One row and some of its heads. Grid (rows, cdiv(N_HEADS, HEADS_EACH))."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_EACH + tl.arange(0, HEADS_EACH)
    source = (x + row * x_stride + head * D)[:, None]
    target = (out + row * out_stride + head * D)[:, None]
    pair = tl.arange(0, HALF_PAD)
    angle = tl.load(positions + row) * HALF + pair
    c = tl.load(cos + angle, mask=pair < HALF, other=1.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=pair < HALF, other=0.0).to(tl.float32)[None, :] * sign
    mask = (head < N_HEADS)[:, None] & (pair < HALF)[None, :]
    pairs = pair[None, :]
    a = tl.load(source + pairs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + pairs + HALF, mask=mask, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(target + pairs, (a * c - b * s).to(kind), mask=mask)
    tl.store(target + pairs + HALF, (b * c + a * s).to(kind), mask=mask)
    if REST_PAD > 0:  # dimensions that do not turn
        rest = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
        mask = (head < N_HEADS)[:, None] & (rest < D)
        tl.store(target + rest, tl.load(source + rest, mask=mask).to(kind), mask=mask)


def turn_heads_triton(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    *,
    backward: bool,
) -> None:
    """The function of ``turn_heads`` in ``rotary.py``; cos and sin are whole tables."""
    n_rows, n_heads, head_dim = x.shape
    assert x.stride()[1:] == out.stride()[1:] == (head_dim, 1)
    _turn_launch(n_heads, head_dim, cos.shape[1])(
        (n_rows, ceil_div(n_heads, HEADS_EACH)),
        x, out, cos, sin, positions, x.stride(0), out.stride(0), -1.0 if backward else 1.0,
    )  # fmt: skip


@cache
def _turn_launch(n_heads: int, head_dim: int, half: int) -> Launch:
    return Launch(_turn_kernel, N_HEADS=n_heads, **_head_sizes(head_dim, half))


@triton.jit(do_not_specialize_on_alignment=["positions"])
def _turn_back_kernel(
    dq, dk, dv, cos, sin, positions, out, q_stride, k_stride, v_stride,
    N_HEADS: tl.constexpr, N_GROUPS: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr,
    HEADS_EACH: tl.constexpr,
):  # fmt: skip
    """One row and some of its heads: queries first, then keys, then values.

    Grid (rows, cdiv(N_HEADS + 2 N_GROUPS, HEADS_EACH)).
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_EACH + tl.arange(0, HEADS_EACH)
    is_q = (head < N_HEADS)[:, None]
    is_k = ((head >= N_HEADS) & (head < N_HEADS + N_GROUPS))[:, None]
    is_v = ((head >= N_HEADS + N_GROUPS) & (head < N_HEADS + 2 * N_GROUPS))[:, None]
    q_row = (dq + row * q_stride + head * D)[:, None]
    k_row = (dk + row * k_stride + (head - N_HEADS) * D)[:, None]
    v_row = (dv + row * v_stride + (head - N_HEADS - N_GROUPS) * D)[:, None]
    target = (out + row * ((N_HEADS + 2 * N_GROUPS) * D) + head * D)[:, None]
    kind = out.dtype.element_ty

    pair = tl.arange(0, HALF_PAD)
    inside = (pair < HALF)[None, :]
    angle = tl.load(positions + row) * HALF + pair
    c = tl.load(cos + angle, mask=pair < HALF, other=1.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    first, second = pair[None, :], pair[None, :] + HALF
    a = tl.load(q_row + first, mask=is_q & inside, other=0.0).to(tl.float32)
    b = tl.load(q_row + second, mask=is_q & inside, other=0.0).to(tl.float32)
    a += tl.load(k_row + first, mask=is_k & inside, other=0.0).to(tl.float32)
    b += tl.load(k_row + second, mask=is_k & inside, other=0.0).to(tl.float32)
    turns = (is_q | is_k) & inside
    tl.store(target + first, (a * c + b * s).to(kind), mask=turns)
    tl.store(target + second, (b * c - a * s).to(kind), mask=turns)
    a = tl.load(v_row + first, mask=is_v & inside, other=0.0)
    b = tl.load(v_row + second, mask=is_v & inside, other=0.0)
    tl.store(target + first, a.to(kind), mask=is_v & inside)
    tl.store(target + second, b.to(kind), mask=is_v & inside)
    if REST_PAD > 0:  # dimensions that do not turn
        rest = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
        inside = rest < D
        value = tl.load(q_row + rest, mask=is_q & inside, other=0.0).to(tl.float32)
        value += tl.load(k_row + rest, mask=is_k & inside, other=0.0).to(tl.float32)
        value += tl.load(v_row + rest, mask=is_v & inside, other=0.0).to(tl.float32)
        tl.store(target + rest, value.to(kind), mask=(is_q | is_k | is_v) & inside)


def turn_back_triton(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """The function of ``turn_back`` in ``rotary.py``; cos and sin are whole tables."""
    n_rows, n_heads, head_dim = dq.shape
    n_groups = dk.shape[1]
    assert all(x.stride()[1:] == (head_dim, 1) for x in (dq, dk, dv))
    assert out.is_contiguous()
    _back_launch(n_heads, n_groups, head_dim, cos.shape[1])(
        (n_rows, ceil_div(n_heads + 2 * n_groups, HEADS_EACH)),
        dq, dk, dv, cos, sin, positions, out, dq.stride(0), dk.stride(0), dv.stride(0),
    )  # fmt: skip


@cache
def _back_launch(n_heads: int, n_groups: int, head_dim: int, half: int) -> Launch:
    return Launch(
        _turn_back_kernel, N_HEADS=n_heads, N_GROUPS=n_groups, **_head_sizes(head_dim, half)
    )
