"""Gradient of causal attention for one window of a sequence over its paged keys and values.

The window [start, start + s) attends to the keys [0, start + s) of its sequence. Its gradient
reaches the window's queries, and the keys and values of every earlier row: those are summed over
windows, so that the sums of rows [start, start + s) are complete once all later windows have run
(FlexLLM, arXiv 2402.18789; the blocked formulas are those of FlashAttention-2, arXiv 2307.08691).

With S = scale q k^T, C = softcap tanh(S / softcap), P = exp(C - lse) and z = P v::

    dV += P^T dz        dP = dz v^T        dC = P (dP - rowsum(dz z))
    dS = dC (1 - (C / softcap)^2)          dq = scale dS k        dK += scale dS^T q
"""

from __future__ import annotations

import logging
from typing import Literal

import torch

from invivo.kernels.device import runs_triton

BLOCK_ROWS = 256  # query rows at a time
BLOCK_KEYS = 512  # keys at a time

_log = logging.getLogger(__name__)


def attention_lse(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    blocks: torch.Tensor,
    start: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Log-sum-exp of the scores of each row and head: what :func:`attention_backward` needs.

    Args:
        q: [s, H, D] queries of rows [start, start + s), as they attend.
        k_cache: [n_blocks, block_size, G, D].
        blocks: [>= blocks of start + s] physical block of each logical block.

    Returns:
        [s, H] float32 (float64 for float64).
    """
    wide = _wide(q)
    n_rows, n_heads, _ = q.shape
    lse = torch.empty(n_rows, n_heads, dtype=wide, device=q.device)
    for first in range(0, n_rows, BLOCK_ROWS):
        rows = slice(first, min(first + BLOCK_ROWS, n_rows))
        queries = _grouped(q[rows], k_cache.shape[2]).to(wide)
        running: torch.Tensor | None = None
        for keys in _key_blocks(start + rows.start, start + rows.stop, window):
            k = _gather(k_cache, blocks, keys).to(wide)
            capped = _scores(queries, k, scale, softcap)
            hidden = _hidden(start + rows.start, rows.stop - rows.start, keys, window, q.device)
            if hidden is not None:
                capped = _masked(capped, hidden, -torch.inf)
            part = torch.logsumexp(capped, dim=-1)
            running = part if running is None else torch.logaddexp(running, part)
        assert running is not None
        lse[rows] = _ungrouped(running.unsqueeze(-1), n_heads).squeeze(-1)
    return lse


def attention_backward_reference(
    dz: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    blocks: torch.Tensor,
    start: int,
    z: torch.Tensor | None,
    lse: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    fresh: bool = False,
) -> torch.Tensor | None:
    """Gradient of the queries; those of keys and values are added to ``dk`` and ``dv``.

    Args:
        dz: [s, H, D] gradient of the mixed values ``z`` of rows [start, start + s).
        q: [s, H, D] queries as they attended.
        k_cache, v_cache: [n_blocks, block_size, G, D]; query head h reads key head
            ``h // (H / G)``.
        blocks: [>= blocks of start + s] physical block of each logical block of the sequence.
        z: [s, H, D]; None where only the gradient of the values is wanted.
        lse: [s, H], of :func:`attention_lse`.
        scale, window, softcap: as in :func:`invivo.kernels.attention.paged_attention`.
        dk, dv: [>= start + s, G, D] sums of the sequence, changed in place; None where nobody
            reads them.
        fresh: the sums hold nothing yet: what lies there is forgotten.

    Returns:
        [s, H, D] in the dtype of ``q``; None without ``z``.
    """
    wide = _wide(q)
    n_rows, n_heads, _ = q.shape
    n_groups = k_cache.shape[2]
    if fresh:
        for total in (dk, dv):
            if total is not None:
                total[: start + n_rows] = 0.0
    dq = delta = None
    if z is not None:
        dq = torch.empty_like(q)
        delta = (dz.to(wide) * z.to(wide)).sum(-1, keepdim=True)
    for first in range(0, n_rows, BLOCK_ROWS):
        rows = slice(first, min(first + BLOCK_ROWS, n_rows))
        queries = _grouped(q[rows], n_groups).to(wide)
        d_mixed = _grouped(dz[rows], n_groups).to(wide)
        row_delta = None if delta is None else _grouped(delta[rows], n_groups)
        row_lse = _grouped(lse[rows].unsqueeze(-1).to(wide), n_groups)
        d_queries = torch.zeros_like(queries)
        for keys in _key_blocks(start + rows.start, start + rows.stop, window):
            k = _gather(k_cache, blocks, keys).to(wide)
            v = _gather(v_cache, blocks, keys).to(wide)
            capped = _scores(queries, k, scale, softcap)
            probs = torch.exp(capped - row_lse)
            hidden = _hidden(start + rows.start, rows.stop - rows.start, keys, window, q.device)
            if hidden is not None:
                probs = _masked(probs, hidden, 0.0)
            if dv is not None:
                dv[keys] += torch.bmm(probs.transpose(1, 2), d_mixed).transpose(0, 1)
            if row_delta is None:
                continue
            d_scores = probs.mul_(torch.bmm(d_mixed, v.transpose(1, 2)).sub_(row_delta))
            if softcap is not None:
                d_scores *= 1.0 - (capped / softcap).square_()
            d_scores *= scale
            d_queries += torch.bmm(d_scores, k)
            if dk is not None:
                dk[keys] += torch.bmm(d_scores.transpose(1, 2), queries).transpose(0, 1)
        if dq is not None:
            dq[rows] = _ungrouped(d_queries, n_heads).to(q.dtype)
    return dq


def attention_backward(
    dz: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    blocks: torch.Tensor,
    start: int,
    z: torch.Tensor | None,
    lse: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    fresh: bool = False,
) -> torch.Tensor | None:
    """:func:`attention_backward_reference`, by the :func:`fastest_way`."""
    way = fastest_way(q, dz, z, start, window=window, softcap=softcap)
    _log.debug("attention backward of %d rows by %s", q.shape[0], way)
    if way == "cudnn":
        from invivo.kernels.cudnn_attention_backward import whole_text_backward

        assert z is not None
        return whole_text_backward(
            dz, q, k_cache, v_cache, blocks, z, lse, scale=scale, dk=dk, dv=dv, fresh=fresh
        )
    backward = attention_backward_reference
    if way == "triton":
        from invivo.kernels.triton_attention_backward import attention_backward_triton

        backward = attention_backward_triton
    return backward(
        dz,
        q,
        k_cache,
        v_cache,
        blocks,
        start,
        z,
        lse,
        scale=scale,
        window=window,
        softcap=softcap,
        dk=dk,
        dv=dv,
        fresh=fresh,
    )


def fastest_way(
    q: torch.Tensor,
    dz: torch.Tensor,
    z: torch.Tensor | None,
    start: int,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> Literal["cudnn", "triton", "torch"]:
    """Which kernels make this gradient (arguments as in :func:`attention_backward_reference`);
    cuDNN's, whose sums change in their last bits from run to run, not where torch is asked for
    deterministic algorithms."""
    if not runs_triton(q, dz):
        return "torch"
    from invivo.kernels.cudnn_attention_backward import runs_on, serves

    if (
        z is not None
        and runs_on(q.device)
        and serves(q, dz, start, window, softcap)
        and not torch.are_deterministic_algorithms_enabled()
    ):
        return "cudnn"
    return "triton"


def gather_rows(cache: torch.Tensor, blocks: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a sequence from cache [n_blocks, block_size, G, D]: a copy
    [stop - start, G, D]."""
    size = cache.shape[1]
    low, high = start // size, -(-stop // size)
    rows = cache[blocks[low:high].long()].flatten(0, 1)
    return rows[start - low * size : stop - low * size]


def gather_text(
    k_cache: torch.Tensor, v_cache: torch.Tensor, blocks: torch.Tensor, n_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the first rows of a text, by the fastest way: copies [n_rows, G, D]."""
    if runs_triton(k_cache, v_cache):
        from invivo.kernels.triton_pages import gather_text_triton

        return gather_text_triton(k_cache, v_cache, blocks, n_rows)
    return gather_rows(k_cache, blocks, 0, n_rows), gather_rows(v_cache, blocks, 0, n_rows)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _grouped(x: torch.Tensor, n_groups: int) -> torch.Tensor:
    """[s, H, D] -> [G, (H / G) s, D]: the queries of a key head below each other."""
    n_rows, n_heads, width = x.shape
    x = x.view(n_rows, n_groups, n_heads // n_groups, width).permute(1, 2, 0, 3)
    return x.reshape(n_groups, -1, width)


def _ungrouped(x: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The inverse of :func:`_grouped`."""
    n_groups, width = x.shape[0], x.shape[-1]
    x = x.view(n_groups, n_heads // n_groups, -1, width)
    return x.permute(2, 0, 1, 3).reshape(-1, n_heads, width)


def _key_blocks(first_row: int, last_row: int, window: int | None) -> list[slice]:
    """The pieces of the keys that rows [first_row, last_row) see."""
    low = 0 if window is None else max(0, first_row - window + 1)
    return [slice(i, min(i + BLOCK_KEYS, last_row)) for i in range(low, last_row, BLOCK_KEYS)]


def _gather(cache: torch.Tensor, blocks: torch.Tensor, keys: slice) -> torch.Tensor:
    """Keys or values by head: [G, n, D]."""
    return gather_rows(cache, blocks, keys.start, keys.stop).transpose(0, 1)


def _scores(
    queries: torch.Tensor, k: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """[G, R s, n] scaled and capped."""
    scores = torch.bmm(queries, k.transpose(1, 2)).mul_(scale)
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _hidden(
    first_row: int, n_rows: int, keys: slice, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """[s, n], true where a row does not see a key; None where every row sees every key."""
    last_row = first_row + n_rows - 1
    all_past = keys.stop - 1 <= first_row
    all_near = window is None or last_row - keys.start < window
    if all_past and all_near:
        return None
    index = torch.arange(first_row, first_row + n_rows, device=device)
    distance = index[:, None] - torch.arange(keys.start, keys.stop, device=device)[None, :]
    hidden = distance < 0
    return hidden if window is None else hidden | (distance >= window)


def _masked(x: torch.Tensor, hidden: torch.Tensor, value: float) -> torch.Tensor:
    """x [G, R s, n] with ``value`` where ``hidden`` [s, n]."""
    shape = (x.shape[0], -1, *hidden.shape)
    return x.view(shape).masked_fill_(hidden, value).view(x.shape)
