"""A causal convolution over the last few tokens, channel by channel."""

from __future__ import annotations

import torch

from invivo.kernels.paging import PagedLayout


def short_conv(
    x: torch.Tensor, weight: torch.Tensor, layout: PagedLayout, tails: torch.Tensor
) -> torch.Tensor:
    """``y_t = sum_i weight[:, i] x_{t - size + 1 + i}`` within each span; differentiable.

    Args:
        x: [T, C].
        weight: [C, 1, size].
        tails: [n_slots, C, size - 1], inputs before each span, in place replaced by those before
            what follows it; not touched where the layout has no slots.
    """
    size = weight.shape[-1]
    before = size - 1
    slots = layout.state_slots
    if slots is not None and layout.n_decode == layout.n_spans:
        seen = torch.cat((tails.index_select(0, slots), x.unsqueeze(-1)), dim=-1)
        tails.index_copy_(0, slots, seen[..., 1:])
        return (seen * weight[:, 0]).sum(-1)
    starts = layout.span_start_host or layout.span_start.tolist()
    old = x.new_zeros(layout.n_spans, x.shape[1], before)
    if slots is not None:
        old = tails.index_select(0, slots)
    pieces, tail = [], []
    for s in range(layout.n_spans):
        seen = torch.cat((old[s].T, x[starts[s] : starts[s + 1]]))  # [size - 1 + n, C]
        tail.append(seen[len(seen) - before :].T)
        pieces.append((seen.unfold(0, size, 1) * weight[:, 0]).sum(-1))
    if slots is not None and before:
        tails.index_copy_(0, slots, torch.stack(tail).to(tails.dtype))
    return torch.cat(pieces) if pieces else x
