"""Cross-entropy of whole texts, its gradient by states and head made piece by piece.

The loss is a sum of nats beside the number of tokens it sums over, so that any number of
micro-batches and processes can be added up and divided once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from invivo.kernels.cross_entropy import IGNORED, cross_entropy
from invivo.kernels.device import wants_grad
from invivo.models.decoder import Decoder
from invivo.training.forward import Recompute, dense_forward

# Logits at a time on a GPU. Each piece adds to the head's whole gradient in float32: few pay.
GPU_LOGITS_BYTES = 256 << 20


def dense_loss(
    decoder: Decoder,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    recompute: Recompute = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of texts that begin at position 0; differentiable in the decoder's parameters.

    Args:
        tokens: [B, T] int64 ids.
        labels: [B, T] int64 ids that follow; -100: no loss.
        starts, dtype, recompute: see :func:`~invivo.training.forward.dense_forward`.

    Returns:
        Sum of nats [] (float32, float64 for float64 states), and how many labels it sums over [].
    """
    hidden = dense_forward(decoder, tokens, starts=starts, dtype=dtype, recompute=recompute)
    return head_loss(decoder, hidden, labels)


def head_loss(
    decoder: Decoder, hidden: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`dense_loss` from normalised final states [B, T, d]."""
    head = decoder.embed if decoder.head is None else decoder.head
    loss = chunked_loss(
        hidden.flatten(0, 1), head.to(hidden.dtype), labels.flatten(), decoder.config.logit_softcap
    )
    return loss, (labels != IGNORED).sum()


def chunked_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
    rows: int | None = None,
) -> torch.Tensor:
    """Sum over labelled rows of the negative log-probability [], differentiable once.

    With gradients on, both gradients are made in the forward pass, where the logits are. On a GPU
    nothing waits for the device, at the price of the products of rows without labels.

    Args:
        hidden: [R, d] normalised final states.
        head: [V, d] of the same dtype.
        labels: [R] int64 ids, -100 for none.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        rows: how many at a time; None: by memory.
    """
    if not wants_grad(hidden, head):
        return cross_entropy(hidden, head, labels, softcap=softcap, want_grad=False, rows=rows).loss
    if rows is None and hidden.is_cuda:
        rows = max(128, GPU_LOGITS_BYTES // (head.shape[0] * hidden.element_size()) // 128 * 128)
    loss: torch.Tensor = _Loss.apply(hidden, head, labels, softcap, rows)  # type: ignore[no-untyped-call]
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        labels: torch.Tensor,
        softcap: float | None,
        rows: int | None,
    ) -> torch.Tensor:
        found = cross_entropy(
            hidden,
            head,
            labels,
            softcap=softcap,
            want_head_grad=ctx.needs_input_grad[1],
            every_row=hidden.is_cuda,
            rows=rows,
        )
        ctx.save_for_backward(found.d_hidden, found.d_head)
        ctx.dtype = head.dtype
        return found.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        by_hidden = d_hidden * d_loss if ctx.needs_input_grad[0] else None
        by_head = None if d_head is None else (d_head * d_loss).to(ctx.dtype)
        return by_hidden, by_head, None, None, None
