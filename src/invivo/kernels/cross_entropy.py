"""Cross-entropy of the next token from final states, and its gradient, without all logits at once.

``[T, V]`` logits of a long text are larger than everything else a step holds. The loss and the
gradient by the hidden states are computed together, a few rows at a time, so that only one
piece of logits exists; rows without a label cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from invivo.kernels.device import runs_triton
from invivo.kernels.linear import linear

IGNORED = -100  # the label of a row that predicts nothing
LOGITS_BYTES = 64 << 20  # a piece of logits is at most about this large
# On a GPU a piece stays in its dtype; the head is read once a piece, which takes rows to pay.
GPU_LOGITS_BYTES = 128 << 20


@dataclass(slots=True)
class CrossEntropy:
    """A loss and its gradient.

    Attributes:
        loss: [] sum over labelled rows of weight times negative log-probability; float32, or
            float64 for float64 states. Not divided by anything.
        n_labels: [] int64, rows with a label.
        n_correct: [] int64, rows whose label has the largest logit (the first of equals).
        d_hidden: [T, d] gradient of ``loss`` in the dtype of ``hidden``; None where not asked for.
        d_head: [V, d] the same by ``head``, in the dtype of ``loss``; None where not asked for.
        logprobs: [T] log-probability of each label, 0 where there is none; None where not asked
            for.
    """

    loss: torch.Tensor
    n_labels: torch.Tensor
    n_correct: torch.Tensor
    d_hidden: torch.Tensor | None
    logprobs: torch.Tensor | None
    d_head: torch.Tensor | None = None


def cross_entropy_reference(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
    want_grad: bool = True,
    want_logprobs: bool = False,
    want_head_grad: bool = False,
    every_row: bool = False,
    packed: torch.Tensor | None = None,
    rows: int | None = None,
    at: torch.Tensor | None = None,
) -> CrossEntropy:
    """By all logits at once and autograd.

    Args:
        hidden: [T, d] normalised final states.
        head: [V, d].
        labels: [T] int64 ids that the rows must predict, :data:`IGNORED` for none.
        weights: [T] factor of each row's loss; None = 1.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        want_grad: whether the gradient is computed.
        want_logprobs: whether log-probabilities are returned.
        want_head_grad: whether the gradient by ``head`` is computed too; needs ``want_grad``.
        every_row: also compute rows without a label, so that the host need not wait to learn which
            they are; not used here.
        packed: of ``head``, see :func:`invivo.kernels.linear.pack`; not used here.
        rows: how many rows at a time; not used here.
        at: [n] int64 rows with a label; None: found here, for which the fast path waits for
            the device. Not used here.
    """
    wide = _wide(hidden)
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_(want_grad)
        matrix = head.detach().requires_grad_(want_head_grad)
        logits = linear(leaf, matrix).to(wide)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logprobs = torch.log_softmax(logits, dim=-1)
        labelled = labels != IGNORED
        chosen = logprobs.gather(1, labels.where(labelled, 0)[:, None]).squeeze(1)
        chosen = chosen.where(labelled, 0.0)
        loss = -(chosen if weights is None else chosen * weights.to(wide)).sum()
        leaves = ((leaf,) if want_grad else ()) + ((matrix,) if want_head_grad else ())
        grads = torch.autograd.grad(loss, leaves) if leaves else ()
    return CrossEntropy(
        loss.detach(),
        labelled.sum(),
        (labelled & (logprobs.argmax(-1) == labels)).sum(),
        grads[0] if want_grad else None,
        chosen.detach() if want_logprobs else None,
        grads[-1].to(wide) if want_head_grad else None,
    )


def cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
    want_grad: bool = True,
    want_logprobs: bool = False,
    want_head_grad: bool = False,
    every_row: bool = False,
    packed: torch.Tensor | None = None,
    rows: int | None = None,
    at: torch.Tensor | None = None,
) -> CrossEntropy:
    """:func:`cross_entropy_reference`, ``rows`` rows at a time (None: by memory)."""
    assert want_grad or not want_head_grad, "the gradient by the head comes with the other"
    wide = _wide(hidden)
    hidden, head = hidden.detach(), head.detach()
    fast = runs_triton(hidden)
    if rows is None:
        rows = _piece_rows(head.shape[0], hidden.element_size() if fast else wide.itemsize, fast)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    n_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    d_hidden = torch.zeros_like(hidden) if want_grad else None
    d_head = torch.zeros(head.shape, dtype=wide, device=head.device) if want_head_grad else None
    logprobs = None
    if want_logprobs:
        logprobs = torch.zeros(hidden.shape[0], dtype=wide, device=hidden.device)
    labelled = labels != IGNORED
    pieces: Sequence[torch.Tensor | slice]
    if every_row:
        weights = labelled.to(wide) if weights is None else weights.where(labelled, 0.0)
        labels = labels.where(labelled, 0)
        pieces = [slice(i, i + rows) for i in range(0, hidden.shape[0], rows)]
    else:
        pieces = (torch.nonzero(labelled).squeeze(1) if at is None else at).split(rows)
    with torch.no_grad():
        for piece in pieces:
            target = labels[piece]
            weight = None if weights is None else weights[piece].to(wide)
            logits = linear(hidden[piece], head, packed=packed)
            n_correct += (labelled[piece] & (logits.argmax(-1) == target)).sum()
            if fast:
                from invivo.kernels.triton_cross_entropy import label_logprobs_triton

                logprob = label_logprobs_triton(
                    logits, target, weight, softcap=softcap, gradient=want_grad
                )
                loss -= logprob.sum() if weight is None else (logprob * weight).sum()
                if logprobs is not None:
                    logprobs[piece] = logprob
                if d_hidden is not None:
                    d_hidden[piece] = logits @ head
                if d_head is not None:
                    d_head += logits.T @ hidden[piece]
                del logits  # before the next piece is made
                continue
            logits = logits.to(wide)
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            chosen = logits.gather(1, target[:, None])
            lse = torch.logsumexp(logits, dim=-1, keepdim=True)
            logprob = (chosen - lse).squeeze(1)
            loss -= logprob.sum() if weight is None else (logprob * weight).sum()
            if logprobs is not None:
                logprobs[piece] = logprob
            if d_hidden is None:
                continue
            slope = None if softcap is None else 1.0 - (logits / softcap).square_()
            grad = logits.sub_(lse).exp_()
            grad.scatter_add_(1, target[:, None], torch.full_like(chosen, -1.0))
            if slope is not None:
                grad *= slope
            if weight is not None:
                grad *= weight[:, None]
            grad = grad.to(hidden.dtype)
            d_hidden[piece] = grad @ head
            if d_head is not None:
                d_head += grad.T @ hidden[piece]
    if logprobs is not None and every_row:
        logprobs *= labelled
    return CrossEntropy(loss, labelled.sum(), n_correct, d_hidden, logprobs, d_head)


def _piece_rows(vocabulary: int, itemsize: int, fast: bool) -> int:
    """Rows of a piece; on a GPU whole tiles of a matrix product."""
    if not fast:
        return max(16, LOGITS_BYTES // (vocabulary * itemsize))
    return max(128, GPU_LOGITS_BYTES // (vocabulary * itemsize) // 128 * 128)


def _wide(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
