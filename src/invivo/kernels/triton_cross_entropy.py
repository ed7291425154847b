"""Log-probability of a label and the gradient of its cross-entropy on GPUs, in place of logits."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from invivo.kernels.rounding import power_of_2
from invivo.kernels.triton_launch import Launch

BLOCK = 4096


@triton.jit
def _label_kernel(
    logits, labels, weights, logprobs, softcap, stride,
    VOCABULARY: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTED: tl.constexpr,
    GRADIENT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One row a program: grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    label = tl.load(labels + row)
    # Running largest logit and sum of exponentials, a lane for each column of a block.
    largest = tl.full([N], -1.0e30, tl.float32)
    total = tl.zeros([N], tl.float32)
    for begin in range(0, VOCABULARY, N):
        column = begin + tl.arange(0, N)
        inside = column < VOCABULARY
        x = tl.load(line + column, mask=inside, other=0.0).to(tl.float32)
        if SOFTCAP:
            x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)
        x = tl.where(inside, x, -1.0e30)
        larger = tl.maximum(largest, x)
        total = total * tl.exp(largest - larger) + tl.where(inside, tl.exp(x - larger), 0.0)
        largest = larger
    top = tl.max(largest, 0)
    lse = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    chosen = tl.load(line + label).to(tl.float32)
    if SOFTCAP:
        chosen = softcap * (2.0 * tl.sigmoid(2.0 * chosen / softcap) - 1.0)
    tl.store(logprobs + row, chosen - lse)
    if GRADIENT:
        weight = 1.0
        if WEIGHTED:
            weight = tl.load(weights + row).to(tl.float32)
        for begin in range(0, VOCABULARY, N):
            column = begin + tl.arange(0, N)
            inside = column < VOCABULARY
            x = tl.load(line + column, mask=inside, other=0.0).to(tl.float32)
            slope = 1.0
            if SOFTCAP:
                turned = 2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0
                slope = 1.0 - turned * turned
                x = softcap * turned
            grad = tl.exp(x - lse) - tl.where(column == label, 1.0, 0.0)
            tl.store(
                line + column, (grad * slope * weight).to(logits.dtype.element_ty), mask=inside
            )


def label_logprobs_triton(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    softcap: float | None,
    gradient: bool,
) -> torch.Tensor:
    """Log-probabilities [n] float32 of labels [n] under logits [n, V].

    Args:
        logits: before the soft cap. Where ``gradient`` is asked for, that of the cross-entropy
            times ``weights`` takes their place.
    """
    n_rows, vocabulary = logits.shape
    assert logits.stride(1) == 1
    logprobs = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    if n_rows:
        # The label's logit is read before its place is written: by one program, in that order.
        launch = _launch(vocabulary, BLOCK, softcap is not None, weights is not None, gradient)
        launch(
            (n_rows,),
            logits, labels, logprobs if weights is None else weights, logprobs,
            1.0 if softcap is None else softcap, logits.stride(0),
        )  # fmt: skip
    return logprobs


@cache
def _launch(vocabulary: int, block: int, softcap: bool, weighted: bool, gradient: bool) -> Launch:
    return Launch(
        _label_kernel,
        VOCABULARY=vocabulary, SOFTCAP=softcap, WEIGHTED=weighted, GRADIENT=gradient,
        N=min(block, power_of_2(vocabulary)), num_warps=8,
    )  # fmt: skip
