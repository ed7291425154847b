"""What goes to cuDNN and comes back, with autograd in its place; on a GPU cuDNN itself."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.test_attention_backward import scattered

from invivo.kernels import cudnn_attention_backward as module
from invivo.kernels.attention_backward import attention_backward_reference, attention_lse
from invivo.kernels.cudnn_attention_backward import (
    attention_backward_cudnn,
    serves,
    whole_text_backward,
)

HEADS, GROUPS = 6, 2


def in_autograd_s_words(
    dz: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    z: torch.Tensor,
    *,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """What cuDNN computes, from tensors in its layout."""
    assert z.shape == q.shape == (1, HEADS, q.shape[2], q.shape[3])
    assert lse.shape == q.shape[:3]
    assert lse.is_contiguous()
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(
        *leaves, is_causal=True, scale=scale, enable_gqa=True
    )
    torch.testing.assert_close(out, z)
    return torch.autograd.grad(out, leaves, dz)


@pytest.mark.parametrize("fresh", [False, True])
def test_tensors_reach_cudnn_in_its_layout_and_gradients_come_back(
    monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    monkeypatch.setattr(module, "_backward", in_autograd_s_words)
    rng = torch.Generator().manual_seed(0)
    length = 11
    q, dz, k, v, z, lse, table = arguments(rng, length, 8, torch.float64)
    sums = [torch.randn(length + 2, GROUPS, 8, generator=rng, dtype=torch.float64) for _ in "kv"]
    before = [total.clone() for total in sums]
    got = whole_text_backward(
        dz, q, k, v, table, z, lse, scale=0.3, dk=sums[0], dv=sums[1], fresh=fresh
    )
    wanted_sums = [torch.zeros(length, GROUPS, 8, dtype=torch.float64) for _ in "kv"]
    wanted = attention_backward_reference(
        dz, q, k, v, table, 0, z, lse, scale=0.3, dk=wanted_sums[0], dv=wanted_sums[1]
    )
    assert wanted is not None
    torch.testing.assert_close(got, wanted)
    for total, old, own in zip(sums, before, wanted_sums, strict=True):
        torch.testing.assert_close(total[:length], own if fresh else own + old[:length])
        assert torch.equal(total[length:], old[length:])


def arguments(
    rng: torch.Generator, length: int, dim: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, ...]:
    """q, dz, key pages, value pages, z, log-sum-exps and the table of blocks."""
    q, dz = (torch.randn(length, HEADS, dim, generator=rng, dtype=dtype) for _ in "qz")
    k, table = scattered(torch.randn(length, GROUPS, dim, generator=rng, dtype=dtype), 4, rng)
    v = torch.randn(k.shape, generator=rng, dtype=dtype)
    lse = attention_lse(q, k, table, 0, scale=0.3)
    heads_first = [x[table].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (k, v)]
    z = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], *heads_first, is_causal=True, scale=0.3, enable_gqa=True
    )
    z = z[0].transpose(0, 1).contiguous()
    q, dz, k, v, z, lse, table = (x.to(device) for x in (q, dz, k, v, z, lse, table))
    return q, dz, k, v, z, lse, table


def test_only_plain_causal_attention_from_a_start_is_served() -> None:
    q = torch.zeros(5, 2, 64, dtype=torch.bfloat16)
    assert serves(q, 0, None, None)
    assert serves(q, 0, 5, None)  # a window that hides nothing
    assert not serves(q, 3, None, None)
    assert not serves(q, 0, 4, None)
    assert not serves(q, 0, None, 30.0)
    assert not serves(q[:1], 0, None, None)
    assert not serves(q.float(), 0, None, None)
    assert not serves(torch.zeros(5, 2, 256, dtype=torch.bfloat16), 0, None, None)


def test_elsewhere_the_other_kernels_answer() -> None:
    rng = torch.Generator().manual_seed(1)
    q, dz, k, v, z, lse, table = arguments(rng, 9, 8, torch.float32)
    sums = [torch.zeros(9, GROUPS, 8) for _ in "kvkv"]
    options = {"scale": 0.3, "window": 3}
    got = attention_backward_cudnn(dz, q, k, v, table, 0, z, lse, dk=sums[0], dv=sums[1], **options)
    wanted = attention_backward_reference(
        dz, q, k, v, table, 0, z, lse, dk=sums[2], dv=sums[3], **options
    )
    assert got is not None
    assert wanted is not None
    assert torch.equal(got, wanted)
    assert torch.equal(sums[0], sums[2])
    assert torch.equal(sums[1], sums[3])


@pytest.mark.gpu
def test_cudnn_comes_close_to_float64() -> None:
    rng = torch.Generator().manual_seed(2)
    given = arguments(rng, 200, 128, torch.float32)
    q, dz, k, v, z, _, table = (x.to(torch.bfloat16) if x.is_floating_point() else x for x in given)
    lse = attention_lse(q, k, table, 0, scale=0.3)
    sums = [torch.zeros(200, GROUPS, 128, device="cuda") for _ in "kv"]
    on_gpu = [x.cuda() for x in (dz, q, k, v, table)]
    got = attention_backward_cudnn(
        *on_gpu, 0, z.cuda(), lse.cuda(), scale=0.3, dk=sums[0], dv=sums[1], fresh=True
    )
    assert got is not None
    wide = [x.double() for x in (dz, q, k, v)]
    exact = [torch.zeros(200, GROUPS, 128, dtype=torch.float64) for _ in "kv"]
    wanted = attention_backward_reference(
        *wide, table, 0, z.double(), lse.double(), scale=0.3, dk=exact[0], dv=exact[1]
    )
    assert wanted is not None
    for a, b in zip((got, *sums), (wanted, *exact), strict=True):
        error = (a.cpu().double() - b).norm() / b.norm()
        assert error < 0.02
