"""The recurrence of gated linear attention laid open, span by span.

Between the rows that somebody looks at it runs by chunks; at those rows the memory is offered
before the row and the state after it, and the rows after it go on from the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from invivo.kernels.gla import gla
from invivo.models.sites import KeyShare, StateTaps

# (row, site, value) -> what goes on.
Ask = Callable[[int, str, torch.Tensor], torch.Tensor]


def read_openly(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    memory: torch.Tensor,
    taps: StateTaps,
    span: int,
    layer: int,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """One span of n rows.

    Args:
        q, k, g: [n, H, K], g the log gates. v: [n, H, V].
        memory: [H, K, V] before the span.

    Returns:
        What the heads read [n, H, V], the state after the span, and whether an answer was anything
        but what was offered.
    """
    changed = False

    def ask(row: int, site: str, value: torch.Tensor) -> torch.Tensor:
        nonlocal changed
        answer = taps.at_state(span, row, site, layer, value)
        changed = changed or answer is not value
        return answer

    read, after = _through(q, k, v, g, memory, taps.state_rows(span, layer), ask)
    return read, after, changed


def reweigh(
    z: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    memory: torch.Tensor,
    rows: Sequence[int],
    shares: Sequence[KeyShare],
) -> torch.Tensor:
    """``z`` [n, H, V] of one span where chosen queries see chosen keys otherwise.

    What a query reads is a sum over keys: with some of them multiplied it is what it would read
    from the state that so multiplied keys leave.

    Args:
        rows: those that are computed one by one, as they were for ``z``.
    """
    for share in shares:
        chosen = torch.zeros(k.shape[0], 1, 1, dtype=torch.bool, device=k.device)
        chosen[list(share.keys)] = True
        keys = torch.where(chosen, (k * share.factor).to(k.dtype), k)
        before = memory if share.before is None else share.before
        read, after = _through(q, keys, v, g, before, rows, None)
        share.leave(after)
        asking = torch.zeros(*z.shape[:2], 1, dtype=torch.bool, device=z.device)
        queries = torch.tensor(list(share.queries), dtype=torch.int64, device=z.device)
        asking[queries[:, None], list(share.heads)] = True
        z = torch.where(asking, read, z)
    return z


def _through(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    memory: torch.Tensor,
    rows: Sequence[int],
    ask: Ask | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read [n, H, V] and the state at the end, ``rows`` one by one and the rest by
    chunks."""
    wide, n = memory.dtype, q.shape[0]
    scale = q.shape[-1] ** -0.5
    state, at = memory, 0
    pieces: list[torch.Tensor] = []
    for row in (*rows, n):
        if row > at:
            piece = slice(at, row)
            out, state = _by_chunks(q[piece], k[piece], v[piece], g[piece], state)
            pieces.append(out)
        if row == n:
            break
        if ask is not None:
            state = ask(row, "gla.head.memory", state)
        gate, key, value = g[row].to(wide).exp(), k[row].to(wide), v[row].to(wide)
        state = gate.unsqueeze(-1) * state + key.unsqueeze(-1) * value.unsqueeze(-2)
        if ask is not None:
            state = ask(row, "gla.head.state", state)
        query = (q[row].to(wide) * scale).unsqueeze(-2)
        pieces.append(torch.matmul(query, state).squeeze(-2).to(v.dtype).unsqueeze(0))
        at = row + 1
    return torch.cat(pieces), state


def _by_chunks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    n = q.shape[0]
    ends = torch.tensor([0, n], dtype=torch.int32, device=q.device) if q.is_cuda else None
    out, after = gla(
        q,
        k,
        v,
        g,
        span_start=[0, n],
        span_start_device=ends,
        initial_state=state.unsqueeze(0),
        want_state=True,
    )
    assert after is not None
    return out, after[0]
