"""Which path an operation takes: decided by its tensors alone."""

from __future__ import annotations

import torch

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def wants_grad(*tensors: torch.Tensor) -> bool:
    """Whether autograd will ask for a gradient through any of these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def runs_triton(*tensors: torch.Tensor) -> bool:
    """Whether the Triton kernels serve these: on a GPU, a dtype they know, no gradient."""
    first = tensors[0]
    return first.is_cuda and first.dtype in TRITON_DTYPES and not wants_grad(*tensors)


def runs_on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether the CPU's paths for inference serve these."""
    return tensors[0].device.type == "cpu" and not wants_grad(*tensors)
