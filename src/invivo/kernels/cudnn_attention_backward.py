"""Gradient of a whole text's attention by cuDNN, as torch carries it.

About twice as fast as our own kernels on a Hopper-class GPU. It adds with atomic operations, so
that results change in their last bits from run to run, and knows neither a past before the rows
nor soft caps: such windows keep the Triton kernels.
"""

from __future__ import annotations

from functools import cache

import torch

from invivo.kernels.attention_backward import attention_backward, gather_rows

WIDEST_HEAD = 128  # cuDNN's backward on Hopper


def attention_backward_cudnn(
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
    """The function of :func:`invivo.kernels.attention_backward.attention_backward`, which also
    takes what cuDNN does not serve."""
    if z is None or not q.is_cuda or not serves(q, start, window, softcap):
        return attention_backward(
            dz, q, k_cache, v_cache, blocks, start, z, lse,
            scale=scale, window=window, softcap=softcap, dk=dk, dv=dv, fresh=fresh,
        )  # fmt: skip
    return whole_text_backward(
        dz, q, k_cache, v_cache, blocks, z, lse, scale=scale, dk=dk, dv=dv, fresh=fresh
    )


def serves(q: torch.Tensor, start: int, window: int | None, softcap: float | None) -> bool:
    """Whether cuDNN knows the case: rows from the start of a text, plain causal attention in half
    precision, q [s, H, D] with heads of 8, 16, ... up to 128 numbers."""
    n_rows, _, head_dim = q.shape
    near = window is not None and window < n_rows
    half = q.dtype in (torch.bfloat16, torch.float16)
    fits = head_dim <= WIDEST_HEAD and head_dim % 8 == 0
    return start == 0 and n_rows > 1 and softcap is None and not near and half and fits


def whole_text_backward(
    dz: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    blocks: torch.Tensor,
    z: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    fresh: bool,
) -> torch.Tensor:
    """Rows [0, s) of a text; arguments as in ``attention_backward``."""
    n_rows = q.shape[0]
    k, v = (gather_rows(pages, blocks, 0, n_rows) for pages in (k_cache, v_cache))
    # torch keeps one plan for all layouts of the outputs: each tensor must always have the same.
    given = (x.contiguous().transpose(0, 1)[None] for x in (dz, q, k, v, z))
    d_q, d_k, d_v = _backward(*given, lse=lse.T.contiguous()[None], scale=scale)
    for total, gradient in ((dk, d_k), (dv, d_v)):
        if total is None:
            continue
        own = gradient[0].transpose(0, 1)
        if fresh:
            total[:n_rows] = own
        else:
            total[:n_rows] += own
    return d_q[0].transpose(0, 1)


def _backward(
    dz: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    z: torch.Tensor,
    *,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dz, q, z [1, H, s, D], k and v [1, G, s, D], lse [1, H, s] float32: gradients by q, k, v."""
    if _sums_have_a_last_dimension(q.device):
        lse = lse[..., None]
    unused = torch.zeros(2, dtype=torch.int64, device=q.device)  # seed and offset of a dropout
    n = q.shape[2]
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = (
        torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dz, q, k, v, z, lse, unused[0], unused[1], None, None, None, n, n, 0.0, True,
            scale=scale,
        )
    )  # fmt: skip
    return gradients


@cache
def _sums_have_a_last_dimension(device: torch.device) -> bool:
    """Whether this torch's log-sum-exps are [b, H, s, 1]; some versions have [b, H, s]."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True, 0.0, True)
    return bool(found[1].dim() == 4)
