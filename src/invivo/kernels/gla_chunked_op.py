"""The chunked path of gated linear attention as one torch operator, whole for torch.compile.

The path itself reads span boundaries on the host and loops over them, which a compiler would
unroll and do again for every new cut; as an operator it takes them as a tensor and is a black box.
Texts begin with states of zeros and leave none behind: what training needs.
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
    scale: float,
) -> torch.Tensor:
    """:func:`invivo.kernels.gla.gla_chunked` from states of zeros: [T, H, V]; differentiable.

    span_start: [S + 1] int64 on the host.
    """
    spans = tuple(span_start.tolist())
    return chunked_forward(q, k, v, g, _zero_states(q, v, span_start), spans, scale)[0]


@gla_chunked_op.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    span_start: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return torch.empty_like(v)


@torch.library.custom_op("invivo::gla_chunked_backward", mutates_args=())
def gla_chunked_backward_op(
    d_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    span_start: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and g."""
    state = _zero_states(q, v, span_start)
    spans = tuple(span_start.tolist())
    return chunked_backward(d_o, torch.zeros_like(state), q, k, v, g, state, spans, scale)[:4]


@gla_chunked_backward_op.register_fake
def _(
    d_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    span_start: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(g)


def _zero_states(q: torch.Tensor, v: torch.Tensor, span_start: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (len(span_start) - 1, q.shape[1], q.shape[2], v.shape[2])
    return torch.zeros(shape, dtype=wide, device=q.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_o: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = gla_chunked_backward_op(d_o, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None


gla_chunked_op.register_autograd(_backward, setup_context=_setup_context)
