"""Gated linear attention (Yang et al., 2023, arXiv 2312.06635, section 4) over packed rows.

Per head, with keys and queries of K channels, values of V and a gate alpha = exp(g) in (0, 1]^K::

    S_t = diag(alpha_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

The gate acts before the write: a token's own write is not decayed. ``gla`` takes the fastest way
for its tensors, ``gla_reference`` is the definition, ``gla_parallel`` the quadratic form of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

from invivo.kernels.device import runs_triton
from invivo.kernels.gla_chunked import chunked
from invivo.kernels.gla_chunked_op import gla_chunked_op

Spans = Sequence[int]


def gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    span_start: Spans,
    span_start_device: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    want_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Outputs of every row, and what each span leaves behind; differentiable in all tensors.

    Exact for every gate: no exponent is positive beyond what a float holds.

    Args:
        q, k: [T, H, K], the rows of S spans laid end to end.
        v: [T, H, V].
        g: [T, H, K] natural logarithms of the gates, <= 0 (-inf forgets everything).
        span_start: [S + 1] first row of each span, and T; on the host. A span may be empty.
        span_start_device: the same numbers where ``q`` is, int32: the Triton kernels read them.
        scale: of the queries; None = K ** -0.5.
        initial_state: [S, H, K, V] before each span, float32 (float64 for float64 inputs); None =
            zeros.
        want_state: also return the states after the spans.

    Returns:
        [T, H, V] in the dtype of ``v``; [S, H, K, V] float32 (float64 for float64), or None.
    """
    if q.is_cuda and span_start_device is not None and len(span_start) > 1:
        from invivo.kernels.triton_gla import ops

        if ops.supports(q, v):
            return ops.gla_triton(
                q,
                k,
                v,
                g,
                span_start=span_start_device,
                scale=scale,
                initial_state=initial_state,
                want_state=want_state,
            )
    return gla_chunked(
        q,
        k,
        v,
        g,
        span_start=span_start,
        scale=scale,
        initial_state=initial_state,
        want_state=want_state,
    )


def gla_from_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_logits: torch.Tensor,
    *,
    span_start: Spans,
    span_start_device: torch.Tensor | None = None,
    tau: float = 16.0,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    want_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`gla` with ``g`` as :func:`log_gates` gives it; gate_logits [T, H, K].

    The Triton kernels make the gates themselves: their logarithms are never in memory.
    """
    if q.is_cuda and span_start_device is not None and span_start_device.shape[0] > 1:
        from invivo.kernels.triton_gla import ops

        if ops.supports(q, v):
            return ops.gla_triton(
                q,
                k,
                v,
                gate_logits,
                span_start=span_start_device,
                scale=scale,
                initial_state=initial_state,
                want_state=want_state,
                tau=tau,
            )
    return gla_chunked(
        q,
        k,
        v,
        log_gates(gate_logits, tau),
        span_start=span_start,
        scale=scale,
        initial_state=initial_state,
        want_state=want_state,
    )


def log_gates(gate_logits: torch.Tensor, tau: float = 16.0) -> torch.Tensor:
    """``logsigmoid(gate_logits) / tau``, in float32 (float64 for float64); section 4.4."""
    return F.logsigmoid(gate_logits.to(_wide(gate_logits))) / tau


def gla_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    span_start: Spans,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    want_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`gla` by chunks of 64 rows, in torch's products alone, on any device."""
    _check(q, k, v, g, span_start, initial_state)
    if torch.compiler.is_compiling():
        o, state = gla_chunked_op(
            q, k, v, g, torch.tensor(list(span_start)), initial_state, _scale(q, scale)
        )
        return o, state if want_state else None
    if initial_state is None:
        shape = (len(span_start) - 1, q.shape[1], q.shape[2], v.shape[2])
        initial_state = torch.zeros(shape, dtype=_wide(q), device=q.device)
    o, state = chunked(q, k, v, g, initial_state, tuple(span_start), _scale(q, scale))
    return o, state if want_state else None


def gla_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    span_start: Spans,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    want_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`gla` row by row, as it is defined; any dtype and device, differentiable."""
    _check(q, k, v, g, span_start, initial_state)
    wide = _wide(q)
    queries = q.to(wide) * _scale(q, scale)
    keys, values, gates = k.to(wide), v.to(wide), g.to(wide).exp()
    rows, states = [], []
    for s, (start, stop) in enumerate(pairwise(span_start)):
        if initial_state is None:
            state = queries.new_zeros(*k.shape[1:], v.shape[2])
        else:
            state = initial_state[s]
        for t in range(start, stop):
            state = gates[t].unsqueeze(-1) * state + keys[t].unsqueeze(-1) * values[t].unsqueeze(-2)
            rows.append((queries[t].unsqueeze(-2) @ state).squeeze(-2))
        states.append(state)
    o = torch.stack(rows).to(v.dtype) if rows else torch.empty_like(v)
    if not want_state:
        return o, None
    return o, torch.stack(states) if states else queries.new_zeros(0, *k.shape[1:], v.shape[2])


def gla_parallel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """One span from a zero state as masked attention (section 4.2, equation 4): [T, H, V].

    ``P_ij = sum_c q_ic k_jc exp(b_ic - b_jc)`` with b the cumulative sums of ``g``. Takes memory
    T x T x H x K, and rounds where |b| is large: for tests.
    """
    wide = _wide(q)
    b = g.to(wide).cumsum(0)
    later = torch.ones(len(b), len(b), dtype=torch.bool, device=b.device).triu(1)
    decay = (b[:, None] - b[None]).masked_fill(later[..., None, None], -torch.inf).exp()
    pairs = torch.einsum("ihc,jhc,ijhc->ijh", q.to(wide), k.to(wide), decay)
    return (_scale(q, scale) * torch.einsum("ijh,jhv->ihv", pairs, v.to(wide))).to(v.dtype)


def gla_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    *,
    scale: float | None = None,
    tau: float | None = None,
) -> torch.Tensor:
    """One token of each of B sequences; their states move on in place. No gradients.

    Args:
        q, k: [B, H, K].
        v: [B, H, V].
        g: [B, H, K] log gates.
        state: [n_slots, H, K, V] float32 or float64, rows ``slots`` changed in place.
        slots: [B] integers; no slot but 0, the scratch slot of padding rows, comes twice.
        scale: of the queries; None = K ** -0.5.
        tau: ``g`` are gate logits, see :func:`log_gates`; None: log gates.

    Returns:
        [B, H, V] in the dtype of ``v``.
    """
    if runs_triton(q, k, v):
        from invivo.kernels.triton_gla import ops, step

        if ops.supports(q, v):
            return step.step(q, k, v, g, state, slots, scale=_scale(q, scale), tau=tau)
    if tau is not None:
        g = log_gates(g, tau)
    wide = state.dtype
    moved = state.index_select(0, slots).mul_(g.to(wide).exp().unsqueeze(-1))
    moved.addcmul_(k.to(wide).unsqueeze(-1), v.to(wide).unsqueeze(-2))
    state.index_copy_(0, slots.long(), moved)
    queries = q.to(wide) * _scale(q, scale)
    return torch.matmul(queries.unsqueeze(-2), moved).squeeze(-2).to(v.dtype)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    span_start: Spans,
    initial_state: torch.Tensor | None,
) -> None:
    n_rows, n_heads, _ = q.shape
    assert k.shape == q.shape == g.shape, f"q {q.shape}, k {k.shape}, g {g.shape}"
    assert v.shape[:2] == (n_rows, n_heads), f"q {q.shape}, v {v.shape}"
    assert (span_start[0], span_start[-1]) == (0, n_rows), f"{span_start} for {n_rows} rows"
    wanted = (len(span_start) - 1, *q.shape[1:], v.shape[2])
    assert initial_state is None or initial_state.shape == wanted, "one state for every span"
