"""What goes to cuDNN and comes back, with autograd in its place; on a GPU cuDNN itself."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.test_attention_backward import scattered

from invivo.kernels import attention_backward as attention_backward_module
from invivo.kernels import cudnn_attention_backward as module
from invivo.kernels.attention_backward import (
    attention_backward,
    attention_backward_reference,
    attention_lse,
    fastest_way,
    gather_rows,
)
from invivo.kernels.cudnn_attention_backward import serves, whole_text_backward

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


def half(n_rows: int, head_dim: int) -> torch.Tensor:
    return torch.zeros(n_rows, 2, head_dim, dtype=torch.bfloat16)


def test_only_plain_causal_attention_from_a_start_is_served() -> None:
    q = half(512, 64)
    assert serves(q, q, 0, None, None)
    assert serves(q, q, 0, 512, None)  # a window that hides nothing
    assert not serves(q, q, 3, None, None)
    assert not serves(q, q, 0, 511, None)
    assert not serves(q, q, 0, None, 30.0)
    assert not serves(q.float(), q.float(), 0, None, None)
    assert not serves(q, q.float(), 0, None, None)
    assert not serves(half(512, 256), half(512, 256), 0, None, None)
    assert not serves(half(512, 60), half(512, 60), 0, None, None)


@pytest.mark.parametrize(("n_rows", "served"), [(0, 0), (1, 0), (511, 0), (513, 0), (2048, 1)])
def test_lengths_that_rarely_come_again_are_not_served(n_rows: int, served: int) -> None:
    assert serves(half(n_rows, 64), half(n_rows, 64), 0, None, None) == served


def gather_by_torch(
    k_cache: torch.Tensor, v_cache: torch.Tensor, blocks: torch.Tensor, n_rows: int
) -> list[torch.Tensor]:
    return [gather_rows(cache, blocks, 0, n_rows) for cache in (k_cache, v_cache)]


@pytest.fixture
def as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backward_module, "runs_triton", lambda *tensors: True)
    monkeypatch.setattr(module, "runs_on", lambda device: True)
    # What copies keys and values out of their pages runs on no CPU.
    monkeypatch.setattr(module, "gather_text", gather_by_torch)


@pytest.mark.usefixtures("as_on_hopper")
def test_one_place_says_whose_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    q = half(512, 64)
    assert fastest_way(q, q, q, 0) == "cudnn"
    assert fastest_way(q, q, None, 0) == "triton"  # the gradient of values alone
    assert fastest_way(q, q, q, 512) == "triton"
    assert fastest_way(q, q, q, 0, softcap=30.0) == "triton"
    with monkeypatch.context() as asked:
        asked.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert fastest_way(q, q, q, 0) == "triton"
    monkeypatch.setattr(module, "runs_on", lambda device: False)
    assert fastest_way(q, q, q, 0) == "triton"


def test_a_cpu_takes_torch_and_an_unknown_gpu_no_cudnn() -> None:
    q = half(512, 64)
    assert fastest_way(q, q, q, 0) == "torch"
    assert not module.runs_on(torch.device("cpu"))


@pytest.mark.usefixtures("as_on_hopper")
def test_what_cudnn_gives_is_what_the_window_gets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_backward", in_autograd_s_words)
    monkeypatch.setattr(module, "serves", lambda *case: True)
    caplog.set_level("DEBUG", attention_backward_module.__name__)
    rng = torch.Generator().manual_seed(1)
    q, dz, k, v, z, lse, table = arguments(rng, 9, 8, torch.float64)
    sums = [torch.zeros(9, GROUPS, 8, dtype=torch.float64) for _ in "kvkv"]
    got = attention_backward(
        dz, q, k, v, table, 0, z, lse, scale=0.3, dk=sums[0], dv=sums[1], fresh=True
    )
    wanted = attention_backward_reference(
        dz, q, k, v, table, 0, z, lse, scale=0.3, dk=sums[2], dv=sums[3]
    )
    assert got is not None
    assert wanted is not None
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(sums[:2], sums[2:])
    assert caplog.messages == ["attention backward of 9 rows by cudnn"]


def test_this_torch_takes_the_call_as_it_is_written() -> None:
    """On tensors without numbers: names, order and shapes."""
    on_meta = {"dtype": torch.bfloat16, "device": "meta"}
    q, k = torch.empty(1, HEADS, 512, 64, **on_meta), torch.empty(1, GROUPS, 512, 64, **on_meta)
    lse = torch.empty(1, HEADS, 512, device="meta")
    found = module._backward(q, q, k, k, q, lse=lse, scale=0.3)
    assert [x.shape for x in found] == [q.shape, k.shape, k.shape]


@pytest.mark.gpu
@pytest.mark.parametrize("length", [200, 512])
def test_cudnn_comes_close_to_float64(length: int) -> None:
    rng = torch.Generator().manual_seed(2)
    given = arguments(rng, length, 128, torch.float32)
    q, dz, k, v, z, _, table = (x.to(torch.bfloat16) if x.is_floating_point() else x for x in given)
    lse = attention_lse(q, k, table, 0, scale=0.3)
    sums = [torch.zeros(length, GROUPS, 128, device="cuda") for _ in "kv"]
    on_gpu = [x.cuda() for x in (dz, q, k, v, table, z, lse)]
    got = whole_text_backward(*on_gpu, scale=0.3, dk=sums[0], dv=sums[1], fresh=True)
    wide = [x.double() for x in (dz, q, k, v)]
    exact = [torch.zeros(length, GROUPS, 128, dtype=torch.float64) for _ in "kv"]
    wanted = attention_backward_reference(
        *wide, table, 0, z.double(), lse.double(), scale=0.3, dk=exact[0], dv=exact[1]
    )
    assert wanted is not None
    for a, b in zip((got, *sums), (wanted, *exact), strict=True):
        error = (a.cpu().double() - b).norm() / b.norm()
        assert error < 0.02
