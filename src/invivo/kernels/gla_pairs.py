"""The product within one chunk of gated linear attention, exact for every gate.

``P_ij = sum_c q_ic k_jc exp(gc_ic - gc_jc)`` for i >= j, with ``gc`` the inclusive cumulative sum
of the log gates. Two ways, chosen for each chunk and head:

- *mild* gates: one product of ``q exp(gc - m)`` and ``k exp(m - gc)`` with m in the middle of the
  chunk's range. Scaling a channel up and its partner down costs a float no precision as long as
  the exponents stay in its range;
- *steep* gates: sub-chunks of 16 rows (secondary chunking, Yang et al., 2023, arXiv 2312.06635,
  section 4.3), the decays between them as products of two factors <= 1, those within one as they
  are defined. Decays are sums of log gates and never differences of sums, so that nothing
  cancels: correct even where a gate is exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK = 16
STEEP = 60.0  # nats of decay over a chunk, above which it is steep


def pairs(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """P [N, H, C, C], zero above the diagonal, of q, k, g [N, H, C, K]; C a multiple of 16."""
    steep = _steep(g)
    if steep is None:
        return _mild(q, k, g)
    p = q.new_empty(*q.shape[:-1], q.shape[-2])
    p[~steep] = _mild(q[~steep], k[~steep], g[~steep])
    p[steep] = _blocked(q[steep], k[steep], g[steep])
    return p


def pairs_backward(
    d: torch.Tensor, q: torch.Tensor, k: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of q and k from ``d`` [N, H, C, C], that of P, zero above the diagonal."""
    steep = _steep(g)
    if steep is None:
        return _mild_backward(d, q, k, g)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dq[~steep], dk[~steep] = _mild_backward(d[~steep], q[~steep], k[~steep], g[~steep])
    dq[steep], dk[steep] = _blocked_backward(d[steep], q[steep], k[steep], g[steep])
    return dq, dk


def _steep(g: torch.Tensor) -> torch.Tensor | None:
    """[N, H] bool; None where no chunk is."""
    steep = g.sum(-2).amin(-1) < -STEEP
    return steep if bool(steep.any()) else None


# --- one product --------------------------------------------------------------------------------
def _factors(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(gc - m) and exp(m - gc)."""
    sums = g.cumsum(-2)
    centred = sums - (sums[..., :1, :] + sums[..., -1:, :]) / 2
    return centred.exp(), centred.neg_().exp_()


def _mild(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    down, up = _factors(g)
    # The unwanted half is cut off and not multiplied by zero: it may be large.
    return ((q * down) @ (k * up).transpose(-1, -2)).tril_()


def _mild_backward(
    d: torch.Tensor, q: torch.Tensor, k: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    down, up = _factors(g)
    return down * (d @ (k * up)), up * (d.transpose(-1, -2) @ (q * down))


# --- by sub-chunks ------------------------------------------------------------------------------
def _own_decay(blocks: torch.Tensor) -> torch.Tensor:
    """exp(sum of the log gates in (j, i]) within each sub-chunk, 0 for i < j.

    [M, n, 16, K] -> [M, n, 16 (i), 16 (j), K].
    """
    at = torch.arange(BLOCK, device=blocks.device)
    upto = at[:, None] <= at[None]  # [l, j]: gate l is no part of what happened after j
    parts = blocks.unsqueeze(-2).masked_fill(upto.unsqueeze(-1), 0.0)
    before = (at[:, None] < at[None]).unsqueeze(-1)
    return parts.cumsum(-3).masked_fill_(before, -torch.inf).exp_()


def _between(blocks: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each sub-chunk b from the second: the decays from its start to its rows [M, 16, K], and
    from each earlier row to its start [M, 16 b, K]."""
    inside = blocks.cumsum(-2)
    later = torch.cat((blocks[..., 1:, :], torch.zeros_like(blocks[..., :1, :])), dim=-2)
    to_end = later.flip(-2).cumsum(-2).flip(-2)
    whole = inside[..., -1:, :]
    for b in range(1, blocks.shape[1]):
        skipped = whole[:, 1:b].flip(1).cumsum(1).flip(1)  # whole sub-chunks lying between
        skipped = torch.cat((skipped, torch.zeros_like(whole[:, :1])), dim=1)
        yield b, inside[:, b].exp(), (to_end[:, :b] + skipped).flatten(1, 2).exp()


def _blocked(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """P [M, C, C] of [M, C, K]."""
    blocks = g.unflatten(1, (-1, BLOCK))
    own = torch.einsum(
        "mnik,mnjk,mnijk->mnij",
        q.unflatten(1, (-1, BLOCK)),
        k.unflatten(1, (-1, BLOCK)),
        _own_decay(blocks),
    )
    p = q.new_zeros(*q.shape[:2], q.shape[1])
    for b in range(blocks.shape[1]):
        rows = slice(b * BLOCK, (b + 1) * BLOCK)
        p[:, rows, rows] = own[:, b]
    for b, down, up in _between(blocks):
        rows, past = slice(b * BLOCK, (b + 1) * BLOCK), slice(0, b * BLOCK)
        p[:, rows, past] = (q[:, rows] * down) @ (k[:, past] * up).transpose(-1, -2)
    return p


def _blocked_backward(
    d: torch.Tensor, q: torch.Tensor, k: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = g.unflatten(1, (-1, BLOCK))
    decay = _own_decay(blocks)
    n = blocks.shape[1]
    own = torch.stack([d[:, b * BLOCK : (b + 1) * BLOCK] for b in range(n)], dim=1)
    own = torch.stack([own[:, b, :, b * BLOCK : (b + 1) * BLOCK] for b in range(n)], dim=1)
    dq = torch.einsum("mnij,mnjk,mnijk->mnik", own, k.unflatten(1, (-1, BLOCK)), decay).flatten(
        1, 2
    )
    dk = torch.einsum("mnij,mnik,mnijk->mnjk", own, q.unflatten(1, (-1, BLOCK)), decay).flatten(
        1, 2
    )
    for b, down, up in _between(blocks):
        rows, past = slice(b * BLOCK, (b + 1) * BLOCK), slice(0, b * BLOCK)
        part = d[:, rows, past]
        dq[:, rows] += down * (part @ (k[:, past] * up))
        dk[:, past] += up * (part.transpose(-1, -2) @ (q[:, rows] * down))
    return dq, dk
