"""The window's attention gradient against autograd through the reference, in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invivo.kernels import attention_backward as module
from invivo.kernels.attention import paged_attention_reference
from invivo.kernels.attention_backward import attention_backward, attention_lse, gather_rows
from invivo.kernels.paging import contiguous_layout


def scattered(
    x: torch.Tensor, block_size: int, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [L, G, D] in pages at random places, the rest huge; and the table."""
    n_blocks = -(-x.shape[0] // block_size)
    table = torch.randperm(n_blocks + 3, generator=rng)[:n_blocks]
    cache = torch.full((n_blocks + 3, block_size, *x.shape[1:]), 1e4, dtype=x.dtype)
    for i, row in enumerate(x):
        cache[table[i // block_size], i % block_size] = row
    return cache, table


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 23),
    groups=st.integers(1, 3),
    repeat=st.integers(1, 3),
    window=st.sampled_from([None, 1, 4, 50]),
    softcap=st.sampled_from([None, 1.5]),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    blocks=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    seed=st.integers(0, 10_000),
)
def test_windows_add_up_to_the_whole_gradient(
    length: int,
    groups: int,
    repeat: int,
    window: int | None,
    softcap: float | None,
    cuts: list[int],
    blocks: tuple[int, int],
    seed: int,
) -> None:
    rng = torch.Generator().manual_seed(seed)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(length, heads, 4, generator=rng, dtype=torch.float64)

    q, dz, k, v = random(groups * repeat), random(groups * repeat), random(groups), random(groups)
    options = {"scale": 0.6, "window": window, "softcap": softcap}
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    layout = contiguous_layout([length], block_size=length)
    z = paged_attention_reference(leaves[0], leaves[1][None], leaves[2][None], layout, **options)
    wanted = torch.autograd.grad(z, leaves, dz)

    k_cache, table = scattered(k, 3, rng)
    v_cache = torch.full_like(k_cache, 1e4)
    for i, row in enumerate(v):
        v_cache[table[i // 3], i % 3] = row
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    dq = torch.zeros_like(q)
    rows, keys = module.BLOCK_ROWS, module.BLOCK_KEYS
    module.BLOCK_ROWS, module.BLOCK_KEYS = blocks
    try:
        stop = length
        while stop > 0:
            start = max(0, stop - cuts[stop % len(cuts)])
            own = slice(start, stop)
            lse = attention_lse(q[own], k_cache, table, start, **options)
            got = attention_backward(
                dz[own],
                q[own],
                k_cache,
                v_cache,
                table,
                start,
                z[own].detach(),
                lse,
                dk=dk,
                dv=dv,
                **options,
            )
            assert got is not None
            dq[own] = got
            stop = start
        only_dv = torch.zeros_like(v)
        lse = attention_lse(q, k_cache, table, 0, **options)
        nothing = attention_backward(
            dz, q, k_cache, v_cache, table, 0, None, lse, dv=only_dv, **options
        )
    finally:
        module.BLOCK_ROWS, module.BLOCK_KEYS = rows, keys
    assert nothing is None
    for got, right in zip((dq, dk, dv, only_dv), (*wanted, wanted[2]), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)


def test_rows_are_gathered_from_their_pages() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(11, 2, 3, generator=rng)
    cache, table = scattered(x, 4, rng)
    for start, stop in ((0, 11), (3, 9), (4, 8), (5, 5), (0, 0), (10, 11)):
        assert torch.equal(gather_rows(cache, table, start, stop), x[start:stop])
