"""One model over several processes: sharded parameters, gradients and moments (FSDP2).

``torchrun --nproc-per-node N`` starts the processes. Every process reads rows of its own; each
layer's parameters are gathered before the layer runs and its gradients are summed and scattered
after. Parameters stay float32 and are gathered in the products' dtype; gradients are summed in
float32 and not divided: the loss is divided once, by the labels of all processes. With more than
one replica (HSDP) a group of processes holds the model between them, and the groups add up their
gradients.

Queries, keys and values of a layer are one matrix and so are gate and up: they are split by rows
across processes whatever the rows mean, which tensor parallelism could not do.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from invivo.errors import InvalidRequest
from invivo.models.decoder import Decoder
from invivo.training.loss_model import LossModel
from invivo.training.processes import Keeper

# The first process may prepare data for hours while others wait; torchrun ends all if one is gone.
PATIENCE = timedelta(days=7)
STALLED = timedelta(minutes=30)  # between GPUs: the first may write samples while others wait


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among several; see :class:`~invivo.training.processes.Processes`.

    Attributes:
        mesh: (shard,) or (replicate, shard).
        host: group of all for numbers on the host, beside the device's own.
    """

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    host: dist.ProcessGroup

    def total(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x, group=self.host if x.is_cpu else None)
        return x

    def decided(self, value: float) -> float:
        x = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(x, src=0, group=self.host)
        return float(x)

    @contextmanager
    def first_first(self) -> Iterator[None]:
        if self.rank:
            dist.barrier(group=self.host)
        try:
            yield
        finally:
            if not self.rank:
                dist.barrier(group=self.host)

    def share(self, model: LossModel) -> None:
        """Shard ``model``, which all processes must hold with the same numbers; names stay."""
        policy = MixedPrecisionPolicy(
            param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for layer in model.layers:
            fully_shard(layer, mesh=self.mesh, mp_policy=policy)
        layers = {p for layer in model.layers for p in layer.parameters()}
        fully_shard(model, mesh=self.mesh, mp_policy=policy, ignored_params=layers)
        for module in _sharded(model):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> torch.Tensor:
        norm = nn.utils.clip_grad_norm_(parameters, most or math.inf)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextmanager
    def whole(self, model: LossModel) -> Iterator[None]:
        """In the products' dtype: as much memory as the model's weights are served in."""
        for module in _sharded(model):
            module.unshard()
        try:
            yield
        finally:
            for module in _sharded(model):
                module.reshard()

    def gathered(self, decoder: Decoder) -> Decoder | None:
        copy = Decoder(decoder.config) if self.rank == 0 else None
        into = {} if copy is None else dict(copy.named_parameters())
        for name, parameter in decoder.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if name in into:
                into[name].data.copy_(whole.detach())
        return copy

    def keeper(self, folder: Path, keep: int) -> Keeper:
        from invivo.training.sharded_checkpoint import ShardedCheckpoints

        return ShardedCheckpoints(folder, self, keep=keep)


@contextmanager
def joined(replicas: int, kind: str) -> Iterator[Ranks]:
    """This process among those that torchrun started, until the end of the block.

    Args:
        replicas: groups that hold a whole model each.
        kind: of device, ``cuda`` or ``cpu``.

    Raises:
        InvalidRequest: the processes cannot be divided into so many replicas, or there are more
            of them on this machine than GPUs.
    """
    world = int(os.environ["WORLD_SIZE"])
    if world % replicas:
        raise InvalidRequest(
            f"does not divide the {world} processes", field="parallel.replicas", given=replicas
        )
    here = torch.device(kind)
    if kind == "cuda":
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if here.index >= torch.cuda.device_count():
            raise InvalidRequest(
                f"this machine has {torch.cuda.device_count()} GPUs",
                field="nproc-per-node",
                given=os.environ.get("LOCAL_WORLD_SIZE"),
            )
        torch.cuda.set_device(here)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=STALLED)
    try:
        if replicas == 1:
            mesh = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
        else:
            shape = (replicas, world // replicas)
            mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
        host = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(dist.get_rank(), world, here, mesh, host)
    finally:
        dist.destroy_process_group()


def _sharded(model: LossModel) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
