"""Tensors of a plan's states on a mesh: moved from one state to another, with their gradients.

The states are those of :mod:`invivo.sharding.parallel_plan`, of rows [R, features] over a
one-dimensional mesh; every process holds its own part as a plain tensor. The collectives are
DTensor's. What a gradient looks like is said for both directions, never inferred: torch's
releases differ in what DTensor makes of the gradient of a partial sum.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from invivo.sharding.parallel_plan import State, Weight

REPLICATED, TOKENS, FEATURES, PARTIAL = Replicate(), Shard(0), Shard(1), Partial()

_PLACEMENTS: dict[State, Placement] = {
    State.WHOLE: REPLICATED,  # of the one device there is
    State.REPLICATED: REPLICATED,
    State.TOKENS: TOKENS,
    State.FEATURES: FEATURES,
    State.PARTIAL: PARTIAL,
}


def moved(
    x: torch.Tensor, mesh: DeviceMesh, shape: tuple[int, int], start: State, goal: State
) -> torch.Tensor:
    """This process's part of a tensor in state ``goal``.

    Args:
        x: its part in state ``start``.
        mesh: of one dimension.
        shape: of the whole tensor.
    """
    there = _PLACEMENTS[start], _PLACEMENTS[goal]
    back = _gradient(there[1]), _gradient(there[0])
    moved: torch.Tensor = _Moved.apply(x, mesh, shape, there, back)  # type: ignore[no-untyped-call]
    return moved


def entered(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """``x``, replicated, for maps whose gradients by it are partial sums: these are added up.

    Megatron's operator *f* (Shoeybi et al., 2019, arXiv 1909.08053, section 3).
    """
    there, back = (REPLICATED, REPLICATED), (PARTIAL, REPLICATED)
    entered: torch.Tensor = _Moved.apply(x, mesh, x.shape, there, back)  # type: ignore[no-untyped-call]
    return entered


def local_weight(
    weight: torch.Tensor, *, use: Placement | None = None, gradient: Placement | None = None
) -> torch.Tensor:
    """What this process computes with.

    Args:
        weight: a DTensor over a mesh of one dimension.
        use: the placement in which it is used; None: its own.
        gradient: the placement that the gradient by the result has; None: that of ``use``.
    """
    assert isinstance(weight, DTensor)
    (own,) = weight.placements
    use = own if use is None else use
    local: torch.Tensor = _LocalWeight.apply(weight, use, gradient or use)  # type: ignore[no-untyped-call]
    return local


def spread(whole: torch.Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """A tensor that all processes hold, of which each keeps a copy of its part alone."""
    part = whole
    if isinstance(placement, Shard):
        parts = whole.chunk(mesh.size(), placement.dim)
        rank = mesh.get_local_rank()
        part = parts[rank] if rank < len(parts) else whole.narrow(placement.dim, 0, 0)
    part = part.detach().clone(memory_format=torch.contiguous_format)
    return _described(part, mesh, placement, whole.shape)


def replicated(x: DTensor) -> torch.Tensor:
    """All of ``x`` in every process, by one collective for each dimension of its mesh.

    What several dimensions of the mesh share must have been shared over the last of them first,
    equally, and then over those before it: as ``fully_shard`` goes on with DTensors. (torch itself
    does all dimensions at once and warns of their order.)
    """
    mesh, part = x.device_mesh, x.to_local()
    names = mesh.mesh_dim_names or ()
    dims: list[int | None] = [getattr(placement, "dim", None) for placement in x.placements]
    for i, dim in enumerate(dims):
        shape = list(x.shape)  # of what is left to be shared over the dimensions behind i
        for size, later in zip(mesh.shape[i + 1 :], dims[i + 1 :], strict=True):
            if later is not None:
                shape[later] //= size
        start = x.placements[i] if dim is None else Shard(dim)
        line = mesh if mesh.ndim == 1 else mesh[names[i]]
        part = _carried(part, line, tuple(shape), start, REPLICATED)
    return part


def weight_placement(weight: Weight) -> Placement:
    """Where a matrix [d_out, d_in] lies: the transpose of the plan's [d_in, d_out]."""
    if weight is Weight.ROWS:
        return Shard(1)
    return Shard(0) if weight is Weight.COLUMNS else Replicate()


def _gradient(placement: Placement) -> Placement:
    """Of a loss by a tensor: each process needs all of it where its own part is a summand."""
    return REPLICATED if placement.is_partial() else placement


def _described(
    part: torch.Tensor, mesh: DeviceMesh, placement: Placement, shape: tuple[int, ...]
) -> DTensor:
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        part.contiguous(),
        mesh,
        [placement],
        run_check=False,
        shape=torch.Size(shape),
        stride=strides,
    )


def _carried(
    x: torch.Tensor, mesh: DeviceMesh, shape: tuple[int, ...], start: Placement, goal: Placement
) -> torch.Tensor:
    if start == goal:
        return x.view_as(x)
    if goal.is_partial():  # a part becomes its summand; the others add nothing there
        assert isinstance(start, Shard)
        whole = x.new_zeros(shape)
        parts, rank = whole.chunk(mesh.size(), start.dim), mesh.get_local_rank()
        if rank < len(parts):
            parts[rank].copy_(x)
        return whole
    return _described(x, mesh, start, shape).redistribute(placements=[goal]).to_local()


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        mesh: DeviceMesh,
        shape: tuple[int, ...],
        there: tuple[Placement, Placement],
        back: tuple[Placement, Placement],
    ) -> torch.Tensor:
        ctx.way = mesh, shape, back
        return _carried(x, mesh, shape, *there)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mesh, shape, back = ctx.way
        return _carried(gradient, mesh, shape, *back), None, None, None, None


class _LocalWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: DTensor, use: Placement, gradient: Placement) -> torch.Tensor:
        ctx.own = weight.device_mesh, weight.placements[0], weight.shape, gradient
        return _carried(
            weight.to_local(), weight.device_mesh, weight.shape, weight.placements[0], use
        )

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mesh, own, shape, placement = ctx.own
        part = _carried(gradient, mesh, shape, placement, own)
        return _described(part, mesh, own, shape), None, None
