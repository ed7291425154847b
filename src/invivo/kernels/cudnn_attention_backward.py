"""Gradient of a whole text's attention by cuDNN, as torch carries it.

On an H200 it takes 0.31 ms where our own kernels take 0.44 (2,048 rows, 32 heads of 128 over 8).
It adds with atomic operations, so that results change in their last bits from run to run, and
knows neither a past before the rows nor soft caps: such windows keep the Triton kernels.
"""

from __future__ import annotations

from functools import cache

import torch

from invivo.kernels.attention_backward import gather_text

WIDEST_HEAD = 128  # of its backward on Hopper
LENGTHS = 512  # rows; lengths that come again are multiples of this


def serves(
    q: torch.Tensor, dz: torch.Tensor, start: int, window: int | None, softcap: float | None
) -> bool:
    """Whether cuDNN is to take the rows: those from the start of a text, under plain causal
    attention in half precision, with heads of 8, 16, ... up to 128 numbers and of a length that
    comes again; q and dz [s, H, D].

    Each new length costs a plan: only multiples of 512 are taken, of which there are few (a plan
    of the forward took the host of an H200 40 ms, about as long as a token may take).
    """
    n_rows, _, head_dim = q.shape
    near = window is not None and window < n_rows
    half = q.dtype in (torch.bfloat16, torch.float16) and dz.dtype == q.dtype
    fits = head_dim <= WIDEST_HEAD and head_dim % 8 == 0
    comes_again = n_rows > 0 and n_rows % LENGTHS == 0
    return start == 0 and softcap is None and not near and half and fits and comes_again


@cache
def runs_on(device: torch.device) -> bool:
    """Whether this is a GPU of the kind on which it was compared (Hopper)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


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
    k, v = gather_text(k_cache, v_cache, blocks, n_rows)
    # torch keeps one plan for all layouts of the outputs: each tensor must always have the same.
    given = (x.contiguous().transpose(0, 1).unsqueeze(0) for x in (dz, q, k, v, z))
    d_q, d_k, d_v = _backward(*given, lse=lse.T.contiguous().unsqueeze(0), scale=scale)
    for total, gradient in ((dk, d_k), (dv, d_v)):
        if total is None:
            continue
        own = gradient.squeeze(0).transpose(0, 1)
        if fresh:
            total[:n_rows] = own
        else:
            total[:n_rows] += own
    return d_q.squeeze(0).transpose(0, 1)


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
    n = q.shape[2]
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = (
        torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dz, q, k, v, z, lse, *_no_dropout(q.device), None, None, None, n, n, 0.0, True,
            scale=scale,
        )
    )  # fmt: skip
    return gradients


@cache
def _no_dropout(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Seed and offset of a dropout that there is not."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return zero, zero


@cache
def _sums_have_a_last_dimension(device: torch.device) -> bool:
    """Whether this torch's log-sum-exps are [b, H, s, 1]; some versions have [b, H, s]."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True, 0.0, True)
    return bool(found[1].dim() == 4)
