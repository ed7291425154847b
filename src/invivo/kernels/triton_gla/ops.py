"""Gated linear attention on GPUs: differentiable, and for torch.compile whole operators.

Nothing but the inputs is kept for the backward. Nothing reads the device from the host, so all may
be captured in CUDA graphs. Meaning and shapes are those of :mod:`invivo.kernels.gla`; the spans
come as a tensor on the device, rows beyond the last span are not written.

``invivo::gla`` and its backward are the operators that a compiler sees. Where nothing is compiled
the passes are called as they are, since torch's way to an operator written in Python would cost the
host as much as all of their launches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from invivo.kernels.device import wants_grad
from invivo.kernels.triton_gla.passes import backward_pass, forward_pass
from invivo.kernels.triton_gla.step import step

MAX_KEYS = 256  # a tile of states of so many channels fits the registers
MAX_KEYS_FLOAT32 = 128  # and so many the shared memory, where products are of float32


def supports(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernels serve these: 16 to 256 key channels (128 in float32), all sizes of 8."""
    sizes = q.shape[-1] % 8 == 0 and v.shape[-1] % 8 == 0
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    most = MAX_KEYS_FLOAT32 if q.dtype == torch.float32 else MAX_KEYS
    return sizes and 16 <= q.shape[-1] <= most and q.dtype in kinds


def gla_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    span_start: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    want_state: bool = False,
    tau: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`invivo.kernels.gla.gla`, or, with ``tau``, ``gla_from_logits``.

    span_start: [S + 1] int32 on the device, from 0 to T; S >= 1.
    """
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    rest = (span_start, initial_state, scale, tau, want_state)
    if torch.compiler.is_compiling():
        out, state = gla_forward(q, k, v, g, *rest)
        return out, state if want_state else None
    given = (q, k, v, g) if initial_state is None else (q, k, v, g, initial_state)
    if not wants_grad(*given):
        return forward_pass(q, k, v, g, *rest)
    found: tuple[torch.Tensor, torch.Tensor | None] = _GatedLinearAttention.apply(q, k, v, g, *rest)  # type: ignore[no-untyped-call]
    return found


class _GatedLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        span_start: torch.Tensor,
        initial_state: torch.Tensor | None,
        scale: float,
        tau: float | None,
        want_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, g, span_start, initial_state)
        ctx.scale, ctx.tau = scale, tau
        return forward_pass(q, k, v, g, span_start, initial_state, scale, tau, want_state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: torch.Tensor | None, d_final: torch.Tensor | None) -> tuple:
        q, k, v, g, span_start, initial_state = ctx.saved_tensors
        dz = torch.zeros_like(v) if dz is None else dz
        inputs = (q, k, v, g, span_start, initial_state)
        dq, dk, dv, dg, d_initial = backward_pass(dz, d_final, *inputs, ctx.scale, ctx.tau)
        if initial_state is not None and d_initial is not None:
            d_initial = d_initial.to(initial_state.dtype)
        return dq, dk, dv, dg, None, d_initial, None, None, None


@torch.library.custom_op("invivo::gla", mutates_args=())
def gla_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    span_start: torch.Tensor,
    initial_state: torch.Tensor | None,
    scale: float,
    tau: float | None,
    want_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`~invivo.kernels.triton_gla.passes.forward_pass`."""
    out, state = forward_pass(q, k, v, g, span_start, initial_state, scale, tau, want_state)
    return out, _nothing(v) if state is None else state


@gla_forward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    span_start: torch.Tensor,
    initial_state: torch.Tensor | None,
    scale: float,
    tau: float | None,
    want_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return v.new_empty(v.shape), _states(q, v, span_start) if want_state else _nothing(v)


@torch.library.custom_op("invivo::gla_backward", mutates_args=())
def gla_backward(
    dz: torch.Tensor,
    d_final: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    span_start: torch.Tensor,
    initial_state: torch.Tensor | None,
    scale: float,
    tau: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`~invivo.kernels.triton_gla.passes.backward_pass`."""
    *grads, d_initial = backward_pass(
        dz, d_final, q, k, v, g, span_start, initial_state, scale, tau
    )
    return *grads, _nothing(v) if d_initial is None else d_initial


@gla_backward.register_fake
def _(
    dz: torch.Tensor,
    d_final: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    span_start: torch.Tensor,
    initial_state: torch.Tensor | None,
    scale: float,
    tau: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = (t.new_empty(t.shape) for t in (q, k, v, g))
    return *grads, _nothing(v) if initial_state is None else _states(q, v, span_start)


def _states(q: torch.Tensor, v: torch.Tensor, span_start: torch.Tensor) -> torch.Tensor:
    size = (span_start.shape[0] - 1, q.shape[1], q.shape[2], v.shape[2])
    return q.new_empty(size, dtype=torch.float32)


def _nothing(x: torch.Tensor) -> torch.Tensor:
    """Stands for a state that is not wanted: operators return tensors alone."""
    return x.new_empty(0, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, g, span_start, initial_state, ctx.scale, ctx.tau, _ = inputs
    ctx.save_for_backward(q, k, v, g, span_start, initial_state)


def _backward(ctx: Any, dz: torch.Tensor | None, d_final: torch.Tensor | None) -> tuple:
    q, k, v, g, span_start, initial_state = ctx.saved_tensors
    if dz is None:
        dz = torch.zeros_like(v)
    if d_final is not None and d_final.numel() == 0:
        d_final = None
    dq, dk, dv, dg, d_initial = gla_backward(
        dz, d_final, q, k, v, g, span_start, initial_state, ctx.scale, ctx.tau
    )
    if initial_state is None:
        return dq, dk, dv, dg, None, None, None, None, None
    return dq, dk, dv, dg, None, d_initial.to(initial_state.dtype), None, None, None


gla_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("invivo::gla_step", mutates_args=("state",))
def gla_step_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    tau: float | None = None,
) -> torch.Tensor:
    """:func:`invivo.kernels.gla.gla_step`; with ``tau``, ``g`` are logits."""
    return step(q, k, v, g, state, slots, scale=scale, tau=tau)


@gla_step_triton.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    tau: float | None = None,
) -> torch.Tensor:
    return v.new_empty(v.shape)
