"""Causal attention of the rows of a flat batch over paged keys and values.

One operation for prefill, chunks of a prefill, decode and scoring: a row sees the keys of its own
sequence up to its own index (see :class:`~invivo.kernels.paging.PagedLayout`).
"""

from __future__ import annotations

import torch

from invivo.kernels.cpu_attention import paged_attention_cpu
from invivo.kernels.device import runs_on_cpu, runs_triton
from invivo.kernels.paging import PagedLayout


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Write rows k, v [T, G, D] to ``slots`` [T] of the caches [n_blocks, block_size, G, D]."""
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slots, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slots, v)


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention written out, one span after the other; differentiable in q and the caches.

    Args:
        q: [T, H, D].
        k_cache, v_cache: [n_blocks, block_size, G, D], H a multiple of G; query head h reads
            key head ``h // (H / G)``.
        scale: factor on the scores.
        window: a row sees only the last ``window`` keys, its own included.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).

    Returns:
        [T, H, D] in q's dtype; the arithmetic is done in float32, or float64 for float64.
    """
    n_heads, n_groups = q.shape[1], k_cache.shape[2]
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    starts = layout.span_start_host or layout.span_start.tolist()
    lengths = layout.kv_len_host or layout.kv_len.tolist()
    outputs = []
    for span, length in enumerate(lengths):
        queries = q[starts[span] : starts[span + 1]].to(wide)
        n_blocks = -(-length // layout.block_size)
        blocks = layout.block_table[span, :n_blocks].long()
        keys = k_cache[blocks].flatten(0, 1)[:length].to(wide)
        values = v_cache[blocks].flatten(0, 1)[:length].to(wide)
        keys = keys.repeat_interleave(n_heads // n_groups, dim=1)
        values = values.repeat_interleave(n_heads // n_groups, dim=1)
        scores = torch.einsum("thd,lhd->htl", queries, keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        key_index = torch.arange(length, device=q.device)
        query_index = torch.arange(length - queries.shape[0], length, device=q.device)
        distance = query_index[:, None] - key_index[None, :]
        hidden = distance < 0
        if window is not None:
            hidden = hidden | (distance >= window)
        probs = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        outputs.append(torch.einsum("htl,lhd->thd", probs, values).to(q.dtype))
    return torch.cat(outputs) if outputs else q.clone()


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """:func:`paged_attention_reference`, by the fastest way for the device.

    Differentiable, by way of the reference, where gradients are asked for.
    """
    if runs_on_cpu(q, k_cache, v_cache):
        return paged_attention_cpu(
            q, k_cache, v_cache, layout, scale=scale, window=window, softcap=softcap
        )
    if runs_triton(q, k_cache, v_cache):
        from invivo.kernels.triton_attention import paged_attention_triton

        return paged_attention_triton(
            q, k_cache, v_cache, layout, scale=scale, window=window, softcap=softcap
        )
    return paged_attention_reference(
        q, k_cache, v_cache, layout, scale=scale, window=window, softcap=softcap
    )


def attention_with_lse(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`paged_attention`, and the log-sum-exp of each row's scores where it costs nothing.

    Returns:
        z [T, H, D], and [T, H] float32 valid from row ``layout.n_decode`` on; None where the
        device's kernel has none at hand (:func:`invivo.kernels.attention_backward.attention_lse`).
    """
    if not runs_triton(q, k_cache, v_cache):
        z = paged_attention(
            q, k_cache, v_cache, layout, scale=scale, window=window, softcap=softcap
        )
        return z, None
    from invivo.kernels.triton_attention import paged_attention_triton

    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    z = paged_attention_triton(
        q, k_cache, v_cache, layout, scale=scale, window=window, softcap=softcap, lse=lse
    )
    return z, lse
