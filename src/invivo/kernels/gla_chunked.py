"""Gated linear attention by chunks: matrix products and a hand-written backward, any device.

Within a chunk of C rows, ``gc`` is the inclusive cumulative sum of the log gates and ``gn`` its
last row (Yang et al., 2023, arXiv 2312.06635, section 4.3)::

    S_next = diag(exp gn) S + (K * exp(gn - gc))^T V        O = (Q * exp gc) S + P V
    P_ij   = sum_c Q_ic K_jc exp(gc_ic - gc_jc)  for i >= j

and backward, dS being the gradient at a chunk's END and dA = tril(dO V^T)::

    dS <- diag(exp gn) dS + (Q * exp gc)^T dO               dV = P^T dO + (K * exp(gn - gc)) dS
    dQ = exp(gc) * (dO S^T)      + [sum_j dA_ij K_j exp(gc_i - gc_j)]
    dK = exp(gn - gc) * (V dS^T) + [sum_i dA_ij Q_i exp(gc_i - gc_j)]
    dg_t = sum_{i >= t in the chunk} (Q_i dQ_i - K_i dK_i) + carry
    carry = exp(gn) * rowsum(S * dS) + sum_j K_j * (state part of dK_j)

``gn - gc`` is summed from the end and never a difference, so that nothing cancels where gates are
strong. States are not kept for the backward: it computes them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from invivo.kernels.gla_pairs import pairs, pairs_backward

CHUNK = 64
TILE = 16  # chunks of short spans are a multiple of this


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    initial_state: torch.Tensor,
    span_start: tuple[int, ...],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`invivo.kernels.gla.gla`: outputs [T, H, V] and final states [S, H, K, V]."""
    o, state = _Chunked.apply(q, k, v, g, initial_state, span_start, scale)
    return o, state


@dataclass(frozen=True, slots=True)
class _Chunks:
    """How the rows of the spans fall into N chunks of C rows.

    Attributes:
        rows: [N, C] row of each place; where ``holes``, some other row.
        holes: [N, C] bool, places past a span's end; None: there are none.
        steps: the n-th (spans, chunks) are all spans with more than n chunks, and those chunks.
    """

    rows: torch.Tensor
    holes: torch.Tensor | None
    steps: list[tuple[torch.Tensor, torch.Tensor]]

    def gather(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[T, H, D] -> [N, H, C, D], zeros in the holes."""
        found = x[self.rows].to(dtype)
        if self.holes is not None:
            found = found.masked_fill(self.holes[..., None, None], 0.0)
        return found.transpose(1, 2).contiguous()

    def scatter(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[N, H, C, D] -> [T, H, D] in the dtype of ``like``."""
        out = torch.empty_like(like)
        flat = x.transpose(1, 2).to(like.dtype)
        if self.holes is None:
            out[self.rows] = flat
        else:
            out[self.rows[~self.holes]] = flat[~self.holes]
        return out


def _cut(span_start: tuple[int, ...], device: torch.device) -> _Chunks:
    spans = list(pairwise(span_start))
    longest = max((stop - start for start, stop in spans), default=0)
    size = min(CHUNK, max(TILE, -(-longest // TILE) * TILE))
    starts: list[int] = []
    stops: list[int] = []
    steps: list[tuple[list[int], list[int]]] = []
    for s, (start, stop) in enumerate(spans):
        for n, at in enumerate(range(start, stop, size)):
            if n == len(steps):
                steps.append(([], []))
            steps[n][0].append(s)
            steps[n][1].append(len(starts))
            starts.append(at)
            stops.append(stop)

    def on_device(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    rows = on_device(starts)[:, None] + torch.arange(size, device=device)
    ragged = any((stop - start) % size for start, stop in spans)
    holes = rows >= on_device(stops)[:, None] if ragged else None
    if ragged:
        rows = rows.clamp(max=max(0, span_start[-1] - 1))
    return _Chunks(rows, holes, [(on_device(s), on_device(c)) for s, c in steps])


@dataclass(slots=True)
class _Parts:
    """What both directions compute first. Tensors of N chunks, H heads, C rows."""

    q: torch.Tensor  # scaled
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    down: torch.Tensor  # [N, H, C, K] exp gc: from the chunk's start to the row
    after: torch.Tensor  # [N, H, C, K] exp(gn - gc): from the row to the chunk's end
    through: torch.Tensor  # [N, H, K] exp gn
    states: torch.Tensor  # [N, H, K, V] entering each chunk
    final: torch.Tensor  # [S, H, K, V]


def _parts(
    chunks: _Chunks,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    initial_state: torch.Tensor,
    scale: float,
) -> _Parts:
    wide = initial_state.dtype
    q, k, v, g = (chunks.gather(x, wide) for x in (q, k, v, g))
    q = q * scale
    sums = g.cumsum(-2)
    through = sums[..., -1, :].exp()
    later = torch.cat((g[..., 1:, :], torch.zeros_like(g[..., :1, :])), dim=-2)
    after = later.flip(-2).cumsum(-2).flip(-2).exp()
    states = (k * after).transpose(-1, -2) @ v  # what each chunk writes, then what it finds
    final = initial_state.clone()
    for spans, at in chunks.steps:
        entering = final[spans]
        final[spans] = torch.addcmul(states[at], through[at].unsqueeze(-1), entering)
        states[at] = entering
    return _Parts(q, k, v, g, sums.exp(), after, through, states, final)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        initial_state: torch.Tensor,
        span_start: tuple[int, ...],
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(q, k, v, g, initial_state)
        ctx.span_start, ctx.scale = span_start, scale
        return chunked_forward(q, k, v, g, initial_state, span_start, scale)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_o: torch.Tensor, d_final: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, g, state = ctx.saved_tensors
        grads = chunked_backward(d_o, d_final, q, k, v, g, state, ctx.span_start, ctx.scale)
        return *grads, None, None


def chunked_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    initial_state: torch.Tensor,
    span_start: tuple[int, ...],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`chunked` without autograd."""
    chunks = _cut(span_start, q.device)
    p = _parts(chunks, q, k, v, g, initial_state, scale)
    o = (p.q * p.down) @ p.states
    o += pairs(p.q, p.k, p.g) @ p.v
    return chunks.scatter(o, v), p.final


def chunked_backward(
    d_o: torch.Tensor,
    d_final: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    initial_state: torch.Tensor,
    span_start: tuple[int, ...],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, g and the initial state."""
    chunks = _cut(span_start, q.device)
    p = _parts(chunks, q, k, v, g, initial_state, scale)
    d_o = chunks.gather(d_o, initial_state.dtype)

    d_states = (p.q * p.down).transpose(-1, -2) @ d_o  # of its reads, then at each chunk's end
    d_initial = d_final.clone()
    for spans, at in reversed(chunks.steps):
        leaving = d_initial[spans]
        d_initial[spans] = torch.addcmul(d_states[at], p.through[at].unsqueeze(-1), leaving)
        d_states[at] = leaving

    later = torch.ones(d_o.shape[-2], d_o.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    d_pairs = (d_o @ p.v.transpose(-1, -2)).masked_fill_(later, 0.0)
    dq, dk = pairs_backward(d_pairs, p.q, p.k, p.g)
    dq += p.down * (d_o @ p.states.transpose(-1, -2))
    dk_state = p.after * (p.v @ d_states.transpose(-1, -2))
    dk += dk_state
    dv = pairs(p.q, p.k, p.g).transpose(-1, -2) @ d_o + (p.k * p.after) @ d_states
    carry = p.through * (p.states * d_states).sum(-1) + (p.k * dk_state).sum(-2)
    dg = (p.q * dq - p.k * dk).flip(-2).cumsum(-2).flip(-2) + carry.unsqueeze(-2)
    return (
        chunks.scatter(dq * scale, q),
        chunks.scatter(dk, k),
        chunks.scatter(dv, v),
        chunks.scatter(dg, g),
        d_initial,
    )
