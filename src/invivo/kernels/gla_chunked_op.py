"""The chunked path of gated linear attention as one torch operator, whole for torch.compile.

The path itself reads span boundaries on the host and loops over them, which a compiler would
unroll and do again for every new cut; as an operator it takes them as a tensor and is a black box.
"""

from __future__ import annotations

from typing import Any

import torch

from invivo.kernels.gla_chunked import chunked_backward, chunked_forward


@torch.library.custom_op("invivo::gla_chunked", mutates_args=())
def gla_chunked_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    span_start: torch.Tensor,
    initial_state: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`invivo.kernels.gla.gla_chunked`; differentiable.

    Args:
        span_start: [S + 1] int64 on the host.
        initial_state: [S, H, K, V]; None: zeros.

    Returns:
        Outputs [T, H, V] and final states [S, H, K, V].
    """
    spans = tuple(span_start.tolist())
    state = _zeros(q, v, span_start) if initial_state is None else initial_state
    return chunked_forward(q, k, v, g, state, spans, scale)


@gla_chunked_op.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    span_start: torch.Tensor,
    initial_state: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    state = _zeros(q, v, span_start) if initial_state is None else torch.empty_like(initial_state)
    return torch.empty_like(v), state


@torch.library.custom_op("invivo::gla_chunked_backward", mutates_args=())
def gla_chunked_backward_op(
    d_o: torch.Tensor,
    d_final: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    span_start: torch.Tensor,
    initial_state: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, g and the initial state."""
    state = _zeros(q, v, span_start) if initial_state is None else initial_state
    spans = tuple(span_start.tolist())
    return chunked_backward(d_o, d_final, q, k, v, g, state, spans, scale)


@gla_chunked_backward_op.register_fake
def _(
    d_o: torch.Tensor,
    d_final: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    span_start: torch.Tensor,
    initial_state: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    empty = torch.empty_like
    return empty(q), empty(k), empty(v), empty(g), empty(d_final)


def _zeros(q: torch.Tensor, v: torch.Tensor, span_start: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (span_start.shape[0] - 1, q.shape[1], q.shape[2], v.shape[2])
    return torch.zeros(shape, dtype=wide, device=q.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(
    ctx: Any, d_o: torch.Tensor, d_final: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    *inputs, initial_state = ctx.saved_tensors
    *grads, d_initial = gla_chunked_backward_op(d_o, d_final, *inputs, initial_state, ctx.scale)
    return *grads, None, None if initial_state is None else d_initial, None


gla_chunked_op.register_autograd(_backward, setup_context=_setup_context)
